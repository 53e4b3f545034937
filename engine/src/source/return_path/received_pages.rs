//! The bitmap of the pages that have arrived, which follows RECV_BITMAP. Spec: docs/wire.md §11.
//!
//! ```text
//!  be64 length | one bit a page, bit n of byte n/8, up to a multiple of 8 bytes | be64 mark
//! ```

use multifd_wire::BlockName;

use crate::error::{Error, Phase, Result};
use crate::guest::{DirtyBitmap, PAGES_PER_WORD};

/// Bytes of the length.
pub(in crate::source) const HEAD: usize = 8;

/// Bytes of the mark at the end.
pub(in crate::source) const MARK: usize = 8;

const END: u64 = 0x0123_4567_89ab_cdef;

/// Bytes of the bitmap of a block with so many pages.
pub(in crate::source) fn len(pages: usize) -> usize {
    pages.div_ceil(PAGES_PER_WORD) * 8
}

/// Refuses a length that is not `expected`, before its bytes are waited for.
pub(in crate::source) fn check_head(bytes: &[u8], expected: usize, name: &BlockName) -> Result<()> {
    match bytes.first_chunk().map(|head| u64::from_be_bytes(*head)) {
        Some(seen) if seen != expected as u64 => {
            let detail = format!("a bitmap of {seen} bytes for RAM block {name}, expected {expected}");
            Err(Error::misbehaved(Phase::Postcopy, detail))
        }
        _ => Ok(()),
    }
}

/// The bitmap of a whole answer.
pub(in crate::source) fn content(mut bytes: Vec<u8>, name: &BlockName) -> Result<Vec<u8>> {
    let mark = bytes.last_chunk().map(|mark| u64::from_be_bytes(*mark));
    if mark != Some(END) {
        let seen = mark.unwrap_or_default();
        let detail = format!("{seen:#018x} behind the bitmap of RAM block {name}, expected {END:#018x}");
        return Err(Error::misbehaved(Phase::Postcopy, detail));
    }
    bytes.truncate(bytes.len().saturating_sub(MARK));
    bytes.drain(..HEAD.min(bytes.len()));
    Ok(bytes)
}

/// Makes exactly those pages dirty that have not arrived.
pub(in crate::source) fn set_missing(received: &[u8], dirty: &DirtyBitmap) {
    for (word, bytes) in received.chunks(8).enumerate() {
        let arrived = bytes.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
        dirty.take_word(word);
        dirty.set_bits(word * PAGES_PER_WORD, !arrived);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    fn name() -> BlockName {
        "pc.ram".try_into().unwrap()
    }

    fn answer(bitmap: &[u8], mark: u64) -> Vec<u8> {
        [&(bitmap.len() as u64).to_be_bytes()[..], bitmap, &mark.to_be_bytes()].concat()
    }

    #[test]
    fn what_has_not_arrived_is_dirty_and_nothing_else() {
        let dirty = DirtyBitmap::new(70);
        dirty.set_range(0, 10);
        let mut bitmap = vec![0xff; len(70)];
        bitmap[2] = 0b1111_1110;
        bitmap[8] = 0b0001_1111;
        let bitmap = content(answer(&bitmap, END), &name()).unwrap();
        set_missing(&bitmap, &dirty);
        let missing: Vec<_> = (0..70).filter(|page| dirty.test(*page)).collect();
        assert_eq!(missing, [16, 69]);
    }

    #[test]
    fn another_length_or_mark_is_refused() {
        let bytes = answer(&[0; 16], END);
        for cut in 0..8 {
            check_head(&bytes[..cut], 8, &name()).unwrap();
        }
        let error = check_head(&bytes, 8, &name()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::PeerMisbehaved);
        assert!(
            error.to_string().contains("a bitmap of 16 bytes for RAM block pc.ram, expected 8"),
            "{error}"
        );
        let error = content(answer(&[0; 8], END + 1), &name()).unwrap_err();
        assert!(error.to_string().contains("behind the bitmap"), "{error}");
    }
}
