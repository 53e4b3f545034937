use std::error::Error;

use super::*;
use crate::conformance::check;

const PAGE_LEN: usize = 4096;
const MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];

/// Pages of text lines that differ by `seed`, as compressible as a guest's.
fn batch(pages: usize, seed: usize) -> Vec<u8> {
    let lines =
        (0..).flat_map(|line| format!("{seed} wrote line {} of {line}\n", line * seed % 97).into_bytes());
    lines.take(pages * PAGE_LEN).collect()
}

fn encode(encoder: &mut dyn Encoder, pages: &[u8]) -> Vec<u8> {
    let mut payload = Vec::new();
    encoder.prepare(pages, &mut payload).unwrap();
    payload
}

fn decoder() -> Box<dyn Decoder> {
    Zstd::default().decoder().unwrap()
}

/// What a fresh decoder makes of a first packet.
fn first(payload: &[u8], len: usize) -> Result<Vec<u8>, DecodeFailed> {
    let mut pages = vec![0xee; len];
    decoder().recv_pages(payload, &mut pages).map(|()| pages)
}

/// One complete frame of a foreign sender.
fn frame(bytes: &[u8], level: i32, content_size: bool, checksum: bool) -> Vec<u8> {
    let mut context = CCtx::create();
    context.set_parameter(CParameter::CompressionLevel(level)).unwrap();
    context.set_parameter(CParameter::ContentSizeFlag(content_size)).unwrap();
    context.set_parameter(CParameter::ChecksumFlag(checksum)).unwrap();
    let mut out = Vec::with_capacity(zstd_safe::compress_bound(bytes.len()));
    context.compress2(&mut out, bytes).unwrap();
    out
}

/// A frame by hand, left open: one raw block in it, and a window as its descriptor says.
fn open_frame(window_descriptor: u8, block: &[u8]) -> Vec<u8> {
    let mut frame = [&MAGIC[..], &[0x00, window_descriptor]].concat();
    frame.extend(&u32::try_from(block.len() << 3).unwrap().to_le_bytes()[..3]);
    frame.extend(block);
    frame
}

#[test]
fn conforms_at_every_kind_of_level() {
    for level in [0, 1, 3, 8] {
        check(&Zstd::level(level).unwrap());
    }
}

#[test]
fn payloads_are_one_frame_with_a_flush_per_packet() {
    for level in [0, 1, 9, 20] {
        let mut encoder = Zstd::level(level).unwrap().encoder().unwrap();
        let packets: Vec<Vec<u8>> = (0..5).map(|seed| encode(&mut *encoder, &batch(3, seed))).collect();
        assert!(packets[0].starts_with(&MAGIC));
        assert_eq!(packets[0][4], 0, "no content size, no checksum, no dictionary");
        assert!(packets[0][5] >> 3 <= 25 - 10, "window within the limit");
        assert!(!packets[1].starts_with(&MAGIC));

        let sent: Vec<u8> = (0..5).flat_map(|seed| batch(3, seed)).collect();
        let mut received = Vec::with_capacity(sent.len() + 1);
        let mut output = OutBuffer::around(&mut received);
        let concatenated = packets.concat();
        let wanted = DCtx::create().decompress_stream(&mut output, &mut InBuffer::around(&concatenated));
        assert_eq!(wanted, Ok(NEXT_BLOCK), "the frame is open");
        assert!(received == sent, "level {level}");
    }
}

#[test]
fn history_reaches_back_into_earlier_packets() {
    let mut encoder = Zstd::default().encoder().unwrap();
    let page = batch(1, 3);
    let (once, again) = (encode(&mut *encoder, &page), encode(&mut *encoder, &page));
    assert!(again.len() * 4 < once.len(), "{} bytes, then {}", once.len(), again.len());
}

#[test]
fn space_grows_while_the_flush_wants_more() {
    for room in [0, 1, 7, 100, 4095, 9000] {
        let mut channel = Compressor { context: CCtx::create(), dead: false };
        let pages = batch(128, room);
        let mut payload = Vec::new();
        channel.compress(&pages, &mut payload, room).unwrap();
        assert!(first(&payload, pages.len()).unwrap() == pages, "room for {room}");
    }
}

#[test]
fn a_thousand_packets_in_one_stream() {
    let (mut encoder, mut decoder) = (Zstd::default().encoder().unwrap(), decoder());
    let (mut payload, mut pages) = (Vec::new(), Vec::new());
    for packet in 0..1000 {
        let sent = batch(1 + packet % 9, packet % 50);
        payload.clear();
        encoder.prepare(&sent, &mut payload).unwrap();
        pages.resize(sent.len(), 0);
        decoder.recv_pages(&payload, &mut pages).unwrap();
        assert!(pages == sent, "packet {packet}");
    }
}

#[test]
fn pages_fed_one_by_one_decode() {
    for level in [1, 3, 20] {
        let mut context = CCtx::create();
        context.set_parameter(CParameter::CompressionLevel(level)).unwrap();
        let mut decoder = decoder();
        for seed in 0..6 {
            let sent = batch(128, seed);
            let mut payload = Vec::with_capacity(1 << 20);
            let mut output = OutBuffer::around(&mut payload);
            for (index, page) in sent.chunks(PAGE_LEN).enumerate() {
                let last = index == 127;
                let directive =
                    if last { ZSTD_EndDirective::ZSTD_e_flush } else { ZSTD_EndDirective::ZSTD_e_continue };
                let left = context.compress_stream2(&mut output, &mut InBuffer::around(page), directive);
                assert!(!last || left == Ok(0));
            }
            let mut pages = vec![0; sent.len()];
            decoder.recv_pages(&payload, &mut pages).unwrap();
            assert!(pages == sent, "level {level}, packet {seed}");
        }
    }
}

#[test]
fn one_frame_per_packet_decodes() {
    let mut decoder = decoder();
    for packet in 0..1000 {
        let sent = batch(1 + packet % 4, packet);
        let level = i32::try_from(packet % 4).unwrap();
        let payload = frame(&sent, level, packet & 1 != 0, packet & 2 != 0);
        let mut pages = vec![0; sent.len()];
        decoder.recv_pages(&payload, &mut pages).unwrap();
        assert!(pages == sent, "packet {packet}");
    }
}

#[test]
fn several_frames_per_packet_decode() {
    let mut decoder = decoder();
    for packet in 0..50 {
        let sent = batch(8, packet);
        let mut payload = Vec::new();
        for (index, piece) in sent.chunks(PAGE_LEN * 3 / 2).enumerate() {
            payload.extend(frame(piece, 1, index & 1 != 0, index & 2 != 0));
            payload.extend(frame(&[], 1, index & 2 != 0, index & 1 != 0));
            // A skippable frame of three bytes.
            payload.extend([0x50, 0x2a, 0x4d, 0x18, 3, 0, 0, 0, 1, 2, 3]);
        }
        let mut pages = vec![0; sent.len()];
        decoder.recv_pages(&payload, &mut pages).unwrap();
        assert!(pages == sent, "packet {packet}");
    }
}

/// A frame may also be ended somewhere and the next one be left open.
#[test]
fn a_frame_may_follow_an_open_one_that_is_ended() {
    let sent = batch(1, 1);
    let mut decoder = decoder();
    let mut pages = vec![0; PAGE_LEN];
    decoder.recv_pages(&open_frame(0x50, &sent), &mut pages).unwrap();
    // An empty last block, and a new frame.
    let payload = [&[0x01, 0x00, 0x00], &open_frame(0x50, &sent)[..]].concat();
    pages.fill(0);
    decoder.recv_pages(&payload, &mut pages).unwrap();
    assert!(pages == sent);
}

#[test]
fn windows_end_at_their_limit() {
    let sent = batch(1, 1);
    // Descriptor: power of two less 10 in the top 5 bits, eighths of it in the others.
    let mut decoder = decoder();
    let mut pages = vec![0; PAGE_LEN];
    let before = decoder.memory();
    decoder.recv_pages(&open_frame((25 - 10) << 3, &sent), &mut pages).unwrap();
    assert!(pages == sent);
    assert!((1 << 25..1 << 26).contains(&(decoder.memory() - before)), "{}", decoder.memory());
    for descriptor in [(25 - 10) << 3 | 1, (26 - 10) << 3, (27 - 10) << 3, 0xff] {
        let error = first(&open_frame(descriptor, &sent), PAGE_LEN).unwrap_err();
        let reason = error.source().unwrap().to_string();
        assert_eq!(reason, "Frame requires too much memory for decoding", "{descriptor:#x}");
    }
}

#[test]
fn a_wrong_checksum_is_refused() {
    let sent = batch(2, 1);
    let mut payload = frame(&sent, 1, true, true);
    *payload.last_mut().unwrap() ^= 1;
    let error = first(&payload, sent.len()).unwrap_err();
    assert_eq!(error.to_string(), "payload is corrupt");
    assert_eq!(error.source().unwrap().to_string(), "Restored data doesn't match checksum");
}

/// All pages are out before the checksum. With one byte of it the library's wish looks like that
/// for a block header, so that the loss is only seen in the next packet.
#[test]
fn a_cut_checksum_is_refused_by_the_next_packet_at_the_latest() {
    let sent = batch(2, 1);
    let payload = frame(&sent, 1, true, true);
    for cut in 1..=4 {
        let (mut decoder, mut pages) = (decoder(), vec![0; sent.len()]);
        let received = decoder.recv_pages(&payload[..payload.len() - cut], &mut pages);
        assert_eq!(received.is_ok(), cut == 3, "without {cut} bytes: {received:?}");
        assert!(decoder.recv_pages(&payload, &mut pages).is_err(), "without {cut} bytes");
    }
}

#[test]
fn errors_say_what_was_seen() {
    let payload = encode(&mut *Zstd::default().encoder().unwrap(), &batch(2, 1));
    for payload in [payload, frame(&batch(2, 1), 1, true, true), frame(&batch(2, 1), 1, false, false)] {
        let few = first(&payload, 3 * PAGE_LEN).unwrap_err();
        assert_eq!(few.to_string(), "payload holds 8192 bytes of pages, expected 12288");
        let many = first(&payload, PAGE_LEN).unwrap_err();
        assert_eq!(many.to_string(), "payload holds more than 4096 bytes of pages");
    }
    let half = [&open_frame(0x50, &batch(1, 1))[..], &[0x00, 0x80]].concat();
    let unfinished = first(&half, PAGE_LEN).unwrap_err();
    assert_eq!(unfinished.to_string(), "payload of 4107 bytes stops short of the end of its last block");
    let corrupt = first(b"not zstd at all", PAGE_LEN).unwrap_err();
    assert_eq!(corrupt.to_string(), "payload is corrupt");
    assert_eq!(corrupt.source().unwrap().to_string(), "Unknown frame descriptor");
}

#[test]
fn errors_are_final() {
    let (mut encoder, mut decoder) = (Zstd::default().encoder().unwrap(), decoder());
    let payload = encode(&mut *encoder, &batch(1, 1));
    let mut pages = vec![0; PAGE_LEN];
    assert!(decoder.recv_pages(b"nonsense", &mut pages).is_err());
    let error = decoder.recv_pages(&payload, &mut pages).unwrap_err();
    assert_eq!(error.to_string(), "decoder used after it failed");

    let mut dead = Compressor { context: CCtx::create(), dead: true };
    assert!(matches!(dead.prepare(&[0; PAGE_LEN], &mut Vec::new()), Err(EncodeFailed::Dead)));
}
