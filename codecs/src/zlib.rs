//! The codec `zlib`: one continuous zlib stream per channel, a sync flush at the end of each packet.

use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};

use crate::codec::{Codec, CodecId, Decoder, Encoder};
use crate::error::{CodecError, DecodeFailed, EncodeFailed};
use crate::level::{LevelOutOfRange, ZlibLevel};

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
        let level = Compression::new(self.0.value().into());
        Ok(Box::new(Deflater { stream: Compress::new(level, true), dead: false }))
    }

    fn decoder(&self) -> Result<Box<dyn Decoder>, CodecError> {
        Ok(Box::new(Inflater { stream: Decompress::new(true), dead: false }))
    }

    fn describe(&self) -> String {
        format!("zlib:{}", self.0.value())
    }
}

/// What a sync or full flush leaves at the end of each packet: the lengths of an empty stored block.
const FLUSH_MARK: [u8; 4] = [0x00, 0x00, 0xff, 0xff];

struct Deflater {
    stream: Compress,
    dead: bool,
}

impl Deflater {
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
        // Bytes that do not compress cost 9 bits each in static Huffman codes, and less otherwise.
        let room = pages.len() + pages.len() / 8 + 64;
        self.deflate(pages, out, room).inspect_err(|_| {
            out.truncate(start);
            self.dead = true;
        })
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
        // The page bytes are there, but not all of the input need be read: the flush block at least comes
        // after them.
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

    /// Inflates until `payload` is used up or `pages` is full; what is unread, and the bytes written.
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

/// `bytes` after its first `used` ones.
fn rest(bytes: &[u8], used: u64) -> &[u8] {
    usize::try_from(used).ok().and_then(|used| bytes.get(used..)).unwrap_or_default()
}

#[cfg(test)]
mod tests;
