//! One bit a page, set and taken without locks.

use crate::sync::{AtomicU64, Ordering};

/// Pages in one word of a [`DirtyBitmap`].
pub(crate) const PAGES_PER_WORD: usize = 64;

/// One bit a page of one block. Any thread may set bits while others take them: a bit is never
/// lost.
///
/// A bit that is set after a write carries the write with it: a thread that takes the bit sees what
/// was written before.
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
            self.or_word(word, mask);
            page += in_word;
        }
    }

    /// Sets the bits of a log: bit `n` of `bits` is page `first + n`. What is past the end is left
    /// out.
    pub fn set_bits(&self, first: usize, bits: u64) {
        let Some(left) = self.pages.checked_sub(first).filter(|pages| *pages > 0) else { return };
        let bits = if left < PAGES_PER_WORD { bits & ((1 << left) - 1) } else { bits };
        let (word, shift) = (first / PAGES_PER_WORD, first % PAGES_PER_WORD);
        self.or_word(word, bits << shift);
        if shift > 0 {
            self.or_word(word + 1, bits >> (PAGES_PER_WORD - shift));
        }
    }

    /// Takes all bits and sets them in `other`: what a log of your own does at a sync.
    pub fn move_to(&self, other: &Self) {
        self.move_to_page(0, other);
    }

    /// As `move_to`, when page 0 here is page `first` of `other`.
    pub(crate) fn move_to_page(&self, first: usize, other: &Self) {
        for word in 0..self.words() {
            other.set_bits(first + word * PAGES_PER_WORD, self.take_word(word));
        }
    }

    /// Clears every bit.
    pub(crate) fn clear(&self) {
        for word in 0..self.words() {
            self.take_word(word);
        }
    }

    fn or_word(&self, word: usize, bits: u64) {
        match self.words.get(word) {
            // Release, also when the bit is set already: the write before this call must be seen by
            // the thread that takes the bit.
            Some(word) if bits != 0 => _ = word.fetch_or(bits, Ordering::Release),
            _ => {}
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
            // Acquire: what was written before a bit was set is read after it was taken.
            _ => word.swap(0, Ordering::Acquire),
        })
    }

    /// One word's bits, which stay.
    pub(crate) fn word(&self, word: usize) -> u64 {
        self.words.get(word).map_or(0, |word| word.load(Ordering::Relaxed))
    }

    /// Takes those of one word's bits that are in `mask`, as far as they are set.
    pub(crate) fn take_bits(&self, word: usize, mask: u64) -> u64 {
        // Acquire: as in `take_word`.
        self.words.get(word).map_or(0, |word| word.fetch_and(!mask, Ordering::Acquire) & mask)
    }

    /// Takes one page's bit. True: it was set, and the page belongs to the caller. False: it was
    /// clear, because the page is clean or another caller has taken it.
    pub fn take(&self, page: usize) -> bool {
        let Some((word, mask)) = self.bit(page) else { return false };
        // Acquire: what was written before the bit was set is read after it was taken.
        word.fetch_and(!mask, Ordering::Acquire) & mask != 0
    }

    /// Sets one page's bit. True: it was clear before. Always false for a page that is not there.
    pub(crate) fn insert(&self, page: usize) -> bool {
        let Some((word, mask)) = self.bit(page) else { return false };
        word.fetch_or(mask, Ordering::Release) & mask == 0
    }

    fn bit(&self, page: usize) -> Option<(&AtomicU64, u64)> {
        let word = self.words.get(page / PAGES_PER_WORD).filter(|_| page < self.pages)?;
        Some((word, 1 << (page % PAGES_PER_WORD)))
    }

    /// Words that hold the bits.
    pub(crate) fn words(&self) -> usize {
        self.words.len()
    }
}

#[cfg(all(test, not(multifd_loom)))]
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
    fn the_bits_of_a_log_land_on_their_pages_and_no_other() {
        for (pages, first) in
            [(200, 0), (200, 1), (200, 63), (200, 64), (200, 150), (200, 199), (64, 0), (1, 0)]
        {
            for bits in [1_u64, 1 << 63, 0xdead_beef_0102_0304, u64::MAX, 0] {
                let bitmap = DirtyBitmap::new(pages);
                bitmap.set_bits(first, bits);
                for page in 0..pages {
                    let expected = (first..first + 64).contains(&page) && bits >> (page - first) & 1 == 1;
                    assert_eq!(bitmap.test(page), expected, "{pages} pages, {bits:#x} at {first}: {page}");
                }
                assert!(bitmap.count() <= bits.count_ones() as usize);
            }
        }
    }

    #[test]
    fn bits_of_a_log_past_the_end_are_left_out() {
        let bitmap = DirtyBitmap::new(65);
        for first in [65, 66, 128, usize::MAX] {
            bitmap.set_bits(first, u64::MAX);
        }
        assert_eq!(bitmap.count(), 0);
        bitmap.set_bits(64, u64::MAX);
        assert_eq!(bitmap.take_word(1), 1, "the last word holds no bit of a page that is not there");
    }

    #[test]
    fn moved_bits_are_in_the_other_and_gone_here() {
        let (from, to) = (DirtyBitmap::new(130), DirtyBitmap::new(130));
        from.set_range(60, 10);
        from.set(129);
        to.set(3);
        from.move_to(&to);
        assert_eq!((from.count(), to.count()), (0, 12));
        assert!(to.test(3) && to.test(60) && to.test(129));

        from.set_range(62, 3);
        from.move_to_page(10, &to);
        assert!(to.test(72) && to.test(73) && to.test(74));
        assert_eq!((from.count(), to.count()), (0, 15));
    }

    #[test]
    fn a_page_is_taken_once_and_its_neighbours_stay() {
        let bitmap = DirtyBitmap::new(130);
        bitmap.set_range(63, 3);
        assert!(bitmap.take(64));
        assert!(!bitmap.take(64), "taken before");
        assert!(!bitmap.take(66), "never set");
        assert!(!bitmap.take(130) && !bitmap.take(usize::MAX), "not there");
        assert!(bitmap.test(63) && bitmap.test(65));
    }

    #[test]
    fn a_page_is_inserted_once() {
        let bitmap = DirtyBitmap::new(65);
        assert!(bitmap.insert(64));
        assert!(!bitmap.insert(64), "set before");
        assert!(!bitmap.insert(65), "not there");
        assert_eq!(bitmap.count(), 1);
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
