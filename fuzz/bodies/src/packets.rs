//! The codecs' decoders, on the payloads of one channel's packets.

use multifd_codecs::{Codec, Lz4, Zlib, Zstd};

use crate::Input;

/// lz4: see [`zstd`].
pub fn lz4(input: &[u8]) {
    channel(&Lz4, input);
}

/// zlib: see [`zstd`].
pub fn zlib(input: &[u8]) {
    channel(&Zlib::default(), input);
}

/// Payloads for one decoder after the other: it writes nothing beyond the pages, and fails for good
/// once it has failed.
///
/// Input: how; then packets, each of a byte (pages: this modulo 8, and 1) and a counted payload. In
/// an even way the payloads are those bytes. In an odd one the bytes are what the pages hold, and
/// go through an encoder first.
pub fn zstd(input: &[u8]) {
    channel(&Zstd::default(), input);
}

const PAGE: usize = 4096;
const GUARD: [u8; 64] = [0xa5; 64];

fn channel(codec: &dyn Codec, input: &[u8]) {
    let mut input = Input(input);
    let mut encoder = (input.u8() % 2 == 1).then(|| codec.encoder().expect("an encoder"));
    let mut decoder = codec.decoder().expect("a decoder");
    let mut failed = false;
    while !input.is_empty() {
        let len = (usize::from(input.u8() % 8) + 1) * PAGE;
        let bytes = input.counted();
        let mut buffer = vec![0; len];
        buffer.extend(GUARD);
        let (pages, guard) = buffer.split_at_mut(len);
        let Some(encoder) = &mut encoder else {
            let decoded = decoder.recv_pages(bytes, pages);
            assert_eq!(guard, GUARD, "written beyond the pages");
            assert!(!(failed && decoded.is_ok()), "decoded after a failure");
            failed |= decoded.is_err();
            continue;
        };
        let content: Vec<u8> = bytes.iter().chain(&[0]).copied().cycle().take(len).collect();
        let mut payload = Vec::new();
        encoder.prepare(&content, &mut payload).expect("any page can be encoded");
        decoder.recv_pages(&payload, pages).expect("what was encoded can be decoded");
        assert!(pages == content, "other pages than were encoded");
        assert_eq!(guard, GUARD, "written beyond the pages");
    }
}
