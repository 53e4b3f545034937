//! One bit a page, set and taken without locks.

use std::sync::atomic::{AtomicU64, Ordering};

/// Pages in one word of a [`DirtyBitmap`].
pub(crate) const PAGES_PER_WORD: usize = 64;

/// One bit a page of one block. Any thread may set bits while others take them: a bit is never lost.
#[derive(Debug)]
pub struct DirtyBitmap {
    words: Box<[AtomicU64]>,
    pages: usize,
}

impl DirtyBitmap {
    /// All clear, for `pages` pages. One bit each: 32 KiB for a GiB of guest.
    pub fn new(pages: usize) -> Self {
        let words = (0..pages.div_ceil(PAGES_PER_WORD)).map(|_| AtomicU64::new(0)).collect();
        Self { words, pages }
    }

    /// Pages that have a bit.
    pub fn pages(&self) -> usize {
        self.pages
    }

    /// Sets one page's bit; nothing happens for a page that is not there.
    pub fn set(&self, page: usize) {
        self.set_range(page, 1);
    }

    /// Sets the bits of `count` pages from `first`; what is past the end is left out.
    pub fn set_range(&self, first: usize, count: usize) {
        let end = first.saturating_add(count).min(self.pages);
        let mut page = first;
        while page < end {
            let (word, bit) = (page / PAGES_PER_WORD, page % PAGES_PER_WORD);
            let in_word = (PAGES_PER_WORD - bit).min(end - page);
            let mask = (u64::MAX >> (PAGES_PER_WORD - in_word)) << bit;
            if let Some(word) = self.words.get(word) {
                word.fetch_or(mask, Ordering::Relaxed);
            }
            page += in_word;
        }
    }

    /// True if the page's bit is set.
    pub fn test(&self, page: usize) -> bool {
        let word = self.words.get(page / PAGES_PER_WORD).map_or(0, |word| word.load(Ordering::Relaxed));
        word >> (page % PAGES_PER_WORD) & 1 == 1
    }

    /// Set bits.
    pub fn count(&self) -> usize {
        self.words.iter().map(|word| word.load(Ordering::Relaxed).count_ones() as usize).sum()
    }

    /// Takes one word's bits: they are clear afterwards and belong to the caller.
    pub(crate) fn take_word(&self, word: usize) -> u64 {
        self.words.get(word).map_or(0, |word| match word.load(Ordering::Relaxed) {
            // A clean word costs a load, not a locked swap: most words are clean in a late round.
            0 => 0,
            _ => word.swap(0, Ordering::Relaxed),
        })
    }

    /// Words that hold the bits.
    pub(crate) fn words(&self) -> usize {
        self.words.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_sets_its_pages_and_no_other() {
        for (first, count) in [(0, 1), (0, 64), (63, 2), (5, 200), (127, 1), (190, 100)] {
            let bitmap = DirtyBitmap::new(200);
            bitmap.set_range(first, count);
            for page in 0..200 {
                assert_eq!(
                    bitmap.test(page),
                    (first..first + count).contains(&page),
                    "{first}+{count} {page}"
                );
            }
        }
    }

    #[test]
    fn a_page_past_the_end_has_no_bit() {
        let bitmap = DirtyBitmap::new(65);
        bitmap.set(65);
        bitmap.set_range(usize::MAX, 2);
        assert_eq!(bitmap.count(), 0);
        assert!(!bitmap.test(usize::MAX));
    }

    #[test]
    fn taken_bits_are_gone() {
        let bitmap = DirtyBitmap::new(128);
        bitmap.set_range(60, 10);
        assert_eq!(bitmap.take_word(0), 0xf << 60);
        assert_eq!(bitmap.take_word(0), 0);
        assert_eq!(bitmap.count(), 6);
    }
}
