//! What a source can make a receiver use: memory within one limit, RAM and time within theirs,
//! however the source tries.

use std::time::Duration;

use multifd_tests::Outcome;
use multifd_tests::peer::command::ReceiveTrial;
use multifd_tests::peer::{Codec, Lane, Memory, Recorder, Recording, Style, devices, field};

use crate::fixture::{memory, multifd, recording, single};

/// What a receiver may have in memory beside the guest's pages that have come.
const MOST_RESIDENT: u64 = 64 << 20;

/// Main up to the end of RAM, then these bytes.
fn with_tail(bytes: Vec<u8>) -> Recording {
    let memory = memory();
    let mut recorder = Recorder::new(Style { return_path: false, ..Style::default() });
    recorder.setup(&memory);
    recorder.part(&memory, &memory.all());
    recorder.end(&memory, &[]);
    recorder.main("tail", bytes);
    recorder.recording()
}

/// Devices, and a description of this JSON.
fn described(json: &str) -> Recording {
    let len = u32::try_from(json.len()).unwrap_or(u32::MAX).to_be_bytes();
    with_tail([&devices::sections()[..], &[0, 6], &len, json.as_bytes()].concat())
}

/// An open zstd frame whose window is 2^25 bytes, and eight pages of one byte in it.
fn wide_window() -> Recording {
    let mut recording = recording(&Style { codec: Codec::Zstd, ..Style::multifd(1) });
    let block = (32_768_u32 << 3 | 1 << 1).to_le_bytes();
    let payload = recording.write("payload", 0);
    payload.clear();
    payload.extend([0x28, 0xb5, 0x2f, 0xfd, 0, (25 - 10) << 3]);
    payload.extend(&block[..3]);
    payload.push(7);
    let len = u32::try_from(payload.len()).unwrap_or(u32::MAX).to_be_bytes();
    recording.patched("packet", 0, field::PAYLOAD_LEN, &len)
}

/// Every channel of as many as there may be says that its first packet has a megabyte.
fn wide_packets() -> Recording {
    let mut memory = Memory::zero(&[("pc.ram", 400)]);
    memory.refill(&memory.all(), 6);
    let style = Style { codec: Codec::Zlib, packet_pages: 1, ..Style::multifd(200) };
    let mut recorder = Recorder::new(style);
    recorder.setup(&memory);
    recorder.part(&memory, &memory.all());
    let mut recording = recorder.finish();
    for packet in 0..200 {
        recording = recording.patched("packet", packet, field::PAYLOAD_LEN, &(1_u32 << 20).to_be_bytes());
    }
    recording
}

/// One way to make a receiver use memory.
struct Attempt {
    what: &'static str,
    /// Made when the receiver has started: what this process has in memory when it starts another
    /// counts as the other's peak.
    recording: fn() -> Recording,
    says: &'static str,
}

const ATTEMPTS: [Attempt; 6] = [
    Attempt {
        what: "devices",
        recording: || with_tail(devices::padding(100 << 20)),
        says: "device state would take",
    },
    Attempt {
        what: "parts of a description that are kept",
        recording: || {
            let parts = "{},".repeat(400_000);
            let device = format!(r#"{{"name":"d","instance_id":0,"subsections":[{parts}{{}}]}}"#);
            described(&format!(r#"{{"page_size":4096,"devices":[{device}]}}"#))
        },
        says: "the description of device state would take",
    },
    Attempt {
        what: "too many parts",
        recording: || {
            let parts = "{},".repeat(600_000);
            described(&format!(r#"{{"page_size":4096,"devices":[],"x":[{parts}{{}}]}}"#))
        },
        says: "within device state",
    },
    Attempt {
        what: "a long description",
        recording: || described(&format!(r#"{{"x":"{}"}}"#, "y".repeat(60 << 20))),
        says: "device state would take",
    },
    Attempt { what: "a window", recording: wide_window, says: "the decoder's window would take" },
    Attempt { what: "packets", recording: wide_packets, says: "the channel's buffers would take" },
];

#[test]
fn no_source_makes_a_receiver_use_more_memory_than_its_limit() -> Outcome {
    for Attempt { what, recording, says } in ATTEMPTS {
        let mut receive = ReceiveTrial::start(&["--max-memory", "32M", "--timeout", "10s"])?;
        let (ended, _) = receive.play(&recording(), |_| Ok(()))?;
        assert_eq!(ended.code, 1, "{what}: {}", ended.stderr);
        assert!(ended.stderr.contains(says), "{what}: {}", ended.stderr);
        assert!(ended.usage.peak_resident_bytes <= MOST_RESIDENT, "{what}: {:?}", ended.usage);
        assert_eq!(receive.left()?, Vec::<String>::new(), "{what}");
    }
    Ok(())
}

#[test]
fn a_sound_source_fits_into_the_limit() -> Outcome {
    for recording in [single(), multifd(), recording(&Style { codec: Codec::Zstd, ..Style::multifd(4) })] {
        let mut receive = ReceiveTrial::start(&["--max-memory", "32M", "--timeout", "20s"])?;
        let (ended, _) = receive.play(&recording, |_| Ok(()))?;
        assert_eq!(ended.code, 0, "{}", ended.stderr);
        assert!(ended.usage.peak_resident_bytes <= MOST_RESIDENT, "{:?}", ended.usage);
    }
    Ok(())
}

#[test]
fn a_guest_with_more_ram_than_allowed_is_refused_before_a_page_comes() -> Outcome {
    for (limit, says) in [
        ("36K", Some("40960 bytes of RAM in 2 blocks, limit is 36864 (see --max-ram)")),
        ("40K", None),
        ("0", None),
    ] {
        let mut receive = ReceiveTrial::start(&["--max-ram", limit, "--timeout", "20s"])?;
        let (ended, _) = receive.play(&single(), |_| Ok(()))?;
        assert_eq!(ended.code, i32::from(says.is_some()), "{limit}: {}", ended.stderr);
        assert!(ended.stderr.contains(says.unwrap_or_default()), "{limit}: {}", ended.stderr);
    }
    // More than any disk has, of which not a page is there.
    let mut memory = Memory::zero(&[("pc.ram", 1)]);
    memory.refill(&memory.all(), 1);
    let mut recorder = Recorder::new(Style { return_path: false, ..Style::default() });
    recorder.setup(&memory);
    let recording = huge(recorder.finish(), 1 << 46);
    let mut receive = ReceiveTrial::start(&["--timeout", "20s"])?;
    let (ended, _) = receive.play(&recording, |_| Ok(()))?;
    assert_eq!(ended.code, 1, "{}", ended.stderr);
    assert!(ended.stderr.contains("70368744177664 bytes of RAM in 1 blocks, limit is "), "{}", ended.stderr);
    Ok(())
}

/// The list of blocks with one of `total` bytes.
fn huge(recording: Recording, total: u64) -> Recording {
    recording.patched("total", 0, 0, &(total | 4).to_be_bytes()).patched("block", 0, 7, &total.to_be_bytes())
}

#[test]
fn a_source_that_sends_a_byte_now_and_then_ends_at_the_deadline() -> Outcome {
    let mut receive = ReceiveTrial::start(&["--deadline", "500ms"])?;
    // It stops within a page, which the timeout of a minute would wait for.
    let (ended, _) = receive.play(&single().stopped(Lane::Main, 20_000), |_| Ok(()))?;
    assert_eq!(ended.code, 1, "{}", ended.stderr);
    let says = format!("has not come whole within {:?}, the deadline", Duration::from_millis(500));
    assert!(ended.stderr.contains(&says), "{}", ended.stderr);
    assert_eq!(receive.left()?, Vec::<String>::new());
    Ok(())
}
