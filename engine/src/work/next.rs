//! The choice of a worker's next pages.

use super::{Batch, Claim, Round, UrgentPages, WantedPage};

/// Where a batch came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// Pages that are wanted now.
    Urgent,
    /// Pages whose turn it is.
    Cursor,
}

/// One worker's place in a round.
#[derive(Debug, Default)]
pub struct Place {
    claim: Claim,
    /// A wanted page of another block than those of the batch that it was found for.
    held: Option<WantedPage>,
}

/// The pages of a round, those that are wanted first.
#[derive(Clone, Copy, Debug)]
pub struct Next<'r> {
    round: &'r Round,
    urgent: &'r UrgentPages,
}

impl<'r> Next<'r> {
    /// The pages of `round`, those in `urgent` before their turn.
    pub fn new(round: &'r Round, urgent: &'r UrgentPages) -> Self {
        Self { round, urgent }
    }

    /// Fills `batch` with up to `most` pages of one block, and says where they came from. `None`: the
    /// round has no more.
    pub fn claim(&self, place: &mut Place, most: usize, batch: &mut Batch) -> Option<Origin> {
        // Two loads where nothing is wanted, which is all of a pre-copy.
        if (place.held.is_some() || !self.urgent.is_empty()) && self.claim_urgent(place, most, batch) {
            return Some(Origin::Urgent);
        }
        self.round.claim(&mut place.claim, most, batch).then_some(Origin::Cursor)
    }

    /// Gives back what a worker took and did not send.
    pub fn put_back(&self, place: &mut Place, batch: &Batch) {
        place.held = None; // its dirty bit was not taken
        self.round.put_back(&mut place.claim, batch);
    }

    /// Wanted pages of one block, as far as their bits are still set: the others are on their way.
    fn claim_urgent(&self, place: &mut Place, most: usize, batch: &mut Batch) -> bool {
        batch.pages.clear();
        while batch.pages.len() < most {
            let Some(wanted) = place.held.take().or_else(|| self.urgent.pop()) else { break };
            if !batch.pages.is_empty() && wanted.block != batch.block {
                place.held = Some(wanted);
                break;
            }
            if self.round.take(wanted.block, wanted.page) {
                batch.block = wanted.block;
                batch.pages.push(wanted.page);
            }
        }
        !batch.pages.is_empty()
    }
}

#[cfg(all(test, not(multifd_loom)))]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::guest::DirtyBitmap;
    use crate::work::Requested;

    /// Two blocks of 200 and 100 pages, all dirty.
    fn guest() -> (Vec<Arc<DirtyBitmap>>, Round, UrgentPages) {
        let bitmaps: Vec<_> = [200, 100].map(DirtyBitmap::new).into_iter().map(Arc::new).collect();
        bitmaps.iter().for_each(|bitmap| bitmap.set_range(0, bitmap.pages()));
        let round = Round::new(&bitmaps, 1);
        (bitmaps, round, UrgentPages::new(16, [200, 100]))
    }

    fn want(urgent: &UrgentPages, pages: &[(usize, usize)]) {
        for (block, page) in pages {
            assert_eq!(urgent.request(WantedPage { block: *block, page: *page }), Requested::Queued);
        }
    }

    #[test]
    fn wanted_pages_go_first_block_by_block_and_then_the_cursor_goes_on() {
        let (bitmaps, round, urgent) = guest();
        let next = Next::new(&round, &urgent);
        let (mut place, mut batch, mut sent) = (Place::default(), Batch::default(), 0);
        let mut claimed = |batch: &mut Batch| {
            let origin = next.claim(&mut place, 50, batch);
            sent += if origin.is_some() { batch.pages.len() } else { 0 };
            origin
        };
        assert_eq!(claimed(&mut batch), Some(Origin::Cursor));
        want(&urgent, &[(0, 150), (0, 140), (1, 7), (0, 160)]);
        assert_eq!(claimed(&mut batch), Some(Origin::Urgent));
        assert_eq!((batch.block, &batch.pages[..]), (0, &[150, 140][..]));
        assert_eq!(claimed(&mut batch), Some(Origin::Urgent));
        assert_eq!((batch.block, &batch.pages[..]), (1, &[7][..]));
        assert_eq!(claimed(&mut batch), Some(Origin::Urgent));
        assert_eq!((batch.block, &batch.pages[..]), (0, &[160][..]));
        while claimed(&mut batch).is_some() {}
        assert_eq!(sent, 300, "each page once");
        assert!(bitmaps.iter().all(|bitmap| bitmap.count() == 0));
    }

    #[test]
    fn a_wanted_page_that_was_sent_is_not_sent_again() {
        let (_, round, urgent) = guest();
        let next = Next::new(&round, &urgent);
        let (mut place, mut batch) = (Place::default(), Batch::default());
        while next.claim(&mut place, 128, &mut batch).is_some() {}
        want(&urgent, &[(0, 1), (1, 1)]);
        assert_eq!(next.claim(&mut place, 128, &mut batch), None);
        assert!(urgent.is_empty());
    }

    #[test]
    fn what_a_worker_could_not_send_is_dirty_again() {
        let (bitmaps, round, urgent) = guest();
        let next = Next::new(&round, &urgent);
        let (mut place, mut batch) = (Place::default(), Batch::default());
        assert_eq!(next.claim(&mut place, 10, &mut batch), Some(Origin::Cursor));
        want(&urgent, &[(1, 30), (1, 31), (0, 199)]);
        assert_eq!(next.claim(&mut place, 10, &mut batch), Some(Origin::Urgent));
        next.put_back(&mut place, &batch);
        assert_eq!(bitmaps.iter().map(|bitmap| bitmap.count()).sum::<usize>(), 300 - 10);
    }
}
