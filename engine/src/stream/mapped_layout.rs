//! Where the pages of a `mapped-ram` file lie, and which of them it holds. Spec: docs/wire.md §17.

use multifd_wire::{BlockEntry, Invalid, MappedRamHeader, PageSize};

/// The capability under which a stream says that its pages lie at fixed places.
pub(crate) const CAPABILITY: &str = "mapped-ram";

const PAGES_PER_WORD: u64 = u64::BITS as u64;

/// Where the places of a block are, whose entry without the header ends at `position` of the file.
pub(crate) fn place(position: u64, used_len: u64, page: PageSize) -> MappedRamHeader {
    let bitmap_offset = position + MappedRamHeader::LEN as u64;
    let bitmap_end = bitmap_offset + MappedRamHeader::bitmap_len(used_len, page);
    MappedRamHeader {
        page_size: page.bytes_u64(),
        bitmap_offset,
        pages_offset: bitmap_end.next_multiple_of(MappedRamHeader::PAGES_ALIGN),
    }
}

/// Where the stream goes on after the entry of a block, which ends at `position`: behind its pages.
/// `None`: right there, the block is not stored.
///
/// Entries that lie behind each other keep everything apart: a bitmap begins where its entry ends
/// or later.
///
/// # Errors
/// A bitmap before that.
pub(crate) fn next_entry(entry: &BlockEntry, position: u64) -> Result<Option<u64>, Invalid> {
    let Some(header) = entry.mapped_ram.filter(MappedRamHeader::is_stored) else { return Ok(None) };
    if header.bitmap_offset < position {
        let seen = format!("byte {} for {}", header.bitmap_offset, entry.name);
        return Err(Invalid::new("mapped-ram bitmap", seen, format_args!("at byte {position} or behind")));
    }
    // No overflow in a list of blocks: `BlockListBuilder` has looked.
    Ok(header.pages_offset.checked_add(entry.used_len))
}

/// A piece of a block's bitmap of stored pages.
#[derive(Debug, Default)]
pub(crate) struct StoredBits {
    /// The page of the first bit, a multiple of 64.
    first: u64,
    words: Vec<u64>,
}

impl StoredBits {
    /// `bytes` are whole words, the first of them has the bit of page `first`.
    pub(crate) fn decode(first: u64, bytes: &[u8]) -> Self {
        // In the source's byte order, which is little-endian on all that this runs on.
        let (words, _) = bytes.as_chunks::<8>();
        Self { first, words: words.iter().map(|word| u64::from_le_bytes(*word)).collect() }
    }

    /// The page behind the last bit.
    pub(crate) fn end(&self) -> u64 {
        self.first + self.words.len() as u64 * PAGES_PER_WORD
    }

    /// Whether the page is stored; not if it is outside.
    #[cfg(feature = "at-rest")]
    pub(crate) fn test(&self, page: u64) -> bool {
        let bit = page.saturating_sub(self.first);
        let word = usize::try_from(bit / PAGES_PER_WORD).ok().and_then(|word| self.words.get(word));
        word.is_some_and(|word| word >> (bit % PAGES_PER_WORD) & 1 == 1)
    }

    /// Whether the page is stored, and for how many pages from this one on that is so: 0 for a page
    /// outside.
    pub(crate) fn run(&self, page: u64) -> (bool, u64) {
        let bit = page.saturating_sub(self.first);
        let mut words = self.words.iter().skip(usize::try_from(bit / PAGES_PER_WORD).unwrap_or(usize::MAX));
        let mut passed = bit % PAGES_PER_WORD;
        let Some(first) = words.next() else { return (false, 0) };
        let stored = first >> passed & 1 == 1;
        let mut pages = 0;
        for word in std::iter::once(first).chain(words) {
            let differing = if stored { !word } else { *word };
            let left = PAGES_PER_WORD - passed;
            let here = u64::from((differing >> passed).trailing_zeros()).min(left);
            pages += here;
            if here < left {
                break;
            }
            passed = 0;
        }
        (stored, pages)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_those_of_the_single_bits() {
        let words = [0, u64::MAX, 0x8000_0000_0000_0001, 0xff00, u64::MAX, u64::MAX >> 1];
        let bytes: Vec<u8> = words.iter().flat_map(|word: &u64| word.to_le_bytes()).collect();
        let bits = StoredBits::decode(128, &bytes);
        let set = |page: u64| words[usize::try_from((page - 128) / 64).unwrap()] >> (page % 64) & 1 == 1;
        assert_eq!(bits.end(), 128 + 6 * 64);
        for page in 128..bits.end() {
            let same = (page..bits.end()).take_while(|next| set(*next) == set(page)).count();
            assert_eq!(bits.run(page), (set(page), same as u64), "{page}");
            assert_eq!(bits.test(page), set(page), "{page}");
        }
        assert!(bits.run(bits.end()) == (false, 0) && !bits.test(bits.end()));
    }

    #[test]
    fn places_follow_each_other() {
        let header = place((1 << 20) - 20, 64 << 20, PageSize::K4);
        assert_eq!((header.bitmap_offset, header.pages_offset), ((1 << 20) + 8, 2 << 20));
        let header = place(100, 4096, PageSize::K4);
        assert_eq!((header.bitmap_offset, header.pages_offset), (128, 1 << 20));
    }
}
