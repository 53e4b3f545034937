//! One pass over the dirty pages, shared by all send workers without a lock.

use crossbeam_utils::CachePadded;

use crate::guest::{DirtyBitmap, PAGES_PER_WORD};
use crate::sync::{Arc, AtomicUsize, Ordering};

/// Bitmap words claimed in one go: 64 words are 4096 pages, 16 MiB of neighbouring guest memory.
const MOST_WORDS: usize = 64;

/// The dirty-bitmap iterator is the work distributor: workers move one cursor on by an atomic add, and own the pages of
/// the words it passed. No page is handed out twice in a round.
///
/// ```text
///  words of block 0            words of block 1
///  |--------|--------|-----|   |--------|--
///   worker A worker B  A        worker B  ...      each claim a chunk; never over a block's end
/// ```
#[derive(Debug)]
pub struct Round {
    blocks: Vec<RoundBlock>,
    chunk_words: usize,
    chunks: usize,
    /// On a cache line of its own: every worker writes it, and reads what is beside it.
    cursor: CachePadded<AtomicUsize>,
}

#[derive(Debug)]
struct RoundBlock {
    bitmap: Arc<DirtyBitmap>,
    /// Chunks of the blocks before this one.
    first_chunk: usize,
}

/// One worker's place in a round: the chunk it owns and how far it has come in it.
#[derive(Debug, Default)]
pub struct Claim {
    block: usize,
    next_word: usize,
    end_word: usize,
    /// Bits of the word before `next_word` that have not been handed out.
    bits: u64,
}

/// Pages of one block, in ascending order.
#[derive(Debug, Default)]
pub struct Batch {
    /// Index of the block.
    pub block: usize,
    /// Page numbers in the block.
    pub pages: Vec<usize>,
}

impl Round {
    /// A pass over what is set in `bitmaps` (one for each block), by `workers` workers.
    pub fn new(bitmaps: &[Arc<DirtyBitmap>], workers: usize) -> Self {
        let words: usize = bitmaps.iter().map(|bitmap| bitmap.words()).sum();
        // Small guests: at least 8 chunks a worker, so that none is idle while another has the last large one.
        let chunk_words = (words / (workers.max(1) * 8)).clamp(2, MOST_WORDS);
        let mut chunks = 0;
        let blocks = bitmaps
            .iter()
            .map(|bitmap| {
                let first_chunk = chunks;
                chunks += bitmap.words().div_ceil(chunk_words);
                RoundBlock { bitmap: Arc::clone(bitmap), first_chunk }
            })
            .collect();
        Self { blocks, chunk_words, chunks, cursor: CachePadded::new(AtomicUsize::new(0)) }
    }

    /// A pass over nothing: a sync point without pages.
    pub fn empty() -> Self {
        Self::new(&[], 1)
    }

    /// Takes one page before its turn. True: its bit was set, and the caller owns the page. False: the
    /// page is clean, or a worker that has its chunk sends it.
    pub fn take(&self, block: usize, page: usize) -> bool {
        self.blocks.get(block).is_some_and(|block| block.bitmap.take(page))
    }

    /// Fills `batch` with up to `most` pages of one block. False: the round has no more.
    pub fn claim(&self, claim: &mut Claim, most: usize, batch: &mut Batch) -> bool {
        batch.pages.clear();
        while batch.pages.len() < most {
            if claim.bits != 0 {
                if batch.pages.is_empty() {
                    batch.block = claim.block;
                } else if batch.block != claim.block {
                    // What was claimed in the next block stays with this worker for its next batch.
                    break;
                }
                claim.take_bits(most, batch);
            } else if claim.next_word < claim.end_word {
                let bitmap = self.blocks.get(claim.block).map(|block| &block.bitmap);
                claim.bits = bitmap.map_or(0, |bitmap| bitmap.take_word(claim.next_word));
                claim.next_word += 1;
            } else if !self.claim_chunk(claim) {
                break;
            }
        }
        !batch.pages.is_empty()
    }

    /// Gives back what a worker took and did not get rid of: the pages of `batch`, and what `claim` still holds.
    pub fn put_back(&self, claim: &mut Claim, batch: &Batch) {
        if let Some(block) = self.blocks.get(batch.block) {
            batch.pages.iter().for_each(|page| block.bitmap.set(*page));
        }
        // Words past `next_word` were never taken: their bits are where they were.
        if let Some(block) = self.blocks.get(claim.block)
            && claim.bits != 0
        {
            block.bitmap.set_bits((claim.next_word - 1) * PAGES_PER_WORD, claim.bits);
        }
        *claim = Claim::default();
    }

    /// Moves the shared cursor on and gives the chunk to `claim`. False: there are no more chunks.
    fn claim_chunk(&self, claim: &mut Claim) -> bool {
        let chunk = self.cursor.fetch_add(1, Ordering::Relaxed);
        if chunk >= self.chunks {
            return false;
        }
        let block = self.blocks.partition_point(|block| block.first_chunk <= chunk) - 1;
        let Some(of) = self.blocks.get(block) else { return false };
        claim.block = block;
        claim.next_word = (chunk - of.first_chunk) * self.chunk_words;
        claim.end_word = (claim.next_word + self.chunk_words).min(of.bitmap.words());
        true
    }
}

impl Claim {
    fn take_bits(&mut self, most: usize, batch: &mut Batch) {
        let base = (self.next_word - 1) * PAGES_PER_WORD;
        while self.bits != 0 && batch.pages.len() < most {
            batch.pages.push(base + self.bits.trailing_zeros() as usize);
            self.bits &= self.bits - 1;
        }
    }
}

#[cfg(all(test, not(multifd_loom)))]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn bitmaps(pages: &[usize]) -> Vec<Arc<DirtyBitmap>> {
        pages.iter().map(|pages| Arc::new(DirtyBitmap::new(*pages))).collect()
    }

    #[test]
    fn every_dirty_page_is_claimed_once_whatever_the_workers() {
        for workers in [1, 2, 5] {
            let bitmaps = bitmaps(&[70_000, 1, 64, 4096]);
            let mut expected = BTreeSet::new();
            for (block, bitmap) in bitmaps.iter().enumerate() {
                for page in (0..bitmap.pages()).filter(|page| page % 3 != 1 || page % 1000 < 200) {
                    bitmap.set(page);
                    expected.insert((block, page));
                }
            }
            let round = Round::new(&bitmaps, workers);
            let claimed: Vec<_> = std::thread::scope(|scope| {
                let run = || {
                    let (mut claim, mut batch, mut mine) = (Claim::default(), Batch::default(), Vec::new());
                    while round.claim(&mut claim, 128, &mut batch) {
                        assert!(batch.pages.len() <= 128 && batch.pages.is_sorted());
                        mine.extend(batch.pages.iter().map(|page| (batch.block, *page)));
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
            bitmaps[0].set(page);
        }
        bitmaps[1].set(7);
        let round = Round::new(&bitmaps, 1);
        let (mut claim, mut batch) = (Claim::default(), Batch::default());
        assert!(round.claim(&mut claim, 128, &mut batch));
        assert_eq!((batch.block, &batch.pages[..]), (0, &[5, 500_000, 1_000_000][..]));
        assert!(round.claim(&mut claim, 128, &mut batch));
        assert_eq!((batch.block, &batch.pages[..]), (1, &[7][..]));
        assert!(!round.claim(&mut claim, 128, &mut batch));
    }

    #[test]
    fn what_was_claimed_can_be_put_back() {
        let bitmaps = bitmaps(&[1000, 500]);
        bitmaps.iter().for_each(|bitmap| bitmap.set_range(0, bitmap.pages()));
        let round = Round::new(&bitmaps, 1);
        let (mut claim, mut batch) = (Claim::default(), Batch::default());
        let mut sent = 0;
        for _ in 0..3 {
            assert!(round.claim(&mut claim, 100, &mut batch));
            sent += batch.pages.len();
        }
        round.put_back(&mut claim, &batch);
        assert_eq!(
            bitmaps.iter().map(|bitmap| bitmap.count()).sum::<usize>(),
            1500 - (sent - batch.pages.len())
        );
    }

    #[test]
    fn nothing_dirty_is_an_empty_round() {
        let round = Round::new(&bitmaps(&[1000]), 2);
        assert!(!round.claim(&mut Claim::default(), 128, &mut Batch::default()));
    }
}
