//! Packet headers on the channels.

use std::time::Duration;

use multifd_engine::codecs::{Codecs, Zstd};
use multifd_tests::Outcome;
use multifd_tests::peer::{Codec, Lane, Recording, Step, Style, Trial, field};
use multifd_wire::DeviceStatePacket;

use crate::fixture::{multifd, recording, refused};

/// The first packet with another value in a be32 field.
fn with(at: usize, value: u32) -> Recording {
    multifd().patched("packet", 0, at, &value.to_be_bytes())
}

const CHANNEL_0: &str = "active, channel 0 (unix:";

#[test]
fn words_that_begin_a_packet() -> Outcome {
    refused([
        ("magic", with(0, 0x1122_3345), &[CHANNEL_0, "multifd magic: 0x11223345, expected 0x11223344"]),
        ("version", with(4, 2), &[CHANNEL_0, "multifd version: 2, expected 1"]),
        (
            "unknown flag",
            with(field::FLAGS, 0x80),
            &[CHANNEL_0, "packet flags: 0x80, expected bits of 0x7f only"],
        ),
        (
            "SYNC of devices",
            with(field::FLAGS, 0x41),
            &[CHANNEL_0, "0x41, expected DEVICE_STATE (0x40) alone"],
        ),
    ])
}

#[test]
fn counts() -> Outcome {
    refused([
        (
            "normal pages",
            with(field::NORMAL_PAGES, 129),
            &[CHANNEL_0, "pages in a packet: 129 and 0 zero, expected at most 128"],
        ),
        ("zero pages", with(field::ZERO_PAGES, 121), &["8 and 121 zero, expected at most 128"]),
        (
            "huge counts",
            with(field::NORMAL_PAGES, u32::MAX),
            &["4294967295 and 0 zero, expected at most 128"],
        ),
        ("huge counts that overflow", with(field::ZERO_PAGES, u32::MAX - 7), &["8 and 4294967288 zero"]),
        (
            "more than were allocated",
            with(field::PAGES_ALLOC, 7),
            &["8 and 0 zero, expected at most 7 together"],
        ),
        (
            "a huge allocation",
            with(field::PAGES_ALLOC, 12_801),
            &["pages allocated for a packet: 12801, expected at most 12800"],
        ),
    ])
}

#[test]
fn places() -> Outcome {
    let offset = |nth: usize, offset: u64| {
        multifd().patched("packet", 0, field::OFFSETS + 8 * nth, &offset.to_be_bytes())
    };
    let zero = |recording: Recording| recording.patched("packet", 0, field::ZERO_PAGES + 3, &[1]);
    let past = "pages of 4096 bytes below 0x8000 are there";
    refused([
        (
            "an offset inside a page",
            offset(3, 0x3001),
            &[CHANNEL_0, "page offset: 0x3001, expected a multiple of 4096"],
        ),
        (
            "an offset past the end",
            offset(7, 0x8000),
            &[CHANNEL_0, "offset 0x8000 in RAM block pc.ram", past],
        ),
        ("a huge offset", offset(0, !0xfff), &[CHANNEL_0, "offset 0xfffffffffffff000 in RAM block pc.ram"]),
        (
            "a zero page past the end",
            zero(offset(8, 0x9000)),
            &[CHANNEL_0, "offset 0x9000 in RAM block pc.ram", past],
        ),
        (
            "an unknown block",
            multifd().patched("packet", 0, field::BLOCK, b"xx"),
            &[CHANNEL_0, "unknown RAM block \"xx.ram\""],
        ),
        (
            "a block without a name",
            multifd().patched("packet", 0, field::BLOCK, &[0; 8]),
            &[CHANNEL_0, "block name: 0 bytes"],
        ),
        (
            "a name without an end",
            multifd().patched("packet", 0, field::BLOCK, &[b'n'; 256]),
            &[CHANNEL_0, "block name: no NUL byte"],
        ),
        (
            "a name that is no text",
            multifd().patched("packet", 0, field::BLOCK, &[0xff]),
            &[CHANNEL_0, "expected valid UTF-8"],
        ),
    ])
}

#[test]
fn payload_lengths() -> Outcome {
    let packed = |len: u32| {
        let recording = recording(&Style { codec: Codec::Zstd, ..Style::multifd(2) });
        recording.patched("packet", 0, field::PAYLOAD_LEN, &len.to_be_bytes())
    };
    let pages = "payload of uncompressed pages: ";
    refused([
        (
            "one byte less than the pages",
            with(field::PAYLOAD_LEN, 32_767),
            &[CHANNEL_0, pages, "32767, expected 32768"],
        ),
        (
            "one byte more than the pages",
            with(field::PAYLOAD_LEN, 32_769),
            &[CHANNEL_0, pages, "32769, expected 32768"],
        ),
        ("nothing", packed(0), &[CHANNEL_0, "payload of a packet: 0, expected 1..=1048576 bytes"]),
        (
            "more than 1 MiB",
            packed((1 << 20) + 1),
            &[CHANNEL_0, "payload of a packet: 1048577, expected 1..=1048576"],
        ),
        ("everything", packed(u32::MAX), &[CHANNEL_0, "payload of a packet: 4294967295"]),
    ])
}

#[test]
fn codecs_that_are_unknown_or_change() -> Outcome {
    // One channel: of two, the changed packet may well come first.
    let changed = recording(&Style::multifd(1)).patched("packet", 1, field::FLAGS + 3, &[4]);
    let one = |codec| recording(&Style::multifd(1)).patched("packet", 0, field::FLAGS + 3, &[codec]);
    refused([
        ("qpl", one(8), &[CHANNEL_0, "packet with codec 0x8 (qpl); known here: none, zlib, zstd, lz4"]),
        ("two at once", one(6), &[CHANNEL_0, "packet with codec 0x6"]),
        (
            "another one on the next packet",
            changed,
            &["active, channel ", "packet with codec 0x4 after packets with none (0x0)"],
        ),
    ])?;
    let zstd_only = |it: multifd_engine::DestinationBuilder| {
        it.codecs(Codecs::empty().with(std::sync::Arc::new(Zstd::default())))
    };
    Trial::unix()?.refuses_with(
        &multifd(),
        &["packet with codec 0x0 (none); known here: zstd"],
        zstd_only,
    )?;
    Ok(())
}

#[test]
fn device_state() -> Outcome {
    let packet = |len: u32, name: &[u8]| {
        let mut header = vec![0x11, 0x22, 0x33, 0x44, 0, 0, 0, 1, 0, 0, 0, 0x40];
        header.extend(name);
        header.resize(268, 0);
        header.extend([0; 4]);
        header.extend(len.to_be_bytes());
        multifd().inserted("packet", 0, &header)
    };
    refused([
        ("empty", packet(0, b"vfio"), &["channel 0 (unix:", "device state payload: 0, expected 1..="]),
        ("huge", packet(u32::MAX, b"vfio"), &["device state payload: 4294967295"]),
        ("of no device", packet(1, b""), &["device name: 0 bytes"]),
    ])
}

#[test]
fn more_device_state_than_fits_is_refused_before_it_comes() -> Outcome {
    // 17 channels announce 64 MiB each at the same time, and send one byte of it.
    let mut recording = recording(&Style::multifd(17));
    let announced = |lane| {
        let mut bytes = DeviceStatePacket { idstr: "vfio".to_owned(), instance_id: 0, payload_len: 64 << 20 }
            .encode()
            .to_vec();
        bytes.push(1);
        Step::Send { lane, what: "huge", bytes }
    };
    let steps = (0..17).map(|id| announced(Lane::Channel(id)));
    recording = recording.preceded("packet", 0, steps.chain([Step::Pause(Duration::from_millis(200))]));
    let taken =
        |builder: multifd_engine::DestinationBuilder| builder.device_packets(true).max_memory(1 << 30);
    Trial::unix()?.refuses_with(
        &recording,
        &["device state on channels would take", "limit is 1073741824"],
        taken,
    )?;
    // Unless they are asked for, none are taken.
    refused([(
        "17 times",
        recording,
        &["device vfio sends state over parallel channels, which is not taken here"],
    )])
}

#[test]
fn device_state_cannot_be_kept_in_a_checkpoint() -> Outcome {
    let memory = crate::fixture::memory();
    let mut recorder = multifd_tests::peer::Recorder::new(Style::multifd(1));
    recorder.setup(&memory);
    recorder.part(&memory, &memory.all());
    recorder.device_packet(0, "0000:00:05.0/vfio", &[1; 100]);
    recorder.end(&memory, &[]);
    let recording = recorder.finish();
    let says = "device 0000:00:05.0/vfio sent state over channels, a checkpoint cannot hold that";
    Trial::unix()?.refuses_with(&recording, &[says], |builder| builder.device_packets(true))?;
    let says = "device 0000:00:05.0/vfio sends state over parallel channels, which is not taken here";
    refused([("vfio", recording, &[says])])
}
