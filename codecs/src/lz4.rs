//! The codec `lz4`: each packet is one block of its own, without a history.

use lz4_flex::block::{DecompressError, compress_into, decompress_into, get_maximum_output_size};

use crate::codec::{Codec, CodecId, Decoder, Encoder};
use crate::error::{CodecError, DecodeFailed, EncodeFailed};

/// The codec `lz4` (docs/wire.md §27.9): between two multifd ends only, QEMU has none. The fastest
/// of all, and the one that saves least. Memory per channel: 16 KiB to send, none to receive.
#[derive(Clone, Copy, Debug, Default)]
pub struct Lz4;

impl Codec for Lz4 {
    fn id(&self) -> CodecId {
        CodecId::DIALECT_LZ4
    }

    fn name(&self) -> &str {
        "lz4"
    }

    fn encoder(&self) -> Result<Box<dyn Encoder>, CodecError> {
        Ok(Box::new(Pack))
    }

    fn decoder(&self) -> Result<Box<dyn Decoder>, CodecError> {
        Ok(Box::new(Unpack { dead: false }))
    }
}

struct Pack;

impl Encoder for Pack {
    fn prepare(&mut self, pages: &[u8], out: &mut Vec<u8>) -> Result<(), EncodeFailed> {
        if pages.is_empty() {
            return Ok(());
        }
        let start = out.len();
        out.resize(start + get_maximum_output_size(pages.len()), 0);
        let room = out.get_mut(start..).unwrap_or_default();
        let packed = compress_into(pages, room);
        out.truncate(start + packed.as_ref().map_or(0, |len| *len));
        packed.map(|_| ()).map_err(EncodeFailed::library)
    }
}

struct Unpack {
    dead: bool,
}

impl Unpack {
    fn unpack(payload: &[u8], pages: &mut [u8]) -> Result<(), DecodeFailed> {
        let expected = pages.len();
        if expected == 0 {
            let (unread, payload) = (payload.len(), payload.len());
            return if unread == 0 { Ok(()) } else { Err(DecodeFailed::Unread { unread, payload }) };
        }
        match decompress_into(payload, pages) {
            Ok(produced) if produced == expected => Ok(()),
            Ok(produced) => Err(DecodeFailed::TooShort { produced, expected }),
            Err(DecompressError::OutputTooSmall { .. }) => Err(DecodeFailed::TooLong { expected }),
            Err(error) => Err(DecodeFailed::corrupt(error)),
        }
    }
}

impl Decoder for Unpack {
    fn recv_pages(&mut self, payload: &[u8], pages: &mut [u8]) -> Result<(), DecodeFailed> {
        if self.dead {
            return Err(DecodeFailed::Dead);
        }
        Self::unpack(payload, pages).inspect_err(|_| self.dead = true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conforms() {
        crate::conformance::check(&Lz4);
    }

    #[test]
    fn a_packet_does_not_depend_on_those_before_it() {
        let (mut first, mut second) = (Vec::new(), Vec::new());
        let mut encoder = Lz4.encoder().unwrap();
        encoder.prepare(&[1; 8192], &mut first).unwrap();
        encoder.prepare(&[2; 4096], &mut second).unwrap();
        let mut page = [0; 4096];
        Lz4.decoder().unwrap().recv_pages(&second, &mut page).unwrap();
        assert_eq!(page, [2; 4096]);
    }

    #[test]
    fn a_block_of_another_length_is_refused() {
        let mut payload = Vec::new();
        Lz4.encoder().unwrap().prepare(&[7; 8192], &mut payload).unwrap();
        let decode = |len: usize| Lz4.decoder().unwrap().recv_pages(&payload, &mut vec![0; len]);
        assert!(matches!(decode(4096), Err(DecodeFailed::TooLong { expected: 4096 })));
        let produced = |error| matches!(error, DecodeFailed::TooShort { produced: 8192, expected: 12288 });
        assert!(produced(decode(12288).unwrap_err()));
        assert!(decode(8192).is_ok());
    }
}
