//! How a stream ends.

use std::time::Duration;

use multifd_tests::Outcome;
use multifd_tests::peer::{Ending, Lane, Memory, Recorder, Step, Style};
use multifd_wire::ReturnMessage;

use crate::fixture::{arrives, style_arrives, trial};

#[test]
fn with_and_without_a_description_and_a_return_path() -> Outcome {
    for channels in [0, 2] {
        for return_path in [false, true] {
            for description in [false, true] {
                let mut memory = Memory::small(7);
                let style = Style { return_path, description, ..Style::multifd(channels) };
                let recording = Recorder::migration(style, &mut memory);
                let (verdict, received) = arrives(&recording, &memory)?;
                let main = recording.bytes(Lane::Main);
                assert!(main.ends_with(&received.tail), "the devices' part is kept as it came");
                assert!(received.tail.starts_with(&[4, 0, 0, 0, 0, 5]), "from the first FULL section on");
                assert_eq!(received.described, description);
                let shut = verdict.replies.last() == Some(&ReturnMessage::Shut(0));
                assert_eq!(shut, return_path, "{:?}", verdict.replies);
            }
        }
    }
    Ok(())
}

#[test]
fn channels_that_close_right_after_their_last_byte() -> Outcome {
    for (unmatched_sync, return_path) in [(false, true), (false, false), (true, true)] {
        let mut memory = Memory::small(8);
        let style = Style { unmatched_sync, return_path, ..Style::multifd(3) };
        let recording = Recorder::migration(style, &mut memory);
        let hang_up = (0..3).map(|id| Step::HangUp(Lane::Channel(id)));
        arrives(&recording.preceded("devices", 0, hang_up), &memory)?;
    }
    Ok(())
}

#[test]
fn main_that_closes_its_sending_side_never_matters_without_a_return_path() -> Outcome {
    let mut memory = Memory::small(8);
    let style = Style { return_path: false, description: false, ..Style::multifd(2) };
    let recording = Recorder::migration(style, &mut memory);
    assert_eq!(recording.ending, Ending::HangUp);
    arrives(&recording, &memory)?;
    Ok(())
}

#[test]
fn a_background_snapshot_has_no_end_of_ram() -> Outcome {
    let memory = Memory::small(9);
    let mut recorder = Recorder::new(Style { return_path: false, ..Style::default() });
    recorder.setup(&memory);
    recorder.part(&memory, &memory.all());
    let recording = recorder.finish();
    let (_, received) = arrives(&recording, &memory)?;
    assert!(received.early.is_empty() && received.tail.starts_with(&[4, 0, 0, 0, 0, 5]));
    assert!(recording.bytes(Lane::Main).ends_with(&received.tail), "the devices' part is kept as it came");
    Ok(())
}

/// A section whose payload holds its own footer, and behind it what is no item.
fn early_section(id: u8) -> Vec<u8> {
    let head = [&[4, 0, 0, 0, id][..], b"\x05early\0\0\0\0\0\0\0\x01"].concat();
    [&head[..], &[0x7e, 0, 0, 0, id, 0, 7], &[0x7e, 0, 0, 0, id]].concat()
}

#[test]
fn device_state_may_stand_anywhere_before_the_end_of_ram() -> Outcome {
    for channels in [0, 2] {
        let mut memory = Memory::small(13);
        let recording = Recorder::migration(Style::multifd(channels), &mut memory);
        let [one, two, three, four] = [101, 102, 103, 104].map(early_section);
        let recording = recording
            .inserted("start", 0, &[&one[..], &two].concat())
            .inserted("part", 0, &three)
            .inserted("end", 0, &four);
        let (_, received) = arrives(&recording, &memory)?;
        assert_eq!(received.early.before_ram, [one, two].concat());
        assert_eq!(received.early.within_ram, [three, four].concat());
        assert!(received.tail.starts_with(&[4, 0, 0, 0, 0, 5]), "from the first section behind END on");
    }
    Ok(())
}

#[test]
fn early_device_state_in_a_snapshot_without_an_end_of_ram() -> Outcome {
    let memory = Memory::small(14);
    let mut recorder = Recorder::new(Style { return_path: false, description: false, ..Style::default() });
    recorder.setup(&memory);
    recorder.part(&memory, &memory.all());
    let recording = recorder.finish().inserted("part", 0, &early_section(103));
    let (_, received) = arrives(&recording, &memory)?;
    assert_eq!(received.early.within_ram, early_section(103));
    assert!(recording.bytes(Lane::Main).ends_with(&received.tail) && !received.described);
    Ok(())
}

#[test]
fn a_source_that_hangs_up_without_waiting_for_the_word_is_no_success() -> Outcome {
    for channels in [0, 2] {
        let mut memory = Memory::small(16);
        let recording = Recorder::migration(Style::multifd(channels), &mut memory);
        let recording = multifd_tests::peer::Recording { ending: Ending::HangUp, ..recording };
        let verdict = trial()?.write_checkpoint(&recording);
        let error = verdict?.result.expect_err("the source never heard of it");
        assert!(error.channel().unwrap_or_default().starts_with("return path"), "{}", error.chain());
    }
    Ok(())
}

#[test]
fn a_pause_behind_what_looks_like_the_end_is_not_the_end() -> Outcome {
    let mut memory = Memory::small(11);
    let recording = Recorder::migration(Style::default(), &mut memory);
    // A footer and a zero within a device's state, and then nothing for a while.
    let (id, lookalike) = ([4, 0, 0, 0, 9], b"\x7e\0\0\0\x09\0");
    let head = [&id[..], b"\x04trap\0\0\0\0\0\0\0\x01", &[1; 20], lookalike].concat();
    let send = |bytes: &[u8]| Step::Send { lane: Lane::Main, what: "trap", bytes: bytes.to_vec() };
    let rest = [&[2; 20][..], b"\x7e\0\0\0\x09"].concat();
    let steps = [send(&head), Step::Pause(Duration::from_millis(300)), send(&rest)];
    let (_, received) = arrives(&recording.preceded("devices", 0, steps), &memory)?;
    assert!(received.tail.starts_with(&[&head[..], &rest].concat()) && received.described);
    Ok(())
}

#[test]
fn switchover_start_is_noted() -> Outcome {
    style_arrives(&Style { switchover_start: true, ..Style::multifd(1) })
}

#[test]
fn device_state_on_channels_is_handed_on() -> Outcome {
    let memory = Memory::small(10);
    let mut recorder = Recorder::new(Style::multifd(2));
    recorder.setup(&memory);
    recorder.part(&memory, &memory.all());
    recorder.device_packet(0, "0000:00:05.0/vfio", &[7; 3000]);
    recorder.device_packet(1, "0000:00:06.0/vfio", &[8; 1]);
    recorder.device_packet(0, "0000:00:05.0/vfio", &[9; 70_000]);
    recorder.end(&memory, &[]);
    let recording = recorder.finish();
    let (verdict, received) = trial()?.receive(&recording, &memory)?;
    verdict.result?;
    memory.check(&received.blocks)?;
    let mut packets: Vec<_> = received.packets.iter().map(|packet| (packet.data[0], packet)).collect();
    packets.sort_by_key(|(first, _)| *first);
    let seen: Vec<_> = packets
        .iter()
        .map(|(first, packet)| {
            (*first, packet.data.len(), packet.device.idstr.as_str(), packet.device.instance_id)
        })
        .collect();
    let (one, other) = ("0000:00:05.0/vfio", "0000:00:06.0/vfio");
    assert_eq!(seen, [(7, 3000, one, 3), (8, 1, other, 3), (9, 70_000, one, 3)]);
    let order: Vec<_> = received.packets.iter().filter(|packet| packet.device.idstr == one).collect();
    assert_eq!(order[0].data[0], 7, "the packets of one channel keep their order");
    Ok(())
}
