//! One bit for each page of a block.

use std::ops::Range;
use std::sync::OnceLock;

use crate::guest::DirtyBitmap;

/// One bit a page, made where pages arrive: a block is as long as the peer says, and that alone
/// must cost nothing.
pub(super) struct PageBits {
    pages: usize,
    parts: Box<[OnceLock<DirtyBitmap>]>,
}

/// Pages in a part of [`PageBits`]: 1 GiB of guest, whose bits are 32 KiB.
const PART_PAGES: usize = 1 << 18;

impl PageBits {
    pub(super) fn new(pages: usize) -> Self {
        Self { pages, parts: (0..pages.div_ceil(PART_PAGES)).map(|_| OnceLock::new()).collect() }
    }

    /// Pages without a bit, and the first of them.
    pub(super) fn missing(&self) -> (usize, Option<usize>) {
        let (mut count, mut first) = (0, None);
        for (number, part) in self.parts.iter().enumerate() {
            let start = number * PART_PAGES;
            let here = PART_PAGES.min(self.pages - start);
            let missing = here - part.get().map_or(0, DirtyBitmap::count).min(here);
            if missing > 0 && first.is_none() {
                first = (start..start + here).find(|page| !self.test(*page));
            }
            count += missing;
        }
        (count, first)
    }

    pub(super) fn set_range(&self, first: usize, count: usize) {
        let end = first.saturating_add(count);
        let mut page = first;
        while page < end {
            let in_part = (PART_PAGES - page % PART_PAGES).min(end - page);
            let Some(part) = self.parts.get(page / PART_PAGES) else { return };
            part.get_or_init(|| DirtyBitmap::new(PART_PAGES)).set_range(page % PART_PAGES, in_part);
            page += in_part;
        }
    }

    /// Clears every bit.
    pub(super) fn clear(&self) {
        self.parts.iter().filter_map(OnceLock::get).for_each(DirtyBitmap::clear);
    }

    pub(super) fn clear_range(&self, first: usize, count: usize) {
        for page in first..first.saturating_add(count) {
            if let Some(part) = self.parts.get(page / PART_PAGES).and_then(OnceLock::get) {
                part.take(page % PART_PAGES);
            }
        }
    }

    /// Runs of pages without a bit, each of whole groups of `group` pages.
    pub(super) fn gaps(&self, group: usize) -> Vec<Range<usize>> {
        let mut gaps: Vec<Range<usize>> = Vec::new();
        let mut page = 0;
        while page < self.pages {
            let part = page / PART_PAGES;
            // A part that was never made is one run.
            let unmade = self.parts.get(part).is_some_and(|part| part.get().is_none());
            let end = if unmade { (part + 1) * PART_PAGES } else { page + group }.min(self.pages);
            if unmade || !self.test(page) {
                match gaps.last_mut() {
                    Some(last) if last.end == page => last.end = end,
                    _ => gaps.push(page..end),
                }
            }
            page = end;
        }
        gaps
    }

    /// All bits, from the lowest of each byte on, padded to words of 8 bytes.
    pub(super) fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0_u8; self.pages.div_ceil(64) * 8];
        for (index, byte) in bytes.iter_mut().enumerate() {
            let first = index * 8;
            if self.parts.get(first / PART_PAGES).is_some_and(|part| part.get().is_some()) {
                *byte = (0..8).filter(|bit| self.test(first + bit)).map(|bit| 1_u8 << bit).sum();
            }
        }
        bytes
    }

    pub(super) fn all(&self, mut pages: Range<usize>) -> bool {
        pages.all(|page| self.test(page))
    }

    pub(super) fn test(&self, page: usize) -> bool {
        let part = self.parts.get(page / PART_PAGES).and_then(OnceLock::get);
        part.is_some_and(|part| part.test(page % PART_PAGES))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn written_pages_are_known_over_the_parts_borders() {
        let written = PageBits::new(3 * PART_PAGES + 5);
        written.set_range(PART_PAGES - 2, PART_PAGES + 4);
        written.set_range(3 * PART_PAGES + 4, 1);
        let set =
            |page: usize| (PART_PAGES - 2..2 * PART_PAGES + 2).contains(&page) || page == 3 * PART_PAGES + 4;
        for page in (0..3 * PART_PAGES + 10).filter(|page| (page + 3) % PART_PAGES < 9 || page % 1009 == 0) {
            assert_eq!(written.test(page), set(page), "{page}");
        }
    }

    #[test]
    fn what_was_announced_but_never_came_has_no_bits() {
        let written = PageBits::new(usize::MAX >> 24);
        assert!(!written.test(12345) && written.parts.iter().all(|part| part.get().is_none()));
        assert_eq!(written.missing(), (usize::MAX >> 24, Some(0)));
    }

    #[test]
    fn gaps_are_what_has_no_bit_and_the_bytes_what_has_one() {
        let bits = PageBits::new(2 * PART_PAGES + 16);
        let all = 0..2 * PART_PAGES + 16;
        assert_eq!(bits.gaps(1), std::slice::from_ref(&all));
        bits.set_range(PART_PAGES, PART_PAGES + 12);
        bits.clear_range(PART_PAGES + 3, 2);
        let last = 2 * PART_PAGES + 12;
        assert_eq!(bits.gaps(1), [0..PART_PAGES, PART_PAGES + 3..PART_PAGES + 5, last..last + 4]);
        let bytes = bits.to_bytes();
        assert_eq!(
            (bytes.len(), bytes[PART_PAGES / 8 - 1], bytes[PART_PAGES / 8]),
            (2 * PART_PAGES / 8 + 8, 0, 0xe7)
        );
        assert_eq!(bytes[2 * PART_PAGES / 8..], [0xff, 0x0f, 0, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn a_page_that_is_missing_is_found_in_the_last_part() {
        let bits = PageBits::new(2 * PART_PAGES + 5);
        bits.set_range(0, 2 * PART_PAGES + 3);
        bits.set_range(2 * PART_PAGES + 4, 1);
        assert_eq!(bits.missing(), (1, Some(2 * PART_PAGES + 3)));
        bits.set_range(2 * PART_PAGES + 3, 1);
        assert_eq!(bits.missing(), (0, None));
    }
}
