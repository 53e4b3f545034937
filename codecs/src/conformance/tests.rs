//! The suite is only as good as the faults that it finds.

use std::panic::{AssertUnwindSafe, catch_unwind};

use super::*;
use crate::codec::CodecId;
use crate::error::{CodecError, EncodeFailed};

/// What a copying codec does wrong.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fault {
    None,
    Capital,
    ChangesPages,
    Fails,
    GoesOn,
    NoEncoder,
    OverwritesOut,
    Padded,
    PayloadForNothing,
    SkipsExcess,
    SkipsLack,
    WritesNothing,
}

#[derive(Debug)]
struct Faulty(Fault);

impl Codec for Faulty {
    fn id(&self) -> CodecId {
        CodecId::new(0x3e).unwrap()
    }

    fn name(&self) -> &str {
        if self.0 == Fault::Capital { "Copy" } else { "copy" }
    }

    fn encoder(&self) -> Result<Box<dyn Encoder>, CodecError> {
        if self.0 == Fault::NoEncoder {
            return Err(CodecError::encoder("copy", "none left"));
        }
        Ok(Box::new(Half { fault: self.0, dead: false }))
    }

    fn decoder(&self) -> Result<Box<dyn Decoder>, CodecError> {
        Ok(Box::new(Half { fault: self.0, dead: false }))
    }
}

struct Half {
    fault: Fault,
    dead: bool,
}

impl Encoder for Half {
    fn prepare(&mut self, pages: &[u8], out: &mut Vec<u8>) -> Result<(), EncodeFailed> {
        match self.fault {
            Fault::Fails => return Err(EncodeFailed::library("no mood")),
            Fault::OverwritesOut => out.clear(),
            Fault::Padded if pages.len() == MAX_BATCH_LEN => out.resize(2 << 20, 0),
            Fault::PayloadForNothing => out.push(0),
            _ => {}
        }
        out.extend_from_slice(pages);
        Ok(())
    }
}

impl Decoder for Half {
    fn recv_pages(&mut self, payload: &[u8], pages: &mut [u8]) -> Result<(), DecodeFailed> {
        if self.dead {
            return Err(DecodeFailed::Dead);
        }
        let (produced, expected) = (payload.len(), pages.len());
        if produced < expected && self.fault != Fault::SkipsLack {
            self.dead = self.fault != Fault::GoesOn;
            return Err(DecodeFailed::TooShort { produced, expected });
        }
        if produced > expected && self.fault != Fault::SkipsExcess {
            self.dead = self.fault != Fault::GoesOn;
            return Err(DecodeFailed::TooLong { expected });
        }
        if self.fault != Fault::WritesNothing {
            pages.iter_mut().zip(payload).for_each(|(page, byte)| *page = *byte);
        }
        if self.fault == Fault::ChangesPages {
            pages.iter_mut().skip(4095).take(1).for_each(|byte| *byte ^= 1);
        }
        Ok(())
    }
}

fn complaint(fault: Fault) -> String {
    let panic = catch_unwind(AssertUnwindSafe(|| check(&Faulty(fault)))).expect_err("not found");
    match panic.downcast::<String>() {
        Ok(formatted) => *formatted,
        Err(panic) => (*panic.downcast::<&str>().unwrap()).to_owned(),
    }
}

#[test]
fn a_codec_without_fault_passes() {
    check(&Faulty(Fault::None));
}

#[test]
fn every_fault_is_found_and_named() {
    for (fault, text) in [
        (Fault::Capital, "name \"Copy\": expected lower case and no spaces"),
        (Fault::ChangesPages, "one page after no pages: the pages came back changed"),
        (Fault::Fails, "prepare() of 0 bytes failed"),
        (Fault::GoesOn, "3 pages of Counters taken for 0: the decoder went on after its error"),
        (Fault::NoEncoder, "encoder() failed"),
        (Fault::OverwritesOut, "prepare() touched what was in `out` before"),
        (Fault::Padded, "limit is 1048576"),
        (Fault::PayloadForNothing, "no pages gave a payload of 1 bytes"),
        (Fault::SkipsExcess, "3 pages of Counters taken for 0: accepted, expected an error"),
        (Fault::SkipsLack, "3 pages of Counters taken for 4: accepted, expected an error"),
        (Fault::WritesNothing, "one page after no pages: the pages came back changed"),
    ] {
        let complaint = complaint(fault);
        assert!(complaint.contains(text), "{fault:?}: {complaint}");
    }
}
