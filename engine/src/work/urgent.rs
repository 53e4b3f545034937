//! Pages that are wanted before their turn: a vCPU waits for them, at the destination of a
//! post-copy or at the source of a background snapshot.

use super::{BlockIndex, PerBlock};
use crate::guest::DirtyBitmap;
use crate::sync::{Arc, ArrayQueue};

/// A page of one of the blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WantedPage {
    /// The block.
    pub block: BlockIndex,
    /// Page number in the block.
    pub page: usize,
}

/// What became of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Requested {
    /// The page is in the queue now.
    Queued,
    /// The page was in the queue before.
    Repeated,
    /// The queue is full: the page goes when the cursor comes to it.
    Full,
    /// The block has no such page.
    Unknown,
}

/// A bounded queue of wanted pages, each in it at most once. Any thread may request, any worker may
/// take; neither waits for the other.
///
/// A request is about order only: whether a page still has to be sent, its dirty bit says.
#[derive(Debug)]
pub struct UrgentPages {
    queue: ArrayQueue<WantedPage>,
    /// One bit a page: the page is in the queue.
    queued: PerBlock<DirtyBitmap>,
}

impl UrgentPages {
    /// A queue of at most `most` pages, at least one, of the blocks with these `bitmaps`. 24 bytes
    /// for each page that it can hold, and one bit for each page of the blocks.
    pub fn new(most: usize, bitmaps: &PerBlock<Arc<DirtyBitmap>>) -> Self {
        let queued = bitmaps.map(|bitmap| DirtyBitmap::new(bitmap.pages()));
        Self { queue: ArrayQueue::new(most.max(1)), queued }
    }

    /// Asks for a page.
    pub fn request(&self, wanted: WantedPage) -> Requested {
        let queued = self.queued.at(wanted.block);
        if wanted.page >= queued.pages() {
            return Requested::Unknown;
        }
        if !queued.insert(wanted.page) {
            return Requested::Repeated;
        }
        if self.queue.push(wanted).is_err() {
            queued.take(wanted.page);
            return Requested::Full;
        }
        Requested::Queued
    }

    /// The page that was asked for first. From now on it can be asked for again.
    pub(super) fn pop(&self) -> Option<WantedPage> {
        let wanted = self.queue.pop()?;
        self.queued.at(wanted.block).take(wanted.page);
        Some(wanted)
    }

    /// True if no page is wanted.
    pub fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }
}

#[cfg(all(test, not(multifd_loom)))]
mod tests {
    use super::*;

    /// A queue of at most `most` pages of blocks with so many `pages` each, and the blocks.
    fn queue(most: usize, pages: &[usize]) -> (UrgentPages, Vec<BlockIndex>) {
        let bitmaps: PerBlock<_> = pages.iter().map(|pages| Arc::new(DirtyBitmap::new(*pages))).collect();
        (UrgentPages::new(most, &bitmaps), bitmaps.indexed().map(|(block, _)| block).collect())
    }

    #[test]
    fn pages_come_in_the_order_of_their_requests_and_each_once() {
        let (urgent, blocks) = queue(8, &[100, 10]);
        let page = |block: usize, page| WantedPage { block: blocks[block], page };
        assert_eq!(urgent.request(page(0, 99)), Requested::Queued);
        assert_eq!(urgent.request(page(1, 3)), Requested::Queued);
        assert_eq!(urgent.request(page(0, 99)), Requested::Repeated);
        assert_eq!(urgent.pop(), Some(page(0, 99)));
        assert_eq!(urgent.request(page(0, 99)), Requested::Queued, "it was taken before");
        assert_eq!((urgent.pop(), urgent.pop()), (Some(page(1, 3)), Some(page(0, 99))));
        assert_eq!(urgent.pop(), None);
    }

    #[test]
    fn a_full_queue_takes_no_more_until_there_is_room() {
        let (urgent, blocks) = queue(2, &[10]);
        let page = |page| WantedPage { block: blocks[0], page };
        assert_eq!(urgent.request(page(0)), Requested::Queued);
        assert_eq!(urgent.request(page(1)), Requested::Queued);
        assert_eq!(urgent.request(page(2)), Requested::Full);
        assert_eq!(urgent.pop(), Some(page(0)));
        assert_eq!(urgent.request(page(2)), Requested::Queued, "a refused page may be asked for again");
    }

    #[test]
    fn a_page_past_the_end_of_its_block_cannot_be_wanted() {
        let (urgent, blocks) = queue(2, &[10]);
        for page in [10, usize::MAX] {
            assert_eq!(urgent.request(WantedPage { block: blocks[0], page }), Requested::Unknown);
        }
        assert!(urgent.is_empty());
    }
}
