//! Connections, and the first bytes on them.

use multifd_engine::ErrorKind;
use multifd_tests::Outcome;
use multifd_tests::peer::{Ending, Lane, Recording, Trial};

use crate::fixture::{multifd, refused, single};

const CHANNEL_1: Lane = Lane::Channel(1);

/// As `refused`, by a destination that insists on two channels: a connection that proves nothing is
/// no channel, and the one that it was to be is missed.
fn missed<const N: usize>(cases: [(&str, Recording, &[&str]); N]) -> Outcome {
    for (done, recording, says) in cases {
        let refused = Trial::unix()?.refuses_with(&recording, says, |it| it.channels(2));
        refused.unwrap_or_else(|failure| panic!("{done}: {failure}"));
    }
    Ok(())
}

#[test]
fn first_bytes_of_strangers() -> Outcome {
    let magic = "magic 0x48545450, expected 0x5145564d (main) or 0x11223344 (channel)";
    refused([
        (
            "main's magic",
            single().patched("header", 0, 0, b"HTTP"),
            &["no main channel on unix:", "1 connection refused, the last: accept, unix:", magic],
        ),
        (
            "main's version",
            single().patched("header", 0, 7, &[2]),
            &["setup, main (unix:", "stream version: 2, expected 3"],
        ),
        (
            "a channel's version",
            multifd().patched("hello", 1, 7, &[0]),
            &["setup, unix:", "multifd version: 0, expected 1"],
        ),
    ])?;
    let refused = "1 connection refused, the last: accept, unix:";
    missed([("a channel's magic", multifd().patched("hello", 1, 0, b"HTTP"), &[refused, magic])])
}

#[test]
fn connections_that_fall_silent() -> Outcome {
    let silence = "no byte moved for 300ms, the timeout";
    refused([
        ("main without a byte", single().stopped(Lane::Main, 0), &["main channel on unix:", "within 300ms"]),
        (
            "half of main's header",
            single().stopped(Lane::Main, 6),
            &["setup, main (unix:", "waiting for the stream header at byte 0", silence],
        ),
        ("only channels", multifd().stopped(Lane::Main, 0), &["main channel on unix:", "within 300ms"]),
        (
            "no connections",
            Recording { steps: Vec::new(), ending: Ending::Wait },
            &["no main channel on unix:"],
        ),
    ])?;
    missed([
        (
            "two bytes",
            multifd().stopped(CHANNEL_1, 2),
            &["no SYNC within 300ms from", "channel 1 (never came)"],
        ),
        ("half a hello", multifd().stopped(CHANNEL_1, 30), &["channel 1 (never came)"]),
    ])
}

#[test]
fn connections_that_end_at_once() -> Outcome {
    missed([
        ("two bytes", multifd().cut(CHANNEL_1, 2), &["(never came)", "the connection ended after 2 bytes"]),
        (
            "half a hello",
            multifd().cut(CHANNEL_1, 30),
            &["(never came)", "the connection ended after 30 bytes"],
        ),
    ])?;
    refused([
        (
            "after the hello",
            multifd().cut(CHANNEL_1, 64),
            &["active, channel 1: ended after 0 of 1 sync points"],
        ),
        (
            "main's header",
            single().cut(Lane::Main, 6),
            &["the stream ended after 6 bytes, the stream header"],
        ),
    ])
}

#[test]
fn hellos_that_do_not_fit_together() -> Outcome {
    let configuration = |uuid: &[u8]| {
        let mut recording = multifd();
        let bytes = recording.write("configuration", 0);
        bytes.extend(b"\x05\x12configuration/uuid\0\0\0\x01");
        bytes.extend(uuid);
        recording
    };
    refused([
        (
            "the same number",
            multifd().patched("hello", 1, 24, &[0]),
            &["setup, unix:", "channel id 0 is taken"],
        ),
        (
            "a gap in the numbers",
            multifd().patched("hello", 1, 24, &[2]),
            &["main", "no SYNC within 300ms from", "channel 1 (never came)"],
        ),
        ("the last number", multifd().patched("hello", 1, 24, &[255]), &["channel id 255, expected 0..255"]),
        (
            "another uuid",
            multifd().patched("hello", 1, 8, &[0xab]),
            &["setup, unix:", "uuid ", "ab000000000000000000000000000000", "other channels said"],
        ),
        (
            "another uuid on main",
            configuration(&[1; 16]),
            &["setup, ", "unix:", "uuid 0", "other channels said 0"],
        ),
    ])?;
    let third = multifd().patched("hello", 1, 24, &[2]);
    let error = Trial::unix()?.refuses_with(&third, &["channel id 2, expected 0..2"], |it| it.channels(2))?;
    assert_eq!(error.kind(), ErrorKind::PeerMisbehaved);
    Ok(())
}
