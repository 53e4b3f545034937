//! Pages that are asked for at the same time: they go in one piece.

use std::mem;

use super::wanted::{Before, Wanted, Why};
use crate::error::Result;
use crate::work::BlockIndex;

/// Most pages that go in one piece, if they are not one huge page: each waits for all of them.
const MOST: usize = 16;

/// Pages of one block that go before their turn, from one claim or several.
#[derive(Default)]
pub(super) struct Batch {
    claims: Vec<Claim>,
    /// In ascending order, as the destination takes huge pages.
    pages: Vec<usize>,
    /// What was claimed, and did not fit to the others.
    next: Option<Claim>,
}

struct Claim {
    before: Before,
    pages: Vec<usize>,
}

impl Claim {
    fn of(wanted: &Wanted) -> Result<Option<Self>> {
        let mut pages = Vec::new();
        Ok(wanted.claim(&mut pages)?.map(|before| Self { before, pages }))
    }

    /// Threads of the guest wait for it, and not only for the pages before it.
    fn is_waited_for(&self) -> bool {
        self.before.why != Why::Neighbours
    }
}

impl Batch {
    /// The next pages. `None`: nothing is wanted.
    pub(super) fn claim(&mut self, wanted: &Wanted) -> Result<Option<BlockIndex>> {
        self.claims.clear();
        self.pages.clear();
        let next = mem::take(&mut self.next);
        let Some(first) = next.map_or_else(|| Claim::of(wanted), |next| Ok(Some(next)))? else {
            return Ok(None);
        };
        let block = first.before.block;
        self.add(first);
        while self.takes_more() {
            let Some(claim) = Claim::of(wanted)? else { break };
            let fits = claim.is_waited_for() && claim.before.block == block;
            if fits && self.pages.len() + claim.pages.len() <= MOST {
                self.add(claim);
            } else {
                self.next = Some(claim);
                break;
            }
        }
        self.pages.sort_unstable();
        Ok(Some(block))
    }

    /// Behind neighbours, which nothing waits for yet, a page that is asked for meanwhile goes at
    /// once.
    fn takes_more(&self) -> bool {
        self.pages.len() < MOST && self.claims.iter().all(Claim::is_waited_for)
    }

    fn add(&mut self, claim: Claim) {
        self.pages.extend_from_slice(&claim.pages);
        self.claims.push(claim);
    }

    pub(super) fn pages(&self) -> &[usize] {
        &self.pages
    }

    /// They have been sent, in so many bytes.
    pub(super) fn sent(&self, wanted: &Wanted, bytes: usize) {
        wanted.charge(bytes);
        self.claims.iter().for_each(|claim| wanted.note_sent(claim.before, &claim.pages));
    }

    /// They have not been sent, and what was claimed behind them has not either.
    pub(super) fn put_back(&mut self, wanted: &Wanted) {
        let claims = self.claims.drain(..).chain(self.next.take());
        claims.for_each(|claim| wanted.put_back(claim.before, &claim.pages));
    }
}
