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
    urgent: Option<&'r UrgentPages>,
}

impl<'r> Next<'r> {
    /// The pages of `round`, those in `urgent` before their turn. `None`: all in their turn.
    pub fn new(round: &'r Round, urgent: Option<&'r UrgentPages>) -> Self {
        Self { round, urgent }
    }

    /// The next pages, at most `most` and of one block. `None`: the round has no more.
    pub fn claim<'p>(&self, place: &'p mut Place, most: usize) -> Option<Batch<'p>> {
        if let Some(urgent) = self.urgent
            && self.claim_urgent(urgent, place, most)
        {
            return place.claim.batch(Origin::Urgent);
        }
        self.round.claim(&mut place.claim, most)
    }

    /// Gives back what a worker took and did not send: its last batch, and what is left of its
    /// chunk.
    pub fn put_back(&self, place: &mut Place) {
        place.held = None; // its dirty bit was not taken
        self.round.put_back(&mut place.claim);
    }

    /// Wanted pages of one block, as far as their bits are still set: the others are on their way.
    fn claim_urgent(&self, urgent: &UrgentPages, place: &mut Place, most: usize) -> bool {
        let Place { claim, held } = place;
        // Two loads where nothing is wanted.
        if held.is_none() && urgent.is_empty() {
            return false;
        }
        claim.block = None;
        claim.pages.clear();
        while claim.pages.len() < most {
            let Some(wanted) = held.take().or_else(|| urgent.pop()) else { break };
            if claim.block.is_some_and(|block| block != wanted.block) {
                *held = Some(wanted);
                break;
            }
            if self.round.take(wanted.block, wanted.page) {
                claim.block = Some(wanted.block);
                claim.pages.push(wanted.page);
            }
        }
        claim.pages.sort_unstable();
        claim.block.is_some()
    }
}

#[cfg(all(test, not(multifd_loom)))]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::guest::DirtyBitmap;
    use crate::work::{PerBlock, Requested};

    type Bitmaps = PerBlock<Arc<DirtyBitmap>>;

    /// Two blocks of 200 and 100 pages, all dirty.
    fn guest() -> (Bitmaps, Round, UrgentPages) {
        let bitmaps: Bitmaps = [200, 100].map(DirtyBitmap::new).into_iter().map(Arc::new).collect();
        bitmaps.iter().for_each(|bitmap| bitmap.set_range(0, bitmap.pages()));
        let (round, urgent) = (Round::new(&bitmaps, 1), UrgentPages::new(16, &bitmaps));
        (bitmaps, round, urgent)
    }

    /// Asks for pages of the block that has `len`.
    fn want(bitmaps: &Bitmaps, urgent: &UrgentPages, pages: &[(usize, usize)]) {
        for (len, page) in pages {
            let block = bitmaps.find(|bitmap| bitmap.pages() == *len);
            let requested = block.map(|block| urgent.request(WantedPage { block, page: *page }));
            assert_eq!(requested, Some(Requested::Queued));
        }
    }

    #[test]
    fn wanted_pages_go_first_block_by_block_and_then_the_cursor_goes_on() {
        let (bitmaps, round, urgent) = guest();
        let next = Next::new(&round, Some(&urgent));
        let (mut place, mut sent) = (Place::default(), 0);
        let mut claimed = || {
            let Batch { block, pages, origin } = next.claim(&mut place, 50)?;
            sent += pages.len();
            Some((origin, bitmaps.at(block).pages(), pages.to_vec()))
        };
        assert_eq!(claimed().unwrap().0, Origin::Cursor);
        want(&bitmaps, &urgent, &[(200, 150), (200, 140), (100, 7), (200, 160)]);
        assert_eq!(claimed(), Some((Origin::Urgent, 200, vec![140, 150])));
        assert_eq!(claimed(), Some((Origin::Urgent, 100, vec![7])));
        assert_eq!(claimed(), Some((Origin::Urgent, 200, vec![160])));
        while claimed().is_some() {}
        assert_eq!(sent, 300, "each page once");
        assert!(bitmaps.iter().all(|bitmap| bitmap.count() == 0));
    }

    #[test]
    fn a_wanted_page_that_was_sent_is_not_sent_again() {
        let (bitmaps, round, urgent) = guest();
        let next = Next::new(&round, Some(&urgent));
        let mut place = Place::default();
        while next.claim(&mut place, 128).is_some() {}
        want(&bitmaps, &urgent, &[(200, 1), (100, 1)]);
        assert_eq!(next.claim(&mut place, 128), None);
        assert!(urgent.is_empty());
    }

    #[test]
    fn what_a_worker_could_not_send_is_dirty_again() {
        let (bitmaps, round, urgent) = guest();
        let next = Next::new(&round, Some(&urgent));
        let mut place = Place::default();
        assert_eq!(next.claim(&mut place, 10).unwrap().origin, Origin::Cursor);
        want(&bitmaps, &urgent, &[(100, 30), (100, 31), (200, 199)]);
        assert_eq!(next.claim(&mut place, 10).unwrap().origin, Origin::Urgent);
        next.put_back(&mut place);
        assert_eq!(bitmaps.iter().map(|bitmap| bitmap.count()).sum::<usize>(), 300 - 10);
    }
}
