//! Streams that end, or fall silent, where they should not.

use multifd_engine::ErrorKind;
use multifd_tests::peer::{Codec, Lane, Memory, PAGE, Recorder, Recording, Style, Trial};
use multifd_tests::{Failure, Outcome};
use multifd_wire::InitialPacket;

use crate::fixture::{multifd, recording, refused};

/// Cuts `lane` at each of `places`. `Ok` is allowed only at those in `good`.
fn cut_at(
    recording: &Recording,
    lane: Lane,
    places: impl IntoIterator<Item = usize>,
    good: &[usize],
) -> Outcome {
    // One folder for all: a migration that fails leaves nothing in it.
    let trial = Trial::unix()?;
    for at in places {
        let cut = recording.clone().cut(lane, at);
        if good.contains(&at) {
            Trial::unix()?
                .write_checkpoint(&cut)?
                .result
                .unwrap_or_else(|error| panic!("{at}: {}", error.chain()));
            continue;
        }
        let error =
            trial.refuses(&cut, &[]).map_err(|failure| Failure::new(format!("cut at {at}: {failure}")))?;
        assert!(expected(lane, at).contains(&error.kind()), "cut at {at}: {}", error.chain());
    }
    Ok(())
}

/// A cut within what proves a connection to be main or a channel makes a stranger of it: main is
/// waited for until the timeout, and without a channel a sync point or pages never come. Every
/// other cut is seen at once.
fn expected(lane: Lane, at: usize) -> &'static [ErrorKind] {
    match (lane, at) {
        (Lane::Main, 0..4) => &[ErrorKind::Deadline],
        (Lane::Channel(_), 0..InitialPacket::LEN) => &[ErrorKind::Deadline, ErrorKind::PeerMisbehaved],
        _ => &[ErrorKind::Transport],
    }
}

/// A guest of one page, with a record of each kind: about 1 KiB, but for the page.
fn tiny(style: Style) -> (Recording, Memory) {
    let mut memory = Memory::zero(&[("pc.ram", 1)]);
    let all = memory.all();
    let mut recorder = Recorder::new(style);
    recorder.setup(&memory);
    recorder.part(&memory, &all);
    memory.set(all[0], &[b"a page that compresses ".repeat(200), vec![1; 20]].concat()[..PAGE]);
    recorder.part(&memory, &all);
    memory.touch(&all, 3);
    recorder.end(&memory, &all);
    (recorder.finish(), memory)
}

/// Where a stream may end without a vmdescription, and with it.
fn good_ends(recording: &Recording) -> [usize; 2] {
    let boundaries = recording.boundaries(Lane::Main);
    [boundaries[boundaries.len() - 2], boundaries[boundaries.len() - 1]]
}

#[test]
fn main_alone_ends_at_every_byte() -> Outcome {
    let (recording, _) = tiny(Style { xbzrle: true, return_path: false, ..Style::default() });
    let [eof, end] = good_ends(&recording);
    assert!((4500..6000).contains(&end), "{end} bytes");
    let page = recording.boundaries(Lane::Main)[..recording.position("content", 0)].to_vec();
    let page = *page.last().unwrap()..page.last().unwrap() + PAGE;
    // Within the page, every 64th byte is enough.
    let places = (0..=end).filter(|at| !page.contains(at) || at % 64 < 2);
    cut_at(&recording, Lane::Main, places, &[eof, end])
}

#[test]
fn main_of_parallel_channels_ends_at_every_byte() -> Outcome {
    let (recording, _) = tiny(Style { return_path: false, ..Style::multifd(2) });
    let [eof, end] = good_ends(&recording);
    assert!(end < 1500, "{end} bytes");
    cut_at(&recording, Lane::Main, 0..=end, &[eof, end])
}

#[test]
fn a_channel_ends_anywhere() -> Outcome {
    for codec in [Codec::None, Codec::Zlib, Codec::Zstd] {
        let recording = recording(&Style { codec, ..Style::multifd(2) });
        for lane in [Lane::Channel(0), Lane::Channel(1)] {
            let boundaries = recording.boundaries(lane);
            let end = *boundaries.last().unwrap();
            let near = boundaries.iter().flat_map(|at| [at - 1, *at, at + 1]).filter(|at| *at < end);
            let every = (1..end).step_by(if codec == Codec::None { 1021 } else { 127 });
            cut_at(&recording, lane, near.chain(every), &[])?;
        }
    }
    Ok(())
}

#[test]
fn a_channel_that_was_cut_is_named_with_the_place() -> Outcome {
    let channel = |at| multifd().cut(Lane::Channel(1), at);
    let (hello, sync) = (64, 64 + 1344);
    refused([
        ("in the hello", channel(32), &["pages of RAM block", "never came"]),
        ("before its first SYNC", channel(hello), &["channel 1: ended after 0 of 1 sync points"]),
        ("in a SYNC", channel(hello + 500), &["channel 1 (unix:", "receiving the rest of a packet header"]),
        ("after its first SYNC", channel(sync), &["channel 1: ended after 1 of 2 sync points"]),
        ("in the first word", channel(sync + 3), &["channel 1 (unix:", "rest of a packet header (9 bytes)"]),
        ("after a header", channel(sync + 1344), &["channel 1 (unix:", "receiving 8192 bytes of pages"]),
        ("in the pages", channel(sync + 1344 + 5000), &["channel 1 (unix:", "receiving 8192 bytes of pages"]),
    ])
}

#[test]
fn a_channel_that_falls_silent_is_named_with_what_is_missing() -> Outcome {
    let silent = |at| multifd().stopped(Lane::Channel(1), at);
    let (hello, sync) = (64, 64 + 1344);
    let missing = "no SYNC within 300ms from channel 1";
    refused([
        ("before its first SYNC", silent(hello), &["active, main", missing]),
        (
            "in the first word",
            silent(sync + 3),
            &["channel 1 (unix:", "rest of a packet header (9 bytes)", "timeout"],
        ),
        ("in a header", silent(sync + 100), &["channel 1 (unix:", "rest of a packet header", "timeout"]),
        ("between packets", silent(sync), &["active, main", missing]),
    ])
}

#[test]
fn main_that_falls_silent_is_named_with_the_place() -> Outcome {
    let recording = multifd();
    let boundaries = recording.boundaries(Lane::Main);
    for at in [8, boundaries[3], boundaries[7], boundaries[boundaries.len() - 4]] {
        let error = Trial::unix()?
            .refuses(&recording.clone().stopped(Lane::Main, at), &["main (unix:", "at byte"])?;
        assert_eq!(error.kind(), ErrorKind::Deadline, "{}", error.chain());
    }
    Ok(())
}
