//! One pass over the dirty pages, shared by all send workers without a lock.

use crossbeam_utils::CachePadded;

use super::{BlockIndex, Origin, PerBlock};
use crate::guest::{DirtyBitmap, PAGES_PER_WORD};
use crate::sync::{Arc, AtomicUsize, Ordering};

/// Bitmap words claimed in one go: 64 words are 4096 pages, 16 MiB of neighbouring guest memory.
const MOST_WORDS: usize = 64;

/// Words of a huge page of 2 MiB.
const HUGE_WORDS: usize = 8;

/// The dirty-bitmap iterator is the work distributor: workers move one cursor on by an atomic add,
/// and own the pages of the words it passed. No page is handed out twice in a round.
///
/// ```text
///  words of block 0            words of block 1
///  |--------|--------|-----|   |--------|--
///   worker A worker B  A        worker B  ...      each claim a chunk; never over a block's end
/// ```
#[derive(Debug)]
pub struct Round {
    blocks: PerBlock<RoundBlock>,
    chunk_words: usize,
    /// On a cache line of its own: every worker writes it, and reads what is beside it.
    cursor: CachePadded<AtomicUsize>,
}

#[derive(Debug)]
struct RoundBlock {
    bitmap: Arc<DirtyBitmap>,
    /// Pages that were claimed, if that is noted.
    claimed: Option<Arc<DirtyBitmap>>,
    /// Chunks of the blocks before this one.
    first_chunk: usize,
}

/// One worker's place in a round: the chunk it owns, how far it has come in it, and its last batch.
#[derive(Debug, Default)]
pub struct Claim {
    chunk: Option<Chunk>,
    /// The block of the last batch.
    pub(super) block: Option<BlockIndex>,
    /// The pages of the last batch, which the worker owns until it claims again or gives them back.
    pub(super) pages: Vec<usize>,
}

#[derive(Debug)]
struct Chunk {
    block: BlockIndex,
    next_word: usize,
    end_word: usize,
    /// Bits of the word before `next_word` that have not been handed out.
    bits: u64,
}

/// Pages that a worker owns until it claims again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Batch<'c> {
    /// Their block.
    pub block: BlockIndex,
    /// Their numbers in the block, in ascending order; at least one.
    pub pages: &'c [usize],
    /// Why they go now.
    pub origin: Origin,
}

impl Round {
    /// A pass over what is set in `bitmaps`, by `workers` workers.
    pub fn new(bitmaps: &PerBlock<Arc<DirtyBitmap>>, workers: usize) -> Self {
        let words: usize = bitmaps.iter().map(|bitmap| bitmap.words()).sum();
        // Small guests: at least 8 chunks a worker, so that none is idle while another has the last
        // large one.
        let mut chunk_words = (words / (workers.max(1) * 8)).clamp(2, MOST_WORDS);
        if chunk_words > HUGE_WORDS {
            // Whole huge pages, so that no two workers, and at the destination no two channels,
            // fault in one and the same.
            chunk_words -= chunk_words % HUGE_WORDS;
        }
        let mut chunks = 0;
        let blocks = bitmaps.map(|bitmap| {
            let first_chunk = chunks;
            chunks += bitmap.words().div_ceil(chunk_words);
            RoundBlock { bitmap: Arc::clone(bitmap), claimed: None, first_chunk }
        });
        Self { blocks, chunk_words, cursor: CachePadded::new(AtomicUsize::new(0)) }
    }

    /// The same, and every page that is claimed is noted in `claimed`, bitmaps of the same blocks.
    #[must_use]
    pub fn noting(mut self, claimed: &PerBlock<Arc<DirtyBitmap>>) -> Self {
        let blocks = self.blocks.iter().zip(claimed.iter()).map(|(block, claimed)| RoundBlock {
            bitmap: Arc::clone(&block.bitmap),
            claimed: Some(Arc::clone(claimed)),
            first_chunk: block.first_chunk,
        });
        self.blocks = blocks.collect();
        self
    }

    /// A pass over nothing: a sync point without pages.
    pub fn empty() -> Self {
        Self::new(&PerBlock::from_iter([]), 1)
    }

    /// Takes one page before its turn. True: its bit was set, and the caller owns the page. False:
    /// the page is clean, or a worker that has its chunk sends it.
    pub fn take(&self, block: BlockIndex, page: usize) -> bool {
        let RoundBlock { bitmap, claimed, .. } = self.blocks.at(block);
        let taken = bitmap.take(page);
        if let Some(claimed) = claimed.as_ref().filter(|_| taken) {
            claimed.set(page);
        }
        taken
    }

    /// The next pages, at most `most` and of one block. `None`: the round has no more.
    pub fn claim<'c>(&self, claim: &'c mut Claim, most: usize) -> Option<Batch<'c>> {
        claim.pages.clear();
        claim.block = None;
        while claim.pages.len() < most {
            let Some(chunk) = &mut claim.chunk else {
                claim.chunk = self.claim_chunk();
                if claim.chunk.is_none() {
                    break;
                }
                continue;
            };
            if chunk.bits != 0 {
                // What was claimed in the next block stays with this worker for its next batch.
                if *claim.block.get_or_insert(chunk.block) != chunk.block {
                    break;
                }
                chunk.take_bits(most, &mut claim.pages);
            } else if chunk.next_word < chunk.end_word {
                let RoundBlock { bitmap, claimed, .. } = self.blocks.at(chunk.block);
                chunk.bits = bitmap.take_word(chunk.next_word);
                if let Some(claimed) = claimed {
                    claimed.set_bits(chunk.next_word * PAGES_PER_WORD, chunk.bits);
                }
                chunk.next_word += 1;
            } else {
                claim.chunk = None;
            }
        }
        claim.batch(Origin::Cursor)
    }

    /// Gives back what a worker took and did not get rid of: the pages of its last batch, and what
    /// is left of its chunk.
    pub fn put_back(&self, claim: &mut Claim) {
        if let Some(block) = claim.block.take() {
            let bitmap = &self.blocks.at(block).bitmap;
            claim.pages.drain(..).for_each(|page| bitmap.set(page));
        }
        // Words past `next_word` were never taken: their bits are where they were.
        if let Some(chunk) = claim.chunk.take().filter(|chunk| chunk.bits != 0) {
            let bitmap = &self.blocks.at(chunk.block).bitmap;
            bitmap.set_bits((chunk.next_word - 1) * PAGES_PER_WORD, chunk.bits);
        }
    }

    /// Moves the shared cursor on and gives its chunk to the caller. `None`: there are no more.
    fn claim_chunk(&self) -> Option<Chunk> {
        let chunk = self.cursor.fetch_add(1, Ordering::Relaxed);
        // Only the last block can begin at the chunk or before it and end before it.
        let block = self.blocks.last_before(|block| block.first_chunk <= chunk)?;
        let RoundBlock { bitmap, first_chunk, .. } = self.blocks.at(block);
        let next_word = (chunk - first_chunk) * self.chunk_words;
        let end_word = (next_word + self.chunk_words).min(bitmap.words());
        (next_word < end_word).then_some(Chunk { block, next_word, end_word, bits: 0 })
    }
}

impl Claim {
    /// What was claimed last. `None`: nothing.
    pub(super) fn batch(&self, origin: Origin) -> Option<Batch<'_>> {
        let block = self.block.filter(|_| !self.pages.is_empty())?;
        Some(Batch { block, pages: &self.pages, origin })
    }
}

impl Chunk {
    fn take_bits(&mut self, most: usize, pages: &mut Vec<usize>) {
        let base = (self.next_word - 1) * PAGES_PER_WORD;
        while self.bits != 0 && pages.len() < most {
            pages.push(base + self.bits.trailing_zeros() as usize);
            self.bits &= self.bits - 1;
        }
    }
}

#[cfg(all(test, not(multifd_loom)))]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn bitmaps(pages: &[usize]) -> PerBlock<Arc<DirtyBitmap>> {
        pages.iter().map(|pages| Arc::new(DirtyBitmap::new(*pages))).collect()
    }

    #[test]
    fn every_dirty_page_is_claimed_once_whatever_the_workers() {
        for workers in [1, 2, 5] {
            let bitmaps = bitmaps(&[70_000, 0, 1, 64, 4096, 0]);
            let mut expected = BTreeSet::new();
            for (block, bitmap) in bitmaps.indexed() {
                for page in (0..bitmap.pages()).filter(|page| page % 3 != 1 || page % 1000 < 200) {
                    bitmap.set(page);
                    expected.insert((block, page));
                }
            }
            let round = Round::new(&bitmaps, workers);
            let claimed: Vec<_> = std::thread::scope(|scope| {
                let run = || {
                    let (mut claim, mut mine) = (Claim::default(), Vec::new());
                    while let Some(Batch { block, pages, origin }) = round.claim(&mut claim, 128) {
                        assert!(pages.len() <= 128 && pages.is_sorted() && origin == Origin::Cursor);
                        mine.extend(pages.iter().map(|page| (block, *page)));
                    }
                    mine
                };
                let threads: Vec<_> = (0..workers).map(|_| scope.spawn(run)).collect();
                threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
            });
            assert_eq!(claimed.len(), expected.len(), "no page twice");
            assert_eq!(claimed.into_iter().collect::<BTreeSet<_>>(), expected);
            assert!(bitmaps.iter().all(|bitmap| bitmap.count() == 0));
        }
    }

    #[test]
    fn a_batch_spans_clean_chunks_but_not_blocks() {
        let bitmaps = bitmaps(&[1 << 20, 1 << 20]);
        for page in [5, 500_000, 1_000_000] {
            bitmaps[..][0].set(page);
        }
        bitmaps[..][1].set(7);
        let round = Round::new(&bitmaps, 1);
        let mut claim = Claim::default();
        let first = round.claim(&mut claim, 128).unwrap();
        assert_eq!(first.pages, [5, 500_000, 1_000_000]);
        assert_eq!(bitmaps.at(first.block).pages(), 1 << 20);
        assert_eq!(round.claim(&mut claim, 128).unwrap().pages, [7]);
        assert_eq!(round.claim(&mut claim, 128), None);
    }

    #[test]
    fn what_was_claimed_can_be_put_back() {
        let bitmaps = bitmaps(&[1000, 500]);
        bitmaps.iter().for_each(|bitmap| bitmap.set_range(0, bitmap.pages()));
        let round = Round::new(&bitmaps, 1);
        let (mut claim, mut sent) = (Claim::default(), 0);
        for batch in 0..3 {
            let pages = round.claim(&mut claim, 100).unwrap().pages.len();
            sent += if batch < 2 { pages } else { 0 };
        }
        round.put_back(&mut claim);
        round.put_back(&mut claim); // once is enough
        assert_eq!(bitmaps.iter().map(|bitmap| bitmap.count()).sum::<usize>(), 1500 - sent);
    }

    #[test]
    fn what_was_claimed_is_noted_also_what_was_put_back() {
        let (bitmaps, claimed) = (bitmaps(&[1000, 500]), bitmaps(&[1000, 500]));
        bitmaps.iter().for_each(|bitmap| bitmap.set_range(0, 300));
        let round = Round::new(&bitmaps, 1).noting(&claimed);
        let mut claim = Claim::default();
        while round.claim(&mut claim, 100).is_some() {}
        assert_eq!(claimed.iter().map(|bitmap| bitmap.count()).collect::<Vec<_>>(), [300, 300]);
        bitmaps[0].set(999);
        let round = Round::new(&bitmaps, 1).noting(&claimed);
        assert!(round.take(bitmaps.find(|bitmap| bitmap.pages() == 1000).unwrap(), 999));
        assert!(claimed[0].test(999) && !claimed[0].test(998));
    }

    #[test]
    fn workers_do_not_share_a_huge_page_of_a_guest_of_some_size() {
        for pages in [70_000, 33_000, 1 << 20] {
            let bitmaps = bitmaps(&[pages]);
            bitmaps.iter().for_each(|bitmap| bitmap.set_range(0, pages));
            let round = Round::new(&bitmaps, 5);
            // Each takes a chunk of its own.
            let first = |_| round.claim(&mut Claim::default(), 1).unwrap().pages[0];
            let starts: Vec<_> = (0..5).map(first).collect();
            assert!(starts.iter().all(|first| first % 512 == 0), "{pages}: {starts:?}");
        }
    }

    #[test]
    fn nothing_dirty_is_an_empty_round() {
        for bitmaps in [bitmaps(&[1000]), bitmaps(&[0]), bitmaps(&[])] {
            assert_eq!(Round::new(&bitmaps, 2).claim(&mut Claim::default(), 128), None);
        }
    }
}
