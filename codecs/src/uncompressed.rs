//! The codec `none`: pages as they are.

use crate::codec::{Codec, CodecId, Decoder, Encoder};
use crate::error::{CodecError, DecodeFailed, EncodeFailed};

/// The codec `none`: the payload is the pages (docs/wire.md §8).
///
/// The engine does not call it for guest memory, which the kernel reads and writes in place. It is
/// here as the plainest example of a codec, and for callers that handle packets in private memory.
#[derive(Clone, Copy, Debug, Default)]
pub struct Uncompressed;

impl Codec for Uncompressed {
    fn id(&self) -> CodecId {
        CodecId::NONE
    }

    fn name(&self) -> &str {
        "none"
    }

    fn encoder(&self) -> Result<Box<dyn Encoder>, CodecError> {
        Ok(Box::new(CopyOut))
    }

    fn decoder(&self) -> Result<Box<dyn Decoder>, CodecError> {
        Ok(Box::new(CopyIn { dead: false }))
    }
}

struct CopyOut;

impl Encoder for CopyOut {
    fn prepare(&mut self, pages: &[u8], out: &mut Vec<u8>) -> Result<(), EncodeFailed> {
        out.extend_from_slice(pages);
        Ok(())
    }
}

struct CopyIn {
    dead: bool,
}

impl Decoder for CopyIn {
    fn recv_pages(&mut self, payload: &[u8], pages: &mut [u8]) -> Result<(), DecodeFailed> {
        if self.dead {
            return Err(DecodeFailed::Dead);
        }
        if payload.len() == pages.len() {
            pages.copy_from_slice(payload);
            return Ok(());
        }
        self.dead = true;
        let (produced, expected) = (payload.len(), pages.len());
        if produced < expected {
            Err(DecodeFailed::TooShort { produced, expected })
        } else {
            Err(DecodeFailed::TooLong { expected })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conforms() {
        crate::conformance::check(&Uncompressed);
    }

    #[test]
    fn refuses_a_byte_too_few_and_a_byte_too_many() {
        let mut pages = [0; 8];
        let few = Uncompressed.decoder().unwrap().recv_pages(&[1; 7], &mut pages).unwrap_err();
        assert_eq!(few.to_string(), "payload holds 7 bytes of pages, expected 8");
        let many = Uncompressed.decoder().unwrap().recv_pages(&[1; 9], &mut pages).unwrap_err();
        assert_eq!(many.to_string(), "payload holds more than 8 bytes of pages");
        assert_eq!(pages, [0; 8]);
    }
}
