//! Payloads that their codec cannot make pages of.

use flate2::{Compress, Compression, FlushCompress};
use multifd_tests::Outcome;
use multifd_tests::peer::{Codec, Recording, Style, field};

use crate::fixture::{recording, refused};

/// The first payload of a channel, changed; the header says how long it is now.
fn changed(codec: Codec, change: impl FnOnce(&mut Vec<u8>)) -> Recording {
    let mut recording = recording(&Style { codec, ..Style::multifd(1) });
    let payload = recording.write("payload", 0);
    change(payload);
    let len = u32::try_from(payload.len()).unwrap();
    recording.patched("packet", 0, field::PAYLOAD_LEN, &len.to_be_bytes())
}

/// The first packet says that it has another number of pages than its payload.
fn counted(codec: Codec, pages: u8) -> Recording {
    let recording = recording(&Style { codec, ..Style::multifd(1) });
    recording.patched("packet", 0, field::NORMAL_PAGES + 3, &[pages])
}

const PACKED: [Codec; 4] =
    [Codec::Zlib, Codec::ZlibPieces, Codec::Zstd, Codec::ZstdFrames { checksum: true, content_size: true }];

#[test]
fn more_or_fewer_pages_than_the_header_says() -> Outcome {
    for codec in PACKED {
        let says: &[&str] = &["active, channel 0 (unix:", "pages do not decode"];
        refused([
            (
                "fewer",
                counted(codec, 9),
                &[says, &["payload holds 32768 bytes of pages, expected 36864"][..]].concat(),
            ),
            (
                "more",
                counted(codec, 7),
                &[says, &["payload holds more than 28672 bytes of pages"][..]].concat(),
            ),
        ])?;
    }
    Ok(())
}

#[test]
fn cut_doubled_and_damaged_payloads() -> Outcome {
    for codec in PACKED {
        let says: &[&str] = &["active, channel 0 (unix:", "pages do not decode", "payload"];
        let len = changed(codec, |_| {}).write("payload", 0).len();
        refused([
            ("cut by one byte", changed(codec, |payload| payload.truncate(len - 1)), says),
            ("cut in half", changed(codec, |payload| payload.truncate(len / 2)), says),
            ("cut to one byte", changed(codec, |payload| payload.truncate(1)), says),
            ("one byte too many", changed(codec, |payload| payload.push(0)), says),
            ("twice", changed(codec, |payload| payload.extend_from_within(..)), says),
            ("another start", changed(codec, |payload| payload[0] ^= 0x55), says),
            ("noise", changed(codec, |payload| payload.fill(0xa7)), says),
            ("zeros", changed(codec, |payload| payload.fill(0)), says),
        ])?;
    }
    Ok(())
}

#[test]
fn a_zlib_stream_must_stay_open() -> Outcome {
    let pages = [7; 8 << 12];
    let mut ended = Vec::with_capacity(1 << 16);
    Compress::new(Compression::fast(), true).compress_vec(&pages, &mut ended, FlushCompress::Finish)?;
    refused([("finished", changed(Codec::Zlib, |payload| *payload = ended), &["payload ends the stream"])])
}

#[test]
fn a_bomb_is_not_set_off() -> Outcome {
    let pages = vec![0; 64 << 20];
    let mut zlib = Vec::with_capacity(1 << 20);
    Compress::new(Compression::best(), true).compress_vec(&pages, &mut zlib, FlushCompress::Sync)?;
    let zstd = zstd::bulk::compress(&pages, 1)?;
    let says: &[&str] = &["channel 0 (unix:", "payload holds more than 32768 bytes of pages"];
    refused([
        ("zlib", changed(Codec::Zlib, |payload| *payload = zlib), says),
        ("zstd", changed(Codec::Zstd, |payload| *payload = zstd), says),
    ])
}
