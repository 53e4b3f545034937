use std::error::Error;

use super::*;
use crate::conformance::check;

const PAGE_LEN: usize = 4096;

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

/// What a fresh decoder makes of a first packet.
fn first(payload: &[u8], len: usize) -> Result<Vec<u8>, DecodeFailed> {
    let mut pages = vec![0xee; len];
    Zlib::default().decoder().unwrap().recv_pages(payload, &mut pages).map(|()| pages)
}

/// One call of a foreign sender's compressor, with as much space as it wants.
fn deflated(stream: &mut Compress, bytes: &[u8], flush: FlushCompress) -> Vec<u8> {
    let mut out = Vec::with_capacity(1 << 20);
    stream.compress_vec(bytes, &mut out, flush).unwrap();
    out
}

#[test]
fn conforms_at_every_kind_of_level() {
    for level in [0, 1, 2, 6, 9] {
        check(&Zlib::level(level).unwrap());
    }
}

#[test]
fn payloads_are_one_stream_with_a_flush_per_packet() {
    for level in 0..=9 {
        let mut encoder = Zlib::level(level).unwrap().encoder().unwrap();
        let packets: Vec<Vec<u8>> = (0..5).map(|seed| encode(&mut *encoder, &batch(3, seed))).collect();
        assert_eq!(packets[0][0], 0x78, "deflate with a window of 15 bits");
        assert!(packets.iter().all(|packet| packet.ends_with(&FLUSH_MARK)), "level {level}");

        let sent: Vec<u8> = (0..5).flat_map(|seed| batch(3, seed)).collect();
        let mut received = Vec::with_capacity(sent.len() + 1);
        let mut plain = Decompress::new(true);
        plain.decompress_vec(&packets.concat(), &mut received, FlushDecompress::Sync).unwrap();
        assert!(received == sent, "level {level}");
    }
}

#[test]
fn history_reaches_back_into_earlier_packets() {
    let mut encoder = Zlib::default().encoder().unwrap();
    let page = batch(1, 3);
    let (once, again) = (encode(&mut *encoder, &page), encode(&mut *encoder, &page));
    assert!(again.len() * 3 < once.len(), "{} bytes, then {}", once.len(), again.len());
}

#[test]
fn space_grows_while_the_flush_wants_more() {
    for room in [0, 1, 7, 100, 4095, 9000] {
        let mut channel = Deflater::new(ZlibLevel::default());
        let pages = batch(128, room);
        let mut payload: Vec<u8> = channel.header.take().into_iter().flatten().collect();
        channel.deflate(&pages, &mut payload, room).unwrap();
        assert!(payload.ends_with(&FLUSH_MARK));
        assert!(first(&payload, pages.len()).unwrap() == pages, "room for {room}");
    }
}

/// Pages of text and pages that look random, in every order that a packet may have.
#[test]
fn stored_pages_and_compressed_ones_are_one_stream() {
    let random = |seed: usize| -> Vec<u8> {
        let hash = |at: usize| (at + seed * PAGE_LEN).wrapping_mul(0x9e37_79b9_7f4a_7c15) as u64 >> 56;
        (0..PAGE_LEN).map(|at| u8::try_from(hash(at)).unwrap()).collect()
    };
    for level in [1, 6, 9] {
        let zlib = Zlib::level(level).unwrap();
        let (mut encoder, mut decoder) = (zlib.encoder().unwrap(), zlib.decoder().unwrap());
        for kinds in 0..256_usize {
            let page = |at: usize| if kinds >> at & 1 == 1 { random(kinds + at) } else { batch(1, at) };
            // 17 pages of a kind at the end: more than one stored block.
            let sent: Vec<u8> = (0..8).chain([7; 16]).flat_map(page).collect();
            let payload = encode(&mut *encoder, &sent);
            assert!(payload.ends_with(&FLUSH_MARK));
            let stored = (kinds.count_ones() as usize + (kinds >> 7) * 16) * PAGE_LEN;
            assert!(payload.len() < stored + (sent.len() - stored) / 2 + 400, "{kinds:b}: {}", payload.len());
            let mut pages = vec![0; sent.len()];
            decoder.recv_pages(&payload, &mut pages).unwrap();
            assert!(pages == sent, "level {level}, pages {kinds:b}");
        }
    }
}

#[test]
fn a_thousand_packets_in_one_stream() {
    let zlib = Zlib::default();
    let (mut encoder, mut decoder) = (zlib.encoder().unwrap(), zlib.decoder().unwrap());
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
    for level in 0..=9 {
        let mut stream = Compress::new(Compression::new(level), true);
        let mut decoder = Zlib::default().decoder().unwrap();
        for seed in 0..4 {
            let sent = batch(128, seed);
            let (last, others) = sent.split_last_chunk::<PAGE_LEN>().map(|(a, b)| (b, a)).unwrap();
            let mut payload = Vec::new();
            for page in others.chunks(PAGE_LEN) {
                payload.extend(deflated(&mut stream, page, FlushCompress::None));
            }
            payload.extend(deflated(&mut stream, last, FlushCompress::Sync));
            let mut pages = vec![0; sent.len()];
            decoder.recv_pages(&payload, &mut pages).unwrap();
            assert!(pages == sent, "level {level}, packet {seed}");
        }
    }
}

/// Packets that any worker may compress: two header bytes once, then raw deflate with a full flush
/// per packet.
#[test]
fn packets_of_a_stateless_sender_decode() {
    let mut decoder = Zlib::default().decoder().unwrap();
    for packet in 0..1000 {
        let sent = batch(1 + packet % 4, packet);
        let mut payload = if packet == 0 { vec![0x78, 0x01] } else { Vec::new() };
        let level = Compression::new(u32::try_from(packet % 10).unwrap());
        payload.extend(deflated(&mut Compress::new(level, false), &sent, FlushCompress::Full));
        let mut pages = vec![0; sent.len()];
        decoder.recv_pages(&payload, &mut pages).unwrap();
        assert!(pages == sent, "packet {packet}");
    }
}

#[test]
fn zlib_by_hand_decodes() {
    // One page of 'a': header, one stored block of 4096 bytes, the empty block of the flush.
    let mut payload = vec![0x78, 0x01, 0x00, 0x00, 0x10, 0xff, 0xef];
    payload.extend([b'a'; PAGE_LEN]);
    payload.extend([0x00, 0x00, 0x00, 0xff, 0xff]);
    assert_eq!(first(&payload, PAGE_LEN).unwrap(), [b'a'; PAGE_LEN]);
}

#[test]
fn an_ended_stream_is_refused() {
    let sent = batch(2, 1);
    let payload = deflated(&mut Compress::new(Compression::new(1), true), &sent, FlushCompress::Finish);
    let error = first(&payload, sent.len()).unwrap_err();
    assert_eq!(error.to_string(), "payload ends the stream after 8192 of 8192 bytes, it has to stay open");
    let error = first(&payload, sent.len() + PAGE_LEN).unwrap_err();
    assert_eq!(error.to_string(), "payload ends the stream after 8192 of 12288 bytes, it has to stay open");
}

#[test]
fn a_packet_without_its_flush_is_refused() {
    let sent = batch(2, 1);
    let payload = deflated(&mut Compress::new(Compression::new(1), true), &sent, FlushCompress::Partial);
    let error = first(&payload, sent.len()).unwrap_err();
    let expected = format!("payload of {} bytes stops short of the end of its last block", payload.len());
    assert_eq!(error.to_string(), expected);
}

#[test]
fn errors_say_what_was_seen() {
    let payload = encode(&mut *Zlib::default().encoder().unwrap(), &batch(2, 1));
    let few = first(&payload, 3 * PAGE_LEN).unwrap_err();
    assert_eq!(few.to_string(), "payload holds 8192 bytes of pages, expected 12288");
    let many = first(&payload, PAGE_LEN).unwrap_err();
    assert_eq!(many.to_string(), "payload holds more than 4096 bytes of pages");
    let corrupt = first(b"not zlib at all", PAGE_LEN).unwrap_err();
    assert_eq!(corrupt.to_string(), "payload is corrupt");
    assert!(corrupt.source().unwrap().to_string().contains("incorrect header check"));
    let dictionary = first(&[0x78, 0xbb, 1, 2, 3, 4, 5], PAGE_LEN).unwrap_err();
    assert!(dictionary.source().unwrap().to_string().contains("dictionary"));
}

#[test]
fn errors_are_final() {
    let zlib = Zlib::default();
    let (mut encoder, mut decoder) = (zlib.encoder().unwrap(), zlib.decoder().unwrap());
    let payload = encode(&mut *encoder, &batch(1, 1));
    let mut pages = vec![0; PAGE_LEN];
    assert!(decoder.recv_pages(b"nonsense", &mut pages).is_err());
    let error = decoder.recv_pages(&payload, &mut pages).unwrap_err();
    assert_eq!(error.to_string(), "decoder used after it failed");

    let mut dead = Deflater { dead: true, ..Deflater::new(ZlibLevel::default()) };
    assert!(matches!(dead.prepare(&[0; PAGE_LEN], &mut Vec::new()), Err(EncodeFailed::Dead)));
}

/// A page as capability `compress` sends it.
fn compressed_page(page: &[u8]) -> Vec<u8> {
    deflated(&mut Compress::new(Compression::new(1), true), page, FlushCompress::Finish)
}

#[test]
fn a_page_that_is_a_stream_of_its_own_is_inflated_whole_or_refused() {
    let random: Vec<u8> =
        (0_u32..).flat_map(|n| n.wrapping_mul(2_654_435_761).to_be_bytes()).take(PAGE_LEN).collect();
    for page in [batch(1, 3), vec![0; PAGE_LEN], random] {
        let stream = compressed_page(&page);
        let mut inflated = vec![0xee; PAGE_LEN];
        inflate_page(&stream, &mut inflated).unwrap();
        assert_eq!(inflated, page);
        for len in 0..stream.len() {
            assert!(inflate_page(&stream[..len], &mut inflated).is_err(), "{len} bytes of {}", stream.len());
        }
    }
    let mut inflated = vec![0; PAGE_LEN];
    let mut refused = |stream: &[u8]| inflate_page(stream, &mut inflated).unwrap_err();
    assert!(matches!(refused(&compressed_page(&[7; PAGE_LEN - 1])), DecodeFailed::TooShort { .. }));
    let long = refused(&compressed_page(&[7; PAGE_LEN + 1]));
    assert!(matches!(long, DecodeFailed::TooLong { .. } | DecodeFailed::Unfinished { .. }), "{long}");
    let more = [compressed_page(&[7; PAGE_LEN]), vec![0]].concat();
    assert!(matches!(refused(&more), DecodeFailed::Unread { unread: 1, .. }));
    assert!(matches!(refused(&[0; 9]), DecodeFailed::Corrupt(_)));
}
