//! What a destination may say, and what it may not.

use multifd_engine::ErrorKind;
use multifd_tests::Outcome;
use multifd_tests::peer::{Incoming, Stage};
use multifd_wire::{
    BlockName, CodecId, HELLO_PING, Hello, InitialPacket, PacketChecks, PageSize, RamPacket, ReturnMessage,
    header_len,
};

use crate::fixture::Way;

const STAGES: [Stage; 5] =
    [Stage::Configured, Stage::Started, Stage::Moving, Stage::RamSent, Stage::Finished];

/// Says `what` when the stream has come to `stage`, then keeps reading as long as there is
/// something.
fn says(destination: &mut Incoming, stage: Stage, what: &ReturnMessage) -> Outcome {
    destination.read_to(stage)?;
    destination.say(what);
    // The source may end at any place from here on.
    destination.read_on();
    Ok(())
}

#[test]
fn a_destination_that_failed_leaves_the_guest_here_at_any_time() -> Outcome {
    for channels in [0, 2] {
        for stage in STAGES {
            for status in [1, 5] {
                let way = Way { device_state: 1 << 20, ..Way::channels(channels) };
                let ended = way.send(|destination| says(destination, stage, &ReturnMessage::Shut(status)))?;
                let error = ended.failed(true, &["return path (unix:", "reported status"]);
                assert_eq!(error.kind(), ErrorKind::PeerAborted(status), "{stage:?}: {}", error.chain());
            }
        }
    }
    Ok(())
}

#[test]
fn a_destination_that_failed_and_hung_up_leaves_the_guest_here() -> Outcome {
    for channels in [0, 2] {
        for stage in STAGES {
            let way = Way { device_state: 1 << 20, ..Way::channels(channels) };
            let ended = way.send(|destination| {
                destination.read_to(stage)?;
                destination.say(&ReturnMessage::Shut(1));
                (0..channels).for_each(|channel| destination.cut_channel(channel));
                destination.cut_main();
                Ok(())
            })?;
            let error = ended.failed(true, &[]);
            assert_eq!(error.kind(), ErrorKind::PeerAborted(1), "{stage:?}: {}", error.chain());
        }
    }
    Ok(())
}

#[test]
fn success_before_the_guest_was_handed_over_is_none() -> Outcome {
    for channels in [0, 2] {
        for stage in [Stage::Configured, Stage::Started] {
            let ended = Way::channels(channels)
                .send(|destination| says(destination, stage, &ReturnMessage::Shut(0)))?;
            let error = ended.failed(true, &["return path (unix:", "SHUT(0)"]);
            assert_eq!(error.kind(), ErrorKind::PeerMisbehaved, "{stage:?}: {}", error.chain());
        }
    }
    Ok(())
}

#[test]
fn nonsense_is_named_and_the_guest_stays_where_it_is_known_to_be() -> Outcome {
    let nonsense: [(&[u8], &str); 6] = [
        (b"HTTP/1.1 200 OK\r\n", "return path message type: 18516"),
        (&[0, 0, 0, 0], "return path message type: 0, expected 1..=7"),
        (&[0, 1, 0, 3, 0, 0, 0], "return path message length: 3 bytes for type 1"),
        (&[0, 2, 0xff, 0xff], "65535 bytes for type 2"),
        (&[0x4d, 0x46, 0x02, 0x01], "513 bytes for type 19782"),
        (&[0, 6, 0, 4, 0, 0, 0, 9], "resume acknowledgement: 9, expected 1"),
    ];
    for (bytes, text) in nonsense {
        for (stage, may_resume) in [(Stage::Started, true), (Stage::Finished, false)] {
            let ended = Way::channels(2).send(|destination| {
                destination.read_to(stage)?;
                destination.say_bytes(bytes);
                destination.wait_for_the_end()
            })?;
            let error = ended.failed(may_resume, &["return path (unix:", text]);
            assert_eq!(error.kind(), ErrorKind::InvalidStream);
        }
    }
    Ok(())
}

#[test]
fn postcopy_is_refused_by_name() -> Outcome {
    let request =
        ReturnMessage::RequestPages { block: Some(BlockName::try_from("pc.ram")?), offset: 0, len: 4096 };
    let ended = Way::default().send(|destination| says(destination, Stage::Started, &request))?;
    let error = ended.failed(true, &["RequestPages", "no postcopy is under way"]);
    assert_eq!(error.kind(), ErrorKind::Incompatible);
    Ok(())
}

#[test]
fn what_is_allowed_at_any_time_changes_nothing() -> Outcome {
    let hello = ReturnMessage::Hello(Hello { version: 9, features: u64::MAX });
    let chatter =
        [ReturnMessage::SwitchoverAck, ReturnMessage::Pong(99), ReturnMessage::Pong(HELLO_PING), hello];
    for channels in [0, 2] {
        let ended = Way::channels(channels).send(|destination| {
            for stage in STAGES {
                destination.read_to(stage)?;
                chatter.iter().for_each(|message| destination.say(message));
            }
            // Split where it hurts.
            destination.say_bytes(&[0, 1, 0]);
            destination.say_bytes(&[4, 0, 0, 0]);
            destination.say_bytes(&[0]);
            Ok(())
        })?;
        assert!(ended.result?.confirmed);
    }
    Ok(())
}

/// How many packets on the channels have checksums, how many have none, and how many have pages
/// without a codec.
fn sealed(channels: &[Vec<u8>]) -> (usize, usize, usize) {
    let (mut with, mut without, mut plain) = (0, 0, 0);
    for channel in channels {
        let mut at = InitialPacket::LEN;
        // The last may not have been read whole.
        while let Some(header) = channel.get(at..at + header_len(PageSize::K4)) {
            let mut header = header.to_vec();
            let packet = RamPacket::parse(&header, PageSize::K4).unwrap();
            let payload = packet.payload_len();
            plain += usize::from(packet.normal_pages() > 0 && packet.flags().codec() == CodecId::NONE);
            // Whether they are right is for a destination to say.
            match PacketChecks::open(&mut header, |_| 0) {
                Ok(None) => without += 1,
                _ => with += 1,
            }
            at += header.len() + payload;
        }
    }
    (with, without, plain)
}

/// The HELLO of each version so far, as it was recorded; whether a destination of it checks
/// anything, and takes packets of different codecs.
const HELLOS: [(&[u8], bool, bool); 3] = [
    // Differences, reasons, signs of life, time of loading.
    (b"\x4d\x46\0\x0a\0\x01\0\0\0\0\0\0\0\x0f", false, false),
    // Also checksums and digests.
    (b"\x4d\x46\0\x0a\0\x01\0\0\0\0\0\0\0\xcf", true, false),
    // Also different codecs: none, zlib, zstd, lz4.
    (b"\x4d\x46\0\x0a\0\x01\0\0\0\x27\0\0\x01\xcf", true, true),
];

#[test]
fn a_destination_of_any_version_gets_what_it_knows_and_a_qemu_nothing_of_the_dialect() -> Outcome {
    for (hello, checks, mixed) in HELLOS.into_iter().chain([(&[][..], false, false)]) {
        let mut seen = (0, 0, 0, 0);
        let ended = Way { codec: "zstd", ..Way::channels(2) }.send(|destination| {
            destination.kept = Some(Vec::new());
            destination.say_bytes(hello);
            destination.read_to(Stage::Finished)?;
            let (with, without, plain) = sealed(destination.kept.as_deref().unwrap_or_default());
            seen = (with, without, plain, destination.digests());
            destination.say(&ReturnMessage::Shut(0));
            Ok(())
        })?;
        assert!(ended.result?.confirmed);
        let (with, without, plain, digests) = seen;
        assert_eq!((with > 0, digests > 0, plain > 0), (checks, checks, mixed), "{hello:?}: {seen:?}");
        // The first sync point goes before anything is known of the destination.
        assert!(without <= 2 || !checks, "{hello:?}: {seen:?}");
    }
    Ok(())
}
