//! The codec `zlib`: one continuous zlib stream per channel, a sync flush at the end of each
//! packet.
//!
//! Pages that would not become shorter are not given to the compressor: they go as stored blocks of
//! the same stream.

use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};

use crate::codec::{Codec, CodecId, Decoder, Encoder};
use crate::error::{CodecError, DecodeFailed, EncodeFailed};
use crate::level::{LevelOutOfRange, ZlibLevel};
use crate::random::looks_random;

/// The codec `zlib` (docs/wire.md §8). Memory per channel: 340 KiB to send, 55 KiB to receive.
#[derive(Clone, Copy, Debug, Default)]
pub struct Zlib(ZlibLevel);

impl Zlib {
    /// zlib at this level, 0..=9. The level matters to the sender only.
    ///
    /// # Errors
    /// `level` is out of range.
    pub fn level(level: impl Into<i32>) -> Result<Self, LevelOutOfRange> {
        ZlibLevel::new(level).map(Self)
    }
}

impl From<ZlibLevel> for Zlib {
    fn from(level: ZlibLevel) -> Self {
        Self(level)
    }
}

impl Codec for Zlib {
    fn id(&self) -> CodecId {
        CodecId::ZLIB
    }

    fn name(&self) -> &str {
        "zlib"
    }

    fn encoder(&self) -> Result<Box<dyn Encoder>, CodecError> {
        Ok(Box::new(Deflater::new(self.0)))
    }

    fn decoder(&self) -> Result<Box<dyn Decoder>, CodecError> {
        Ok(Box::new(Inflater { stream: Decompress::new(true), dead: false }))
    }

    fn describe(&self) -> String {
        format!("zlib:{}", self.0.value())
    }
}

/// What a sync or full flush leaves at the end of each packet: the lengths of an empty stored
/// block.
const FLUSH_MARK: [u8; 4] = [0x00, 0x00, 0xff, 0xff];

/// A stored block's first byte, in a block that is not the last.
const STORED: u8 = 0x00;

/// Most bytes in a stored block, in whole pages: its length has 16 bits.
const STORED_MAX: usize = 15 * PAGE;

const PAGE: usize = 4096;

/// Writes the zlib header itself: what the compressor starts over with must not have one.
struct Deflater {
    /// Raw deflate. Its window never reaches over a stored block of ours, of which it knows
    /// nothing.
    stream: Compress,
    header: Option<[u8; 2]>,
    dead: bool,
}

impl Deflater {
    fn new(level: ZlibLevel) -> Self {
        // Deflate with a window of 15 bits; the other byte tells the level, roughly, and makes a
        // multiple of 31.
        let level_hint = match level.value() {
            0 | 1 => 0x01,
            2..=5 => 0x5e,
            6 => 0x9c,
            _ => 0xda,
        };
        let stream = Compress::new(Compression::new(level.value().into()), false);
        Self { stream, header: Some([0x78, level_hint]), dead: false }
    }

    fn packet(&mut self, pages: &[u8], out: &mut Vec<u8>) -> Result<(), EncodeFailed> {
        out.extend(self.header.take().into_iter().flatten());
        let mut stored_last = false;
        for (random, run) in runs(pages) {
            if random {
                store(run, out);
                // The decoder's window moves on by these pages, the compressor's does not: it has
                // to forget what it has seen.
                self.stream.reset();
            } else {
                // Bytes that do not compress cost 9 bits each in static Huffman codes, and less
                // otherwise.
                self.deflate(run, out, run.len() + run.len() / 8 + 64)?;
            }
            stored_last = random;
        }
        if stored_last {
            out.push(STORED);
            out.extend(FLUSH_MARK);
        }
        Ok(())
    }

    /// `room` is the space to start with, in bytes. Where it is too small, more is made.
    fn deflate(&mut self, mut pages: &[u8], out: &mut Vec<u8>, room: usize) -> Result<(), EncodeFailed> {
        out.reserve(room);
        loop {
            let before = self.stream.total_in();
            self.stream.compress_vec(pages, out, FlushCompress::Sync).map_err(EncodeFailed::library)?;
            pages = rest(pages, self.stream.total_in() - before);
            // Only with space left over is the flush complete.
            if pages.is_empty() && out.len() < out.capacity() {
                return Ok(());
            }
            out.reserve(pages.len() + 4096);
        }
    }
}

impl Encoder for Deflater {
    fn prepare(&mut self, pages: &[u8], out: &mut Vec<u8>) -> Result<(), EncodeFailed> {
        if self.dead {
            return Err(EncodeFailed::Dead);
        }
        if pages.is_empty() {
            return Ok(());
        }
        let start = out.len();
        self.packet(pages, out).inspect_err(|_| {
            out.truncate(start);
            self.dead = true;
        })
    }
}

/// Neighbouring pages of a kind: whether they look random, and their bytes.
fn runs(pages: &[u8]) -> impl Iterator<Item = (bool, &[u8])> {
    let mut rest = pages;
    std::iter::from_fn(move || {
        let random = looks_random(rest.chunks(PAGE).next()?);
        let same = rest.chunks(PAGE).take_while(|page| looks_random(page) == random);
        let (run, others) = rest.split_at(same.map(<[u8]>::len).sum());
        rest = others;
        Some((random, run))
    })
}

/// Stored blocks: a byte, the length and its complement, the bytes as they are.
fn store(pages: &[u8], out: &mut Vec<u8>) {
    for block in pages.chunks(STORED_MAX) {
        // STORED_MAX is below 2^16.
        let len = u16::try_from(block.len()).unwrap_or(u16::MAX);
        out.push(STORED);
        out.extend(len.to_le_bytes());
        out.extend((!len).to_le_bytes());
        out.extend_from_slice(block);
    }
}

struct Inflater {
    stream: Decompress,
    dead: bool,
}

impl Inflater {
    fn inflate(&mut self, payload: &[u8], pages: &mut [u8]) -> Result<(), DecodeFailed> {
        let expected = pages.len();
        if expected == 0 && payload.is_empty() {
            return Ok(());
        }
        let (unread, produced) = self.fill(payload, pages)?;
        if produced < expected {
            return Err(DecodeFailed::TooShort { produced, expected });
        }
        // The page bytes are there, but not all of the input need be read: the flush block at least
        // comes after them.
        let mut beyond = [0];
        let (unread, excess) = self.fill(unread, &mut beyond)?;
        if excess > 0 {
            return Err(DecodeFailed::TooLong { expected });
        }
        if !unread.is_empty() {
            return Err(DecodeFailed::Unread { unread: unread.len(), payload: payload.len() });
        }
        // Without the flush the next packet would start within this one's last block.
        if !payload.ends_with(&FLUSH_MARK) {
            return Err(DecodeFailed::Unfinished { payload: payload.len() });
        }
        Ok(())
    }

    /// Inflates until `payload` is used up or `pages` is full; what is unread, and the bytes
    /// written.
    fn fill<'a>(
        &mut self,
        mut payload: &'a [u8],
        pages: &mut [u8],
    ) -> Result<(&'a [u8], usize), DecodeFailed> {
        let mut produced = 0;
        loop {
            let (read, written) = (self.stream.total_in(), self.stream.total_out());
            let space = pages.get_mut(produced..).unwrap_or_default();
            let status = self
                .stream
                .decompress(payload, space, FlushDecompress::Sync)
                .map_err(DecodeFailed::corrupt)?;
            let (read, written) = (self.stream.total_in() - read, self.stream.total_out() - written);
            payload = rest(payload, read);
            produced += usize::try_from(written).unwrap_or(usize::MAX);
            if status == Status::StreamEnd {
                return Err(DecodeFailed::StreamEnded { produced, expected: pages.len() });
            }
            if read == 0 && written == 0 {
                return Ok((payload, produced));
            }
        }
    }
}

impl Decoder for Inflater {
    fn recv_pages(&mut self, payload: &[u8], pages: &mut [u8]) -> Result<(), DecodeFailed> {
        if self.dead {
            return Err(DecodeFailed::Dead);
        }
        self.inflate(payload, pages).inspect_err(|_| self.dead = true)
    }
}

/// Inflates `stream`, a zlib stream of its own, to exactly the page that it holds, as QEMU's old
/// capability `compress` sends them (docs/wire.md §5).
///
/// # Errors
/// `stream` is not whole, holds fewer or more bytes than `page` has, or has more behind its end.
pub fn inflate_page(stream: &[u8], page: &mut [u8]) -> Result<(), DecodeFailed> {
    let expected = page.len();
    let mut inflater = Decompress::new(true);
    let status = inflater.decompress(stream, page, FlushDecompress::Finish).map_err(DecodeFailed::corrupt)?;
    let produced = usize::try_from(inflater.total_out()).unwrap_or(usize::MAX);
    let unread = rest(stream, inflater.total_in()).len();
    match status {
        Status::StreamEnd if produced < expected => Err(DecodeFailed::TooShort { produced, expected }),
        Status::StreamEnd if unread > 0 => Err(DecodeFailed::Unread { unread, payload: stream.len() }),
        Status::StreamEnd => Ok(()),
        _ if unread > 0 && produced == expected => Err(DecodeFailed::TooLong { expected }),
        _ => Err(DecodeFailed::Unfinished { payload: stream.len() }),
    }
}

/// `bytes` after its first `used` ones.
fn rest(bytes: &[u8], used: u64) -> &[u8] {
    usize::try_from(used).ok().and_then(|used| bytes.get(used..)).unwrap_or_default()
}

#[cfg(test)]
mod tests;
