//! The records of each page in a stream, in three bits a page.

use std::collections::HashMap;

/// Pages of one chunk: 16 MiB of RAM at 4 KiB a page.
const CHUNK_PAGES: u64 = 4096;
const CHUNK_WORDS: usize = 64;

/// Most chunks: 256 MiB of memory, for 2.7 TiB of RAM. A chunk is made when a page in it comes, so
/// a block that claims a great length costs nothing.
const MAX_CHUNKS: usize = (256 << 20) / size_of::<Chunk>();

/// A stream whose pages are spread too wide to keep count of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the pages of this stream are spread over more than 2.7 TiB of RAM, which is more than can be kept count of"
)]
pub struct TooManyPages;

/// The pages of a stream, as far as it has been read.
#[derive(Default)]
pub struct PageStates {
    chunks: HashMap<(usize, u64), Box<Chunk>>,
}

type Chunk = [States; CHUNK_WORDS];

/// 64 pages, a bit each.
#[derive(Clone, Copy, Default)]
struct States {
    seen: u64,
    zero: u64,
    repeated: u64,
}

/// A page's state before a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Before {
    /// It had a record.
    pub seen: bool,
    /// It was zero by its last record.
    pub zero: bool,
    /// It had more than one record.
    pub repeated: bool,
}

impl PageStates {
    /// Notes a record that leaves the page zero or not.
    ///
    /// # Errors
    /// The pages are spread too wide.
    pub fn note(&mut self, block: usize, page: u64, zero: bool) -> Result<Before, TooManyPages> {
        let key = (block, page / CHUNK_PAGES);
        if self.chunks.len() >= MAX_CHUNKS && !self.chunks.contains_key(&key) {
            return Err(TooManyPages);
        }
        let chunk = self.chunks.entry(key).or_insert_with(|| Box::new([States::default(); CHUNK_WORDS]));
        let (word, bit) = ((page % CHUNK_PAGES / 64) as usize, 1 << (page % 64));
        #[expect(clippy::indexing_slicing, reason = "a page of a chunk is in one of its words")]
        let states = &mut chunk[word];
        let before = Before {
            seen: states.seen & bit != 0,
            zero: states.zero & bit != 0,
            repeated: states.repeated & bit != 0,
        };
        states.repeated |= states.seen & bit;
        states.seen |= bit;
        states.zero = if zero { states.zero | bit } else { states.zero & !bit };
        Ok(before)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_seen_then_repeated_and_zero_by_its_last_record() {
        let mut states = PageStates::default();
        let before = |seen, zero, repeated| Ok(Before { seen, zero, repeated });
        for page in [0, 63, 64, 4095, 4096, u64::MAX] {
            assert_eq!(states.note(3, page, true), before(false, false, false), "{page}");
            assert_eq!(states.note(3, page, false), before(true, true, false), "{page}");
            assert_eq!(states.note(3, page, true), before(true, false, true), "{page}");
            assert_eq!(states.note(4, page, true), before(false, false, false), "{page}");
        }
    }

    #[test]
    fn pages_that_are_spread_too_wide_are_refused() {
        let mut states = PageStates::default();
        let refused = (0..1 << 20).find(|chunk| states.note(0, chunk * 4096, true).is_err());
        let kept = refused.expect("no limit") * 4096 * 4096;
        assert!(kept > 2 << 40, "{kept} bytes of RAM");
        assert!(states.note(0, 1, true).is_ok(), "known chunks go on");
    }
}
