//! Connections that break.

use multifd_engine::ErrorKind;
use multifd_tests::Outcome;
use multifd_tests::peer::{Incoming, Stage};

use crate::fixture::Way;

/// Reads to where a round has begun and is far from its end.
fn read_into_a_round(destination: &mut Incoming, channels: usize) -> Outcome {
    if channels == 0 { destination.read_to(Stage::Moving) } else { destination.read_channel_bytes(500_000) }
}

#[test]
fn a_channel_is_cut_in_the_middle_of_a_round() -> Outcome {
    for codec in ["none", "zlib:1", "zstd:1"] {
        for bytes in [64, 5000, 500_000] {
            let ended = Way { codec, ..Way::channels(2) }.send(|destination| {
                destination.read_channel_bytes(bytes)?;
                destination.cut_channel(1);
                destination.read_on();
                Ok(())
            });
            let error = ended?.failed(true, &["channel 1 (unix:", "sending"]);
            assert_eq!(error.kind(), ErrorKind::Transport);
        }
    }
    Ok(())
}

fn until_cut(destination: &mut Incoming, stage: Stage) -> Outcome {
    destination.read_to(stage)?;
    destination.cut_main();
    destination.wait_for_the_end()
}

#[test]
fn main_is_cut_while_ram_moves() -> Outcome {
    for channels in [0, 2] {
        for return_path in [true, false] {
            for stage in [Some(Stage::Configured), Some(Stage::Started), None] {
                let way = Way { return_path, ..Way::channels(channels) };
                let ended = way.send(|destination| {
                    match stage {
                        Some(stage) => destination.read_to(stage)?,
                        None => read_into_a_round(destination, channels)?,
                    }
                    destination.cut_main();
                    destination.read_on();
                    Ok(())
                })?;
                let error = ended.failed(true, &["unix:"]);
                assert_eq!(error.kind(), ErrorKind::Transport, "{}", error.chain());
            }
        }
    }
    Ok(())
}

#[test]
fn main_is_cut_while_device_state_moves() -> Outcome {
    for channels in [0, 2] {
        let way = Way { device_state: 4 << 20, ..Way::channels(channels) };
        let ended = way.send(|destination| until_cut(destination, Stage::RamSent))?;
        let error = ended.failed(true, &["unix:"]);
        assert_eq!(error.kind(), ErrorKind::Transport, "{}", error.chain());
    }
    Ok(())
}

#[test]
fn everything_is_cut_at_once() -> Outcome {
    for bytes in [0, 192, 500_000] {
        let ended = Way::channels(3).send(|destination| {
            destination.read_channel_bytes(bytes)?;
            (0..3).for_each(|channel| destination.cut_channel(channel));
            destination.cut_main();
            Ok(())
        })?;
        assert_eq!(ended.failed(true, &["unix:"]).kind(), ErrorKind::Transport);
    }
    Ok(())
}

#[test]
fn main_is_cut_when_all_was_sent() -> Outcome {
    for channels in [0, 2] {
        let ended = Way::channels(channels).send(|destination| until_cut(destination, Stage::Finished))?;
        let error = ended.failed(false, &["commit, return path (unix:", "without SHUT"]);
        assert_eq!(error.kind(), ErrorKind::Transport);
    }
    Ok(())
}

#[test]
fn without_a_return_path_the_end_is_the_last_byte() -> Outcome {
    for channels in [0, 2] {
        let way = Way { return_path: false, ..Way::channels(channels) };
        let ended = way.send(|destination| until_cut(destination, Stage::Finished))?;
        assert!(!ended.result?.confirmed);
    }
    Ok(())
}
