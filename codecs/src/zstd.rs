//! The codec `zstd`: one continuous zstd frame per channel, a flush at the end of each packet.

use zstd::zstd_safe::zstd_sys::ZSTD_EndDirective;
use zstd::zstd_safe::{self, CCtx, CParameter, DCtx, DParameter, InBuffer, OutBuffer};

use crate::codec::{Codec, CodecId, Decoder, Encoder};
use crate::error::{CodecError, DecodeFailed, EncodeFailed};
use crate::level::{LevelOutOfRange, ZstdLevel};

/// The codec `zstd` (docs/wire.md §8).
///
/// Memory per channel to send: 1.3 MiB at level 1, 15 MiB at 9, 90 MiB at 19, 200 MiB at 20. To
/// receive: 0.5 MiB and the window that the sender's frame asks for (0.5 MiB at level 1, 32 MiB at
/// 20), at most 2^[`WINDOW_LOG_MAX`] bytes.
#[derive(Clone, Copy, Debug, Default)]
pub struct Zstd(ZstdLevel);

/// Largest window that is accepted, as a power of two: 32 MiB, which level 20 needs, the highest
/// that QEMU and we have. zstd's own limit of 2^27 is of use to an attacker only.
pub const WINDOW_LOG_MAX: u32 = 25;

impl Zstd {
    /// zstd at this level, 0..=20. The level matters to the sender only.
    ///
    /// # Errors
    /// `level` is out of range.
    pub fn level(level: impl Into<i32>) -> Result<Self, LevelOutOfRange> {
        ZstdLevel::new(level).map(Self)
    }
}

impl From<ZstdLevel> for Zstd {
    fn from(level: ZstdLevel) -> Self {
        Self(level)
    }
}

impl Codec for Zstd {
    fn id(&self) -> CodecId {
        CodecId::ZSTD
    }

    fn name(&self) -> &str {
        "zstd"
    }

    fn encoder(&self) -> Result<Box<dyn Encoder>, CodecError> {
        let failed = |reason: &'static str| CodecError::encoder("zstd", reason);
        let mut context = CCtx::try_create().ok_or_else(|| failed("no memory for a context"))?;
        context
            .set_parameter(CParameter::CompressionLevel(self.0.value().into()))
            .map_err(|code| failed(zstd_safe::get_error_name(code)))?;
        Ok(Box::new(Compressor { context, dead: false }))
    }

    fn decoder(&self) -> Result<Box<dyn Decoder>, CodecError> {
        let failed = |reason: &'static str| CodecError::decoder("zstd", reason);
        let mut context = DCtx::try_create().ok_or_else(|| failed("no memory for a context"))?;
        context
            .set_parameter(DParameter::WindowLogMax(WINDOW_LOG_MAX))
            .map_err(|code| failed(zstd_safe::get_error_name(code)))?;
        Ok(Box::new(Decompressor { context, dead: false }))
    }

    fn describe(&self) -> String {
        format!("zstd:{}", self.0.value())
    }
}

struct Compressor {
    context: CCtx<'static>,
    dead: bool,
}

impl Compressor {
    /// `room` is the space to start with, in bytes. Where it is too small, more is made.
    fn compress(&mut self, pages: &[u8], out: &mut Vec<u8>, mut room: usize) -> Result<(), EncodeFailed> {
        let mut input = InBuffer::around(pages);
        loop {
            out.reserve(room);
            let start = out.len();
            let mut output = OutBuffer::around_pos(out, start);
            let pending = self
                .context
                .compress_stream2(&mut output, &mut input, ZSTD_EndDirective::ZSTD_e_flush)
                .map_err(|code| EncodeFailed::library(zstd_safe::get_error_name(code)))?;
            if pending == 0 && input.pos() == pages.len() {
                return Ok(());
            }
            room = pending + 4096;
        }
    }
}

impl Encoder for Compressor {
    fn prepare(&mut self, pages: &[u8], out: &mut Vec<u8>) -> Result<(), EncodeFailed> {
        if self.dead {
            return Err(EncodeFailed::Dead);
        }
        if pages.is_empty() {
            return Ok(());
        }
        let start = out.len();
        // The bound of a frame of its own, and something for what is left of the block before.
        let room = zstd_safe::compress_bound(pages.len()) + 64;
        self.compress(pages, out, room).inspect_err(|_| {
            out.truncate(start);
            self.dead = true;
        })
    }
}

/// What the library wants next when a payload ended at a block boundary of an open frame: a block
/// header of 3 bytes. (Within a frame header it wants at least 4, within a block the rest of it and
/// the next block header.)
const NEXT_BLOCK: usize = 3;

struct Decompressor {
    context: DCtx<'static>,
    dead: bool,
}

impl Decompressor {
    fn decompress(&mut self, payload: &[u8], pages: &mut [u8]) -> Result<(), DecodeFailed> {
        let expected = pages.len();
        if expected == 0 && payload.is_empty() {
            return Ok(());
        }
        let mut input = InBuffer::around(payload);
        let (produced, mut wanted) = self.fill(&mut input, pages)?;
        if produced < expected {
            return Err(DecodeFailed::TooShort { produced, expected });
        }
        // The library may hold back output for which there was no space, unless it has just
        // completed a frame.
        if wanted != 0 || input.pos() < payload.len() {
            let (excess, then_wanted) = self.fill(&mut input, &mut [0])?;
            if excess > 0 {
                return Err(DecodeFailed::TooLong { expected });
            }
            wanted = then_wanted;
        }
        if input.pos() < payload.len() {
            return Err(DecodeFailed::Unread { unread: payload.len() - input.pos(), payload: payload.len() });
        }
        if wanted != 0 && wanted != NEXT_BLOCK {
            return Err(DecodeFailed::Unfinished { payload: payload.len() });
        }
        Ok(())
    }

    /// Decompresses until `input` is used up or `pages` is full; the bytes written, and what the
    /// library wants next (0 at the end of a frame).
    fn fill(&mut self, input: &mut InBuffer<'_>, pages: &mut [u8]) -> Result<(usize, usize), DecodeFailed> {
        let mut output = OutBuffer::around(pages);
        loop {
            let before = (input.pos(), output.pos());
            let wanted = self
                .context
                .decompress_stream(&mut output, input)
                .map_err(|code| DecodeFailed::corrupt(zstd_safe::get_error_name(code)))?;
            // A call ends at the end of each frame, so one is not always enough.
            let done = input.pos() == input.src.len() || output.pos() == output.capacity();
            if done || (input.pos(), output.pos()) == before {
                return Ok((output.pos(), wanted));
            }
        }
    }
}

impl Decoder for Decompressor {
    fn recv_pages(&mut self, payload: &[u8], pages: &mut [u8]) -> Result<(), DecodeFailed> {
        if self.dead {
            return Err(DecodeFailed::Dead);
        }
        self.decompress(payload, pages).inspect_err(|_| self.dead = true)
    }

    fn memory(&self) -> usize {
        self.context.sizeof()
    }
}

#[cfg(test)]
mod tests;
