//! Connections, and the first bytes on them.

use std::time::Duration;

use multifd_engine::ErrorKind;
use multifd_tests::Outcome;
use multifd_tests::peer::{Ending, Lane, Recording, Step, Trial};

use crate::fixture::{multifd, refused, single};

const CHANNEL_1: Lane = Lane::Channel(1);
const STRANGER: Lane = Lane::Channel(9);

/// Enough for the destination to have seen what came before.
const MOMENT: Step = Step::Pause(Duration::from_millis(150));

fn says(lane: Lane, bytes: &[u8]) -> Step {
    Step::Send { lane, what: "strange", bytes: bytes.to_vec() }
}

#[test]
fn first_bytes_that_belong_to_nobody() -> Outcome {
    let magic = "magic 0x48545450, expected 0x5145564d (main) or 0x11223344 (channel)";
    refused([
        ("a channel's magic", multifd().patched("hello", 1, 0, b"HTTP"), &["accept, unix:", magic]),
        ("main's magic", single().patched("header", 0, 0, b"HTTP"), &["accept, unix:", magic]),
        ("a stranger", single().preceded("part", 0, [says(STRANGER, b"HTTP/1.1"), MOMENT]), &[magic]),
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
    ])
}

#[test]
fn connections_that_fall_silent() -> Outcome {
    let quiet = "the connection said nothing for 30";
    let silence = "no byte moved for 300ms, the silence limit";
    refused([
        ("no byte at all", multifd().connecting([STRANGER]), &["accept, unix:", quiet]),
        ("two bytes", multifd().stopped(CHANNEL_1, 2), &["accept, unix:", quiet]),
        (
            "half a hello",
            multifd().stopped(CHANNEL_1, 30),
            &["setup, unix:", "receiving the initial packet (64 bytes)", silence],
        ),
        ("main without a byte", single().stopped(Lane::Main, 0), &["main channel on unix:", "within 300ms"]),
        (
            "half of main's header",
            single().stopped(Lane::Main, 6),
            &["setup, main (unix:", "waiting for the stream header at byte 0", silence],
        ),
        ("only channels", multifd().stopped(Lane::Main, 0), &["main channel on unix:", "within 300ms"]),
        ("nobody", Recording { steps: Vec::new(), ending: Ending::Wait }, &["no main channel on unix:"]),
    ])
}

#[test]
fn connections_that_end_at_once() -> Outcome {
    refused([
        ("two bytes", multifd().cut(CHANNEL_1, 2), &["the connection ended after 2 bytes"]),
        (
            "half a hello",
            multifd().cut(CHANNEL_1, 30),
            &["receiving the initial packet", "end of stream after 30 of 64 bytes"],
        ),
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
        (
            "a second main",
            multifd().preceded("part", 0, [says(STRANGER, b"QEVM\0\0\0\x03"), MOMENT]),
            &["accept, unix:", "a second main channel"],
        ),
    ])?;
    let third = multifd().patched("hello", 1, 24, &[2]);
    let error = Trial::unix()?.refuses_with(&third, &["channel id 2, expected 0..2"], |it| it.channels(2))?;
    assert_eq!(error.kind(), ErrorKind::PeerMisbehaved);
    Ok(())
}

#[test]
fn a_channel_after_rounds_that_had_to_wait_for_it() -> Outcome {
    let mut hello = multifd().bytes(Lane::Channel(0));
    hello.truncate(64);
    hello[24] = 2;
    let steps = [MOMENT, says(STRANGER, &hello), MOMENT];
    refused([("late", multifd().preceded("end", 0, steps), &["channel id 2 comes after 2 sync points"])])
}
