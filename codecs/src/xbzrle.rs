//! XBZRLE: a page as its difference from an older copy (docs/wire.md §6).
//!
//! ```text
//!   delta := { unchanged run length, changed run length, the changed bytes }   until only unchanged bytes are left
//!   length := 1 byte for 0..=127, else 2: 0x80 | low 7 bits, high 7 bits
//! ```

/// Largest page, in bytes: what a run length of 14 bits can say.
pub const MAX_PAGE_LEN: usize = (1 << 14) - 1;

/// What came of encoding a page.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[must_use]
pub enum Outcome {
    /// A delta of this many bytes, at least 3, is in `out`.
    Delta(usize),
    /// The delta would exceed its limit: send the page as it is. `out` holds nothing of use.
    Overflow,
    /// The pages are equal: send nothing.
    Unchanged,
}

/// Writes into `out` what turns `old` into `new`.
///
/// The limit for the delta is the page length, or the length of `out` if that is less. The bytes
/// are those that QEMU's scalar encoder writes: a changed run ends at the first equal byte.
/// [`Outcome::Overflow`] is also the answer for pages longer than [`MAX_PAGE_LEN`] and for two
/// pages of different lengths, so that sending `new` as it is is always right.
pub fn encode(old: &[u8], new: &[u8], out: &mut [u8]) -> Outcome {
    if old.len() != new.len() || new.len() > MAX_PAGE_LEN {
        return Outcome::Overflow;
    }
    let limit = new.len().min(out.len());
    let mut delta = Delta { out: out.get_mut(..limit).unwrap_or_default(), len: 0 };
    match delta.write(old, new) {
        None => Outcome::Overflow,
        Some(()) if delta.len == 0 => Outcome::Unchanged,
        Some(()) => Outcome::Delta(delta.len),
    }
}

/// Applies a delta to `page`, the copy that it was made against.
///
/// # Errors
/// The delta breaks the grammar or reaches out of the page. `page` may be partly changed then,
/// never anything beyond it.
pub fn decode(delta: &[u8], page: &mut [u8]) -> Result<(), XbzrleError> {
    let mut reader = Reader { delta, at: 0 };
    let mut rest = page;
    while reader.at < delta.len() {
        let first = reader.at == 0;
        let skip = reader.run()?;
        if skip == 0 && !first {
            return Err(XbzrleError::EmptyRun { at: reader.at });
        }
        let (_, tail) = rest.split_at_mut_checked(skip).ok_or(XbzrleError::PastPage { at: reader.at })?;
        let len = reader.run()?;
        if len == 0 {
            return Err(XbzrleError::EmptyRun { at: reader.at });
        }
        let (changed, tail) =
            tail.split_at_mut_checked(len).ok_or(XbzrleError::PastPage { at: reader.at })?;
        changed.copy_from_slice(reader.bytes(len)?);
        rest = tail;
    }
    Ok(())
}

/// A delta that cannot be applied. `at` is how many of its bytes were read.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum XbzrleError {
    /// A run of no bytes, elsewhere than at the start.
    #[error("xbzrle run of 0 bytes at byte {at}")]
    EmptyRun {
        /// Bytes read.
        at: usize,
    },
    /// A run length whose second byte has its top bit set.
    #[error("xbzrle run length of more than 14 bits at byte {at}")]
    LongLength {
        /// Bytes read.
        at: usize,
    },
    /// A run reaches beyond the page.
    #[error("xbzrle run past the end of the page at byte {at}")]
    PastPage {
        /// Bytes read.
        at: usize,
    },
    /// The delta ends within a pair of lengths or within changed bytes.
    #[error("xbzrle delta cut short at byte {at}")]
    Truncated {
        /// Bytes read.
        at: usize,
    },
}

struct Delta<'a> {
    /// As long as the delta may become.
    out: &'a mut [u8],
    /// 0 <= len <= out.len()
    len: usize,
}

impl Delta<'_> {
    /// `None` at overflow. The checks stand where QEMU has them, before each run and not before
    /// each byte: a page is an overflow here if and only if it is one there.
    fn write(&mut self, old: &[u8], new: &[u8]) -> Option<()> {
        let mut at = 0;
        while at < new.len() {
            self.space(2)?;
            let equal = equal_run(old.get(at..)?, new.get(at..)?);
            at += equal;
            if at == new.len() {
                return Some(());
            }
            self.length(equal)?;
            self.space(2)?;
            let changed = changed_run(old.get(at..)?, new.get(at..)?);
            self.length(changed)?;
            self.space(changed)?.copy_from_slice(new.get(at..at + changed)?);
            self.len += changed;
            at += changed;
        }
        Some(())
    }

    /// The next `len` bytes of the output, if it has as many.
    #[inline]
    fn space(&mut self, len: usize) -> Option<&mut [u8]> {
        self.out.get_mut(self.len..self.len + len)
    }

    #[inline]
    fn length(&mut self, run: usize) -> Option<()> {
        let [low, high, ..] = run.to_le_bytes();
        if run < 0x80 {
            *self.out.get_mut(self.len)? = low;
            self.len += 1;
        } else {
            self.space(2)?.copy_from_slice(&[low | 0x80, (high << 1) | (low >> 7)]);
            self.len += 2;
        }
        Some(())
    }
}

struct Reader<'a> {
    delta: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    /// A run length. At least one byte has to come after its first one, whatever it is the length
    /// of.
    #[inline]
    fn run(&mut self) -> Result<usize, XbzrleError> {
        let Some(&[low, high]) = self.delta.get(self.at..).and_then(<[u8]>::first_chunk) else {
            return Err(XbzrleError::Truncated { at: self.at });
        };
        if low < 0x80 {
            self.at += 1;
            Ok(usize::from(low))
        } else if high < 0x80 {
            self.at += 2;
            Ok(usize::from(low & 0x7f) | usize::from(high) << 7)
        } else {
            Err(XbzrleError::LongLength { at: self.at })
        }
    }

    #[inline]
    fn bytes(&mut self, len: usize) -> Result<&'a [u8], XbzrleError> {
        let bytes = self.delta.get(self.at..self.at + len).ok_or(XbzrleError::Truncated { at: self.at })?;
        self.at += len;
        Ok(bytes)
    }
}

/// How many bytes are equal from the start. Both slices have the same length.
#[inline]
fn equal_run(old: &[u8], new: &[u8]) -> usize {
    let (old_blocks, _) = old.as_chunks::<64>();
    let (new_blocks, _) = new.as_chunks::<64>();
    let skipped = 64 * old_blocks.iter().zip(new_blocks).take_while(|(old, new)| old == new).count();
    let (old, new) = (old.get(skipped..).unwrap_or_default(), new.get(skipped..).unwrap_or_default());
    skipped + run_until(old, new, |difference| difference, |difference| difference != 0)
}

/// How many bytes differ from the start. Both slices have the same length.
#[inline]
fn changed_run(old: &[u8], new: &[u8]) -> usize {
    run_until(old, new, zero_bytes, |difference| difference == 0)
}

/// Index of the first byte where `old ^ new` ends the run, or the length. `ends_in` gives a word
/// whose lowest set bit lies in the byte that ends the run (0: none), `ends` says the same of a
/// single byte.
#[inline(always)]
fn run_until(old: &[u8], new: &[u8], ends_in: impl Fn(u64) -> u64, ends: impl Fn(u8) -> bool) -> usize {
    let (old_words, old_tail) = old.as_chunks::<8>();
    let (new_words, new_tail) = new.as_chunks::<8>();
    for (index, (old, new)) in old_words.iter().zip(new_words).enumerate() {
        let bits = ends_in(u64::from_le_bytes(*old) ^ u64::from_le_bytes(*new));
        if bits != 0 {
            return index * 8 + bits.trailing_zeros() as usize / 8;
        }
    }
    let tail = old_tail.iter().zip(new_tail).take_while(|(old, new)| !ends(*old ^ *new)).count();
    old_words.len() * 8 + tail
}

/// The top bit of the lowest byte that is zero. (Above that byte the bits mean nothing: borrows run
/// through them.)
#[inline]
const fn zero_bytes(word: u64) -> u64 {
    const ONES: u64 = u64::from_le_bytes([0x01; 8]);
    const TOPS: u64 = u64::from_le_bytes([0x80; 8]);
    word.wrapping_sub(ONES) & !word & TOPS
}

#[cfg(test)]
mod tests;
