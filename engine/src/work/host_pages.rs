//! The pages that a post-copy still owes, claimed in whole host pages.

use std::ops::Range;

use super::{BlockIndex, PerBlock, UrgentPages, WantedPage};
use crate::guest::{DirtyBitmap, PAGES_PER_WORD};
use crate::sync::Arc;

/// The dirty pages of a guest, in the units in which its destination places them: host pages.
///
/// The dirty bit of a host page's first page says whose it is: the thread that clears it owns all
/// of the host page. So no host page goes twice or over two channels, whether it was asked for or
/// its turn has come.
#[derive(Debug)]
pub(crate) struct HostPages {
    blocks: PerBlock<HostBlock>,
}

#[derive(Debug)]
struct HostBlock {
    bitmap: Arc<DirtyBitmap>,
    /// Pages in a host page: 1, or 512 where those are of 2 MiB.
    per_host: usize,
}

/// Where the scan for pages goes on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ScanPlace {
    block: BlockIndex,
    page: usize,
}

impl HostPages {
    /// The pages of `bitmaps`; `per_host`: pages in a host page of each block.
    pub(crate) fn new(bitmaps: &PerBlock<Arc<DirtyBitmap>>, per_host: &PerBlock<usize>) -> Self {
        let blocks = bitmaps.indexed().map(|(block, bitmap)| HostBlock {
            bitmap: Arc::clone(bitmap),
            per_host: (*per_host.at(block)).max(1),
        });
        Self { blocks: blocks.collect() }
    }

    /// Makes host pages dirty of which any page is: they are placed whole.
    pub(crate) fn round_up(&self) {
        self.blocks.iter().for_each(HostBlock::round_up);
    }

    /// The first place of a scan. `None`: there are no blocks.
    pub(crate) fn first_place(&self) -> Option<ScanPlace> {
        self.blocks.first().map(|block| ScanPlace { block, page: 0 })
    }

    /// The first page of the host page that `page` is in.
    fn host_page_of(&self, block: BlockIndex, page: usize) -> usize {
        let per_host = self.blocks.at(block).per_host;
        page / per_host * per_host
    }

    /// Pages that are dirty.
    pub(crate) fn left(&self) -> usize {
        self.blocks.iter().map(|block| block.bitmap.count()).sum()
    }

    /// The next dirty host pages of one block from `place` on, at most `most` pages, but one host
    /// page at least; behind the last block the first follows. They are the caller's afterwards.
    /// `None`: nothing is dirty.
    pub(crate) fn claim(
        &self,
        place: &mut ScanPlace,
        most: usize,
        pages: &mut Vec<usize>,
    ) -> Option<BlockIndex> {
        pages.clear();
        // The block that it begins in comes twice: what is before the place is last.
        for _ in 0..=self.blocks.len() {
            let block = self.blocks.at(place.block);
            place.page = block.claim(place.page, most.max(1), pages);
            if !pages.is_empty() {
                return Some(place.block);
            }
            *place = ScanPlace { block: self.blocks.after(place.block), page: 0 };
        }
        None
    }

    /// The host page that was asked for first and is still dirty; where a scan goes on behind it;
    /// and true. With `gone`, a bit for the first page of each host page that went before its turn:
    /// also one that is not dirty any more and has no bit, with false. It has one afterwards.
    pub(crate) fn claim_wanted(
        &self,
        urgent: &UrgentPages,
        gone: Option<&PerBlock<DirtyBitmap>>,
        pages: &mut Vec<usize>,
    ) -> Option<(BlockIndex, ScanPlace, bool)> {
        pages.clear();
        while let Some(WantedPage { block, page }) = urgent.pop() {
            let host = self.blocks.at(block);
            let first = self.host_page_of(block, page);
            let owed = host.take(first, pages);
            let noted = gone.is_some_and(|gone| gone.at(block).insert(first));
            if owed || noted {
                if !owed {
                    pages.extend(host.whole(first));
                }
                return Some((block, ScanPlace { block, page: first + host.per_host }, owed));
            }
        }
        None
    }

    /// Those of `run`'s pages that are dirty, where host pages are single pages. False: none is.
    /// `gone` as in [`HostPages::claim_wanted`].
    pub(crate) fn claim_run(
        &self,
        block: BlockIndex,
        run: Range<usize>,
        gone: Option<&PerBlock<DirtyBitmap>>,
        pages: &mut Vec<usize>,
    ) -> bool {
        pages.clear();
        let bitmap = &self.blocks.at(block).bitmap;
        pages.extend(run.filter(|page| bitmap.take(*page)));
        if let Some(gone) = gone {
            pages.iter().for_each(|page| _ = gone.at(block).insert(*page));
        }
        !pages.is_empty()
    }

    /// Gives back what was claimed and not sent.
    pub(crate) fn put_back(&self, block: BlockIndex, pages: &[usize]) {
        let bitmap = &self.blocks.at(block).bitmap;
        // The first page of a host page last: then all of it can be claimed.
        pages.iter().rev().for_each(|page| bitmap.set(*page));
    }

    /// Ranges of dirty pages of the block, in ascending order. Nothing else may claim meanwhile.
    pub(crate) fn dirty_ranges(&self, block: BlockIndex) -> Vec<Range<usize>> {
        let bitmap = &self.blocks.at(block).bitmap;
        let mut ranges: Vec<Range<usize>> = Vec::new();
        for word in 0..bitmap.words() {
            let mut bits = bitmap.word(word);
            while bits != 0 {
                let bit = bits.trailing_zeros();
                let run = (bits >> bit).trailing_ones();
                let first = word * PAGES_PER_WORD + bit as usize;
                let end = first + run as usize;
                match ranges.last_mut() {
                    Some(last) if last.end == first => last.end = end,
                    _ => ranges.push(first..end),
                }
                bits &= u64::MAX.checked_shl(bit + run).unwrap_or(0);
            }
        }
        ranges
    }
}

impl HostBlock {
    fn round_up(&self) {
        if self.per_host == 1 {
            return;
        }
        for first in (0..self.bitmap.pages()).step_by(self.per_host) {
            let end = (first + self.per_host).min(self.bitmap.pages());
            if (first..end).any(|page| self.bitmap.test(page)) {
                self.bitmap.set_range(first, end - first);
            }
        }
    }

    /// Takes the host page that begins at `first`. False: it is not dirty.
    fn take(&self, first: usize, pages: &mut Vec<usize>) -> bool {
        if !self.bitmap.take(first) {
            return false;
        }
        let whole = self.whole(first);
        whole.clone().skip(1).for_each(|page| _ = self.bitmap.take(page));
        pages.extend(whole);
        true
    }

    /// The host page that begins at `first`.
    fn whole(&self, first: usize) -> Range<usize> {
        first..(first + self.per_host).min(self.bitmap.pages())
    }

    /// Takes dirty host pages from `page` on; gives where to go on.
    fn claim(&self, page: usize, most: usize, pages: &mut Vec<usize>) -> usize {
        if self.per_host == 1 {
            self.claim_small(page, most, pages)
        } else {
            self.claim_large(page, most, pages)
        }
    }

    fn claim_small(&self, mut page: usize, most: usize, pages: &mut Vec<usize>) -> usize {
        while page < self.bitmap.pages() && pages.len() < most {
            let (word, bit) = (page / PAGES_PER_WORD, page % PAGES_PER_WORD);
            let dirty = self.bitmap.word(word) & (u64::MAX << bit);
            let (chosen, next) = lowest(dirty, most - pages.len());
            page = word * PAGES_PER_WORD + next;
            let mut taken = self.bitmap.take_bits(word, chosen);
            while taken != 0 {
                pages.push(word * PAGES_PER_WORD + taken.trailing_zeros() as usize);
                taken &= taken - 1;
            }
        }
        page
    }

    fn claim_large(&self, page: usize, most: usize, pages: &mut Vec<usize>) -> usize {
        let mut first = page / self.per_host * self.per_host;
        while first < self.bitmap.pages() && (pages.is_empty() || pages.len() + self.per_host <= most) {
            self.take(first, pages);
            first += self.per_host;
        }
        first
    }
}

/// The lowest `most` of `bits`, and the position behind them: 64 if there are no others.
fn lowest(bits: u64, most: usize) -> (u64, usize) {
    let mut rest = bits;
    for _ in 0..most.min(PAGES_PER_WORD) {
        rest &= rest.wrapping_sub(1);
    }
    let next = if rest == 0 { PAGES_PER_WORD } else { rest.trailing_zeros() as usize };
    (bits ^ rest, next)
}

#[cfg(all(test, not(multifd_loom)))]
mod tests {
    use super::*;
    use crate::work::Requested;

    /// Blocks with so many pages, and pages in a host page, all clean.
    fn guest(blocks: &[(usize, usize)]) -> (PerBlock<Arc<DirtyBitmap>>, HostPages) {
        let bitmaps: PerBlock<_> = blocks.iter().map(|(len, _)| Arc::new(DirtyBitmap::new(*len))).collect();
        let per_host: PerBlock<_> = blocks.iter().map(|(_, per_host)| *per_host).collect();
        let pages = HostPages::new(&bitmaps, &per_host);
        (bitmaps, pages)
    }

    #[test]
    fn a_scan_goes_round_from_its_place_and_every_page_comes_once() {
        for most in [1, 7, 64, 100, 1000] {
            let (bitmaps, host) = guest(&[(200, 1), (0, 1), (70, 1)]);
            bitmaps.iter().for_each(|bitmap| bitmap.set_range(0, bitmap.pages()));
            let first = bitmaps.find(|bitmap| bitmap.pages() == 200).unwrap();
            let mut place = ScanPlace { block: first, page: 130 };
            let (mut pages, mut seen) = (Vec::new(), Vec::new());
            while let Some(block) = host.claim(&mut place, most, &mut pages) {
                assert!(pages.len() <= most && pages.is_sorted());
                seen.extend(pages.iter().map(|page| (bitmaps.at(block).pages(), *page)));
            }
            let expected = (130..200).map(|page| (200, page)).chain((0..70).map(|page| (70, page)));
            assert!(expected.chain((0..130).map(|page| (200, page))).eq(seen.iter().copied()), "{most}");
            assert_eq!(host.left(), 0);
        }
    }

    #[test]
    fn host_pages_are_claimed_whole_and_made_whole() {
        let (bitmaps, host) = guest(&[(40, 8)]);
        let block = bitmaps.find(|_| true).unwrap();
        for page in [3, 21, 39] {
            bitmaps.at(block).set(page);
        }
        host.round_up();
        assert_eq!(host.dirty_ranges(block), [0..8, 16..24, 32..40]);
        let (mut place, mut pages) = (host.first_place().unwrap(), Vec::new());
        assert_eq!(host.claim(&mut place, 10, &mut pages), Some(block));
        assert!(pages.iter().copied().eq(0..8), "{pages:?}");
        let urgent = UrgentPages::new(4, &bitmaps);
        assert_eq!(urgent.request(WantedPage { block, page: 37 }), Requested::Queued);
        assert_eq!(urgent.request(WantedPage { block, page: 2 }), Requested::Queued);
        let wanted = host.claim_wanted(&urgent, None, &mut pages).unwrap();
        assert_eq!((wanted.0, wanted.2), (block, true));
        assert!(pages.iter().copied().eq(32..40), "{pages:?}");
        host.put_back(block, &pages);
        assert!(host.claim_wanted(&urgent, None, &mut pages).is_none(), "that one has been claimed");
        assert_eq!(host.claim(&mut place, 1000, &mut pages), Some(block));
        assert!(pages.iter().copied().eq((16..24).chain(32..40)), "{pages:?}");
        assert_eq!(host.left(), 0);
    }

    #[test]
    fn the_scan_goes_on_behind_the_page_that_was_asked_for_last() {
        let (bitmaps, host) = guest(&[(1000, 1)]);
        let block = bitmaps.find(|_| true).unwrap();
        bitmaps.at(block).set_range(0, 1000);
        let urgent = UrgentPages::new(4, &bitmaps);
        let mut pages = Vec::new();
        assert_eq!(urgent.request(WantedPage { block, page: 500 }), Requested::Queued);
        let (_, mut place, _) = host.claim_wanted(&urgent, None, &mut pages).unwrap();
        assert_eq!(pages, [500]);
        host.claim(&mut place, 3, &mut pages);
        assert_eq!(pages, [501, 502, 503]);
    }

    #[test]
    fn a_page_that_went_in_its_turn_goes_once_more_when_it_is_asked_for_and_then_never_again() {
        let (bitmaps, host) = guest(&[(40, 8)]);
        let block = bitmaps.find(|_| true).unwrap();
        bitmaps.at(block).set_range(0, 40);
        let gone = bitmaps.map(|bitmap| DirtyBitmap::new(bitmap.pages()));
        let urgent = UrgentPages::new(4, &bitmaps);
        let (mut place, mut pages) = (host.first_place().unwrap(), Vec::new());
        host.claim(&mut place, 16, &mut pages);
        let mut ask = |page| {
            assert_eq!(urgent.request(WantedPage { block, page }), Requested::Queued);
            let wanted = host.claim_wanted(&urgent, Some(&gone), &mut pages);
            wanted.map(|(_, _, owed)| (pages[0], pages.len(), owed))
        };
        assert_eq!(ask(9), Some((8, 8, false)));
        assert_eq!(ask(8), None);
        assert_eq!(ask(30), Some((24, 8, true)));
        assert_eq!(ask(31), None, "it went before its turn");
    }

    #[test]
    fn of_a_run_goes_what_is_dirty() {
        let (bitmaps, host) = guest(&[(100, 1)]);
        let block = bitmaps.find(|_| true).unwrap();
        bitmaps.at(block).set_range(60, 10);
        bitmaps.at(block).take(66);
        let (gone, mut pages) = (bitmaps.map(|_| DirtyBitmap::new(100)), Vec::new());
        assert!(host.claim_run(block, 64..72, Some(&gone), &mut pages));
        assert_eq!(pages, [64, 65, 67, 68, 69]);
        assert!(!host.claim_run(block, 64..72, Some(&gone), &mut pages));
        assert!(gone.at(block).test(67) && !gone.at(block).test(66));
    }

    #[test]
    fn ranges_join_over_words() {
        let (bitmaps, host) = guest(&[(300, 1)]);
        let block = bitmaps.find(|_| true).unwrap();
        assert_eq!(host.dirty_ranges(block), []);
        for (first, count) in [(0, 1), (10, 54), (64, 64), (128, 1), (250, 50)] {
            bitmaps.at(block).set_range(first, count);
        }
        assert_eq!(host.dirty_ranges(block), [0..1, 10..129, 250..300]);
    }
}
