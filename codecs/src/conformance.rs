//! The rules of a codec, as a function that tries them. The codecs of this crate and foreign ones
//! go through the same.
//!
//! Call it from a test of your codec:
//!
//! ```
//! use multifd_codecs::{Zstd, conformance};
//!
//! conformance::check(&Zstd::default());
//! ```

mod batches;

use crate::codec::{Codec, Decoder, Encoder, MAX_BATCH_LEN, MAX_PAYLOAD_LEN};
use crate::conformance::batches::{Fill, PAGE_LEN};
use crate::error::DecodeFailed;

/// Tries every rule that [`Codec`], [`Encoder`] and [`Decoder`] state. It takes about a second in
/// an optimised build.
///
/// # Panics
/// At the first rule that `codec` breaks, with the rule and what was seen instead.
pub fn check(codec: &dyn Codec) {
    for (_, check) in CHECKS {
        check(codec);
    }
}

type Check = fn(&dyn Codec);

/// Each with its name. For each there is a codec that only it finds wrong (`tests.rs`).
const CHECKS: [(&str, Check); 8] = [
    ("names_are_for_people", names_are_for_people),
    ("no_pages_need_no_payload", no_pages_need_no_payload),
    ("every_batch_comes_back", every_batch_comes_back),
    ("streams_are_long", streams_are_long),
    ("channels_are_independent", channels_are_independent),
    ("wrong_page_counts_are_refused", wrong_page_counts_are_refused),
    ("wrong_lengths_are_refused", wrong_lengths_are_refused),
    ("damage_is_contained", damage_is_contained),
];

fn names_are_for_people(codec: &dyn Codec) {
    let (name, described) = (codec.name(), codec.describe());
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-' || byte == b'_';
    assert!(!name.is_empty() && name.bytes().all(plain), "name {name:?}: expected lower case and no spaces");
    assert!(described.starts_with(name), "description {described:?}: expected {name:?} at its start");
}

fn no_pages_need_no_payload(codec: &dyn Codec) {
    let mut channel = Channel::open(codec);
    for _ in 0..2 {
        let payload = channel.send(&[]);
        assert!(payload.is_empty(), "no pages gave a payload of {} bytes", payload.len());
        channel.recv(&payload, &[], "no pages");
        let batch = Fill::Text.batch(1, 1);
        channel.pass(&batch, "one page after no pages");
    }
}

/// Each as the first packet of a stream, with nothing in the history.
fn every_batch_comes_back(codec: &dyn Codec) {
    for fill in Fill::ALL {
        for pages in [1, 2, 3, 16, 127, MAX_BATCH_LEN / PAGE_LEN] {
            Channel::open(codec)
                .pass(&fill.batch(pages, 7), &format!("first packet, {pages} pages of {fill:?}"));
        }
    }
}

fn streams_are_long(codec: &dyn Codec) {
    let mut channel = Channel::open(codec);
    for packet in 0..200 {
        let fill = Fill::ALL.into_iter().cycle().nth(packet).unwrap_or(Fill::Zero);
        let pages = 1 + packet * 37 % 13;
        // Every other batch is one that was there before.
        let seed = if packet % 2 == 0 { 1 } else { packet as u64 };
        channel.pass(&fill.batch(pages, seed), &format!("packet {packet}, {pages} pages of {fill:?}"));
    }
}

fn channels_are_independent(codec: &dyn Codec) {
    let mut channels = [Channel::open(codec), Channel::open(codec), Channel::open(codec)];
    for packet in 0..6 {
        for (seed, channel) in (10..).zip(&mut channels) {
            channel.pass(&Fill::Text.batch(2, seed + packet), "three channels in turn");
        }
    }
}

fn wrong_page_counts_are_refused(codec: &dyn Codec) {
    for (fill, history) in Fill::ALL.into_iter().flat_map(|fill| [(fill, 0), (fill, 2)]) {
        for wrong in [0, 1, 2, 4, 5, 128] {
            let (mut channel, payload) = Channel::with_history(codec, history, &fill.batch(3, 5));
            channel.refuse(&payload, wrong * PAGE_LEN, &format!("3 pages of {fill:?} taken for {wrong}"));
        }
        for wrong in [3 * PAGE_LEN - 1, 3 * PAGE_LEN + 1] {
            let (mut channel, payload) = Channel::with_history(codec, history, &fill.batch(3, 5));
            channel.refuse(&payload, wrong, &format!("3 pages of {fill:?} taken for {wrong} bytes"));
        }
    }
}

fn wrong_lengths_are_refused(codec: &dyn Codec) {
    for (fill, history) in Fill::ALL.into_iter().flat_map(|fill| [(fill, 0), (fill, 2)]) {
        let batch = fill.batch(2, 6);
        let len = Channel::with_history(codec, history, &batch).1.len();
        // The ends in full, as that is where headers and flushes are, and samples of what is
        // between.
        let cuts = (0..len).filter(|&cut| cut < 24 || len - cut < 24 || cut % 509 == 0);
        for cut in cuts {
            let (mut channel, payload) = Channel::with_history(codec, history, &batch);
            let cut_off = payload.get(..cut).unwrap_or_default();
            let what = format!("first {cut} of {len} payload bytes, 2 pages of {fill:?}");
            channel.refuse(cut_off, batch.len(), &what);
        }
        for extra in [0x00, 0x01, 0x55, 0x78, 0xff] {
            let (mut channel, mut payload) = Channel::with_history(codec, history, &batch);
            payload.push(extra);
            let what = format!("payload with {extra:#04x} after its end, 2 pages of {fill:?}");
            channel.refuse(&payload, batch.len(), &what);
        }
    }
}

/// A codec need not see that a bit has flipped, but it must neither panic nor write elsewhere, nor
/// go on after an error.
fn damage_is_contained(codec: &dyn Codec) {
    for fill in Fill::ALL {
        let batch = fill.batch(2, 8);
        let len = Channel::with_history(codec, 1, &batch).1.len();
        for position in (0..len).filter(|&at| at < 48 || len - at < 48 || at % 211 == 0) {
            for bit in [0, 3, 7] {
                let (mut channel, mut payload) = Channel::with_history(codec, 1, &batch);
                payload.iter_mut().skip(position).take(1).for_each(|byte| *byte ^= 1 << bit);
                channel.survive(
                    &payload,
                    batch.len(),
                    &format!("bit {bit} of payload byte {position} flipped"),
                );
            }
        }
    }
}

/// Both halves of a codec, as if a channel were between them.
struct Channel {
    encoder: Box<dyn Encoder>,
    decoder: Box<dyn Decoder>,
}

impl Channel {
    fn open(codec: &dyn Codec) -> Self {
        let encoder = codec.encoder().unwrap_or_else(|error| panic!("encoder() failed: {error:?}"));
        let decoder = codec.decoder().unwrap_or_else(|error| panic!("decoder() failed: {error:?}"));
        Self { encoder, decoder }
    }

    /// A channel that `packets` packets have gone through, and the payload of the next one, of
    /// `batch`.
    fn with_history(codec: &dyn Codec, packets: u64, batch: &[u8]) -> (Self, Vec<u8>) {
        let mut channel = Self::open(codec);
        for packet in 0..packets {
            channel.pass(&Fill::Text.batch(1, packet), "history");
        }
        let payload = channel.send(batch);
        (channel, payload)
    }

    fn pass(&mut self, batch: &[u8], what: &str) {
        let payload = self.send(batch);
        self.recv(&payload, batch, what);
    }

    /// Encodes into a buffer that has something in it, and sees that this is left alone.
    fn send(&mut self, batch: &[u8]) -> Vec<u8> {
        const BEFORE: &[u8] = b"not yours";
        let mut out = BEFORE.to_vec();
        let sent = self.encoder.prepare(batch, &mut out);
        sent.unwrap_or_else(|error| panic!("prepare() of {} bytes failed: {error:?}", batch.len()));
        assert!(out.starts_with(BEFORE), "prepare() touched what was in `out` before");
        let payload = out.split_off(BEFORE.len());
        assert!(
            payload.len() <= MAX_PAYLOAD_LEN,
            "payload of {} bytes for {} bytes of pages, limit is {MAX_PAYLOAD_LEN}",
            payload.len(),
            batch.len()
        );
        payload
    }

    fn recv(&mut self, payload: &[u8], batch: &[u8], what: &str) {
        let (received, pages) = self.decode(payload, batch.len(), what);
        received.unwrap_or_else(|error| panic!("{what}: refused: {error:?}"));
        assert!(pages == batch, "{what}: the pages came back changed");
    }

    /// The decoder has to refuse this payload, and everything from then on.
    fn refuse(&mut self, payload: &[u8], len: usize, what: &str) {
        assert!(self.decode(payload, len, what).0.is_err(), "{what}: accepted, expected an error");
        self.is_dead(what);
    }

    /// The decoder may do with this payload what it likes, within its pages.
    fn survive(&mut self, payload: &[u8], len: usize, what: &str) {
        if self.decode(payload, len, what).0.is_err() {
            self.is_dead(what);
        }
    }

    fn is_dead(&mut self, what: &str) {
        let batch = Fill::Text.batch(1, 3);
        let payload = self.send(&batch);
        let (received, _) = self.decode(&payload, batch.len(), what);
        assert!(received.is_err(), "{what}: the decoder went on after its error");
    }

    /// Decodes, and sees that only the pages are written to.
    fn decode(&mut self, payload: &[u8], len: usize, what: &str) -> (Result<(), DecodeFailed>, Vec<u8>) {
        let mut memory = Guarded::new(len);
        let received = self.decoder.recv_pages(payload, memory.pages());
        assert!(memory.is_whole(), "{what}: recv_pages() wrote outside of its pages");
        (received, memory.pages().to_vec())
    }
}

/// Pages in the middle of a larger buffer.
struct Guarded {
    memory: Vec<u8>,
    len: usize,
}

impl Guarded {
    const GUARD: [u8; 64] = [0xa5; 64];

    fn new(len: usize) -> Self {
        Self { memory: [&Self::GUARD, vec![0x5a; len].as_slice(), &Self::GUARD].concat(), len }
    }

    fn pages(&mut self) -> &mut [u8] {
        let pages = Self::GUARD.len()..Self::GUARD.len() + self.len;
        self.memory.get_mut(pages).unwrap_or_else(|| panic!("the guards are around {} bytes", self.len))
    }

    fn is_whole(&self) -> bool {
        self.memory.starts_with(&Self::GUARD) && self.memory.ends_with(&Self::GUARD)
    }
}

#[cfg(test)]
mod tests;
