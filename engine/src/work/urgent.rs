//! Pages that are wanted before their turn: a vCPU waits for them, at the destination of a post-copy
//! or at the source of a background snapshot.

use crate::guest::DirtyBitmap;
use crate::sync::ArrayQueue;

/// A page of one of the blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WantedPage {
    /// Index of the block.
    pub block: usize,
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
    /// The block or page is not there.
    Unknown,
}

/// A bounded queue of wanted pages, each in it at most once. Any thread may request, any worker may
/// take; neither waits for the other.
///
/// A request is about order only: whether a page still has to be sent, its dirty bit says.
#[derive(Debug)]
pub struct UrgentPages {
    queue: ArrayQueue<WantedPage>,
    /// One bit a page, for each block: the page is in the queue.
    queued: Box<[DirtyBitmap]>,
}

impl UrgentPages {
    /// A queue of at most `most` pages, at least one, of blocks with so many `pages` each. 16 bytes for
    /// each page that it can hold, and one bit for each page of the blocks.
    pub fn new(most: usize, pages: impl IntoIterator<Item = usize>) -> Self {
        let queued = pages.into_iter().map(DirtyBitmap::new).collect();
        Self { queue: ArrayQueue::new(most.max(1)), queued }
    }

    /// Asks for a page.
    pub fn request(&self, wanted: WantedPage) -> Requested {
        let Some(queued) = self.queued.get(wanted.block).filter(|block| wanted.page < block.pages()) else {
            return Requested::Unknown;
        };
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
        if let Some(queued) = self.queued.get(wanted.block) {
            queued.take(wanted.page);
        }
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

    fn page(block: usize, page: usize) -> WantedPage {
        WantedPage { block, page }
    }

    #[test]
    fn pages_come_in_the_order_of_their_requests_and_each_once() {
        let urgent = UrgentPages::new(8, [100, 10]);
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
        let urgent = UrgentPages::new(2, [10]);
        assert_eq!(urgent.request(page(0, 0)), Requested::Queued);
        assert_eq!(urgent.request(page(0, 1)), Requested::Queued);
        assert_eq!(urgent.request(page(0, 2)), Requested::Full);
        assert_eq!(urgent.pop(), Some(page(0, 0)));
        assert_eq!(urgent.request(page(0, 2)), Requested::Queued, "a refused page may be asked for again");
    }

    #[test]
    fn what_is_not_there_cannot_be_wanted() {
        let urgent = UrgentPages::new(2, [10]);
        for unknown in [page(0, 10), page(1, 0), page(usize::MAX, usize::MAX)] {
            assert_eq!(urgent.request(unknown), Requested::Unknown);
        }
        assert!(urgent.is_empty());
    }
}
