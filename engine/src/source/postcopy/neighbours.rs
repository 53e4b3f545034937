//! Pages that the guest will want next: found by the order in which it has asked, never guessed.
//!
//! ```text
//!  asked for:  7   8          9 10 11 12   13            ...
//!              new stream     (pushed)     in order again
//!                  in order: push 9..13    push 14..22: twice as many, up to MOST
//! ```
//!
//! In order is what has nothing between it that is still to be sent: pages that are there already
//! are not asked for.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Mutex;

use crate::guest::DirtyBitmap;
use crate::run::stop::lock;
use crate::work::BlockIndex;

/// Threads of the guest that read in order at the same time, and are told apart.
const STREAMS: usize = 32;

/// Most pages between two in order that have gone already.
const MOST_BETWEEN: usize = 64;

/// Pages that are pushed when the guest has asked for two in a row.
const FIRST: usize = 4;

/// Most pages that are pushed for one request.
const MOST: usize = 32;

/// Runs of pages that wait to be pushed. What is more goes in its turn.
const MAX_RUNS: usize = 64;

/// Pages of one run that go at a time: what a page that is asked for meanwhile waits for.
pub(super) const CHUNK: usize = 8;

/// The neighbours of pages that were asked for.
#[derive(Default)]
pub(in crate::source) struct Neighbours(Mutex<State>);

#[derive(Default)]
struct State {
    /// By their last use, the latest first.
    streams: VecDeque<Stream>,
    runs: VecDeque<Run>,
}

/// Requests of one thread of the guest, as it seems.
struct Stream {
    block: BlockIndex,
    /// What was pushed last, and has not been asked for; empty at first.
    pushed: Range<usize>,
    /// How many pages were pushed last.
    window: usize,
}

/// Pages to be pushed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) block: BlockIndex,
    pub(super) pages: Range<usize>,
}

impl Neighbours {
    /// A page of a block was asked for, of which the `dirty` pages are still to be sent.
    pub(in crate::source) fn note(&self, block: BlockIndex, page: usize, dirty: &DirtyBitmap) {
        let state = &mut *lock(&self.0);
        let known =
            state.streams.iter().position(|stream| stream.block == block && stream.leads_to(page, dirty));
        let Some(mut stream) = known.and_then(|at| state.streams.remove(at)) else {
            state.streams.truncate(STREAMS - 1);
            state.streams.push_front(Stream { block, pushed: page + 1..page + 1, window: 0 });
            return;
        };
        // Within what was pushed: it is on its way, or about to be.
        if page >= stream.pushed.end {
            stream.window = (stream.window * 2).clamp(FIRST, MOST);
            stream.pushed = page + 1..(page + 1 + stream.window).min(dirty.pages());
            if !stream.pushed.is_empty() {
                state.runs.truncate(MAX_RUNS - 1);
                state.runs.push_back(Run { block, pages: stream.pushed.clone() });
            }
        }
        state.streams.push_front(stream);
    }

    /// The first pages that are to be pushed, at most [`CHUNK`].
    pub(super) fn next(&self) -> Option<Run> {
        let mut state = lock(&self.0);
        let Run { block, pages } = state.runs.pop_front()?;
        let end = pages.end.min(pages.start + CHUNK);
        if end < pages.end {
            state.runs.push_front(Run { block, pages: end..pages.end });
        }
        Some(Run { block, pages: pages.start..end })
    }

    pub(in crate::source) fn is_empty(&self) -> bool {
        lock(&self.0).runs.is_empty()
    }
}

impl Stream {
    /// The page is the next in order, or one of those that were pushed.
    fn leads_to(&self, page: usize, dirty: &DirtyBitmap) -> bool {
        let Range { start, end } = self.pushed;
        let gone = |mut between: Range<usize>| between.all(|page| !dirty.test(page));
        page >= start && page <= end + MOST_BETWEEN && (page <= end || gone(end..page))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::shared::tests::ram;

    const NONE: [usize; 0] = [];

    /// Everything that is pushed after requests for `asked`, of a block of 1000 pages of which none
    /// has gone.
    fn pushed(asked: impl IntoIterator<Item = usize>) -> Vec<usize> {
        let dirty = DirtyBitmap::new(1000);
        dirty.set_range(0, 1000);
        pushed_of(&dirty, asked)
    }

    fn pushed_of(dirty: &DirtyBitmap, asked: impl IntoIterator<Item = usize>) -> Vec<usize> {
        let ram = ram(&[("a", 1)]);
        let (block, neighbours) = (ram.find("a").unwrap(), Neighbours::default());
        asked.into_iter().for_each(|page| neighbours.note(block, page, dirty));
        std::iter::from_fn(|| neighbours.next()).flat_map(|run| run.pages).collect()
    }

    #[test]
    fn pages_that_are_asked_for_at_random_have_no_neighbours() {
        assert_eq!(pushed((0..1000).map(|turn| turn * 389 % 1000)), NONE);
        assert_eq!(pushed((0..500).rev()), NONE);
        assert_eq!(pushed([5, 5, 5]), NONE);
    }

    #[test]
    fn a_guest_that_reads_in_order_gets_more_with_each_request_up_to_a_limit() {
        assert_eq!(pushed([7, 8]), [9, 10, 11, 12]);
        assert!(pushed([7, 8, 13]).into_iter().eq((9..13).chain(14..22)));
        // It asks for what is on its way: no more is pushed for that.
        assert!(pushed([7, 8, 9, 11, 13]).into_iter().eq((9..13).chain(14..22)));
        let asked = [0, 1, 6, 15, 32, 65, 98];
        let expected = [2..6, 7..15, 16..32, 33..65, 66..98, 99..131];
        assert!(pushed(asked).into_iter().eq(expected.into_iter().flatten()));
    }

    #[test]
    fn pages_that_have_gone_already_are_no_gap() {
        let dirty = DirtyBitmap::new(1000);
        (0..1000).step_by(3).for_each(|page| dirty.set(page));
        assert!(pushed_of(&dirty, [3, 6, 12]).into_iter().eq((7..11).chain(13..21)));
        assert_eq!(pushed_of(&dirty, [3, 9, 15]), NONE, "6 and 12 were passed over");
        dirty.take(6);
        assert_eq!(pushed_of(&dirty, [3, 9]), [10, 11, 12, 13]);
        assert_eq!(pushed_of(&DirtyBitmap::new(1000), [3, 500]), NONE, "too far to be in order");
    }

    #[test]
    fn nothing_is_pushed_behind_the_end_of_a_block() {
        assert_eq!(pushed([996, 997]), [998, 999]);
        assert_eq!(pushed([998, 999]), NONE);
    }

    #[test]
    fn threads_that_read_at_several_places_are_told_apart() {
        let asked = [1, 2].into_iter().flat_map(|turn| (0..16).map(move |thread| thread * 50 + turn));
        let expected = (0..16).flat_map(|thread| thread * 50 + 3..thread * 50 + 7);
        assert!(pushed(asked).into_iter().eq(expected));
    }

    #[test]
    fn what_waits_to_be_pushed_is_bounded() {
        let ram = ram(&[("a", 1)]);
        let (block, neighbours) = (ram.find("a").unwrap(), Neighbours::default());
        let dirty = DirtyBitmap::new(1 << 20);
        dirty.set_range(0, 1 << 20);
        for page in (0..10_000).map(|turn| turn * 100) {
            neighbours.note(block, page, &dirty);
            neighbours.note(block, page + 1, &dirty);
        }
        assert!(std::iter::from_fn(|| neighbours.next()).count() <= MAX_RUNS * MOST / CHUNK);
        assert!(neighbours.is_empty() && lock(&neighbours.0).streams.len() <= STREAMS);
    }
}
