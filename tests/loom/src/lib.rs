//! The engine's claim cursor, stop switch and set of open channels, run under every interleaving
//! that loom finds.
//!
//! The files are the engine's own, compiled here with loom's primitives in the place of
//! `crate::sync`.
#![cfg(test)]
#![expect(dead_code, reason = "only what is checked here is used here")]

mod sync {
    pub(crate) use loom::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
    pub(crate) use loom::sync::{Arc, Condvar, Mutex, MutexGuard};
    pub(crate) use std::sync::PoisonError;

    /// Stands for crossbeam's queue, which loom cannot look into: what is checked is its use.
    #[derive(Debug)]
    pub(crate) struct ArrayQueue<T> {
        most: usize,
        items: Mutex<std::collections::VecDeque<T>>,
    }

    impl<T> ArrayQueue<T> {
        pub(crate) fn new(most: usize) -> Self {
            Self { most, items: Mutex::new(std::collections::VecDeque::new()) }
        }

        pub(crate) fn push(&self, item: T) -> Result<(), T> {
            let mut items = self.items.lock().unwrap();
            if items.len() == self.most {
                return Err(item);
            }
            items.push_back(item);
            Ok(())
        }

        pub(crate) fn pop(&self) -> Option<T> {
            self.items.lock().unwrap().pop_front()
        }

        pub(crate) fn is_empty(&self) -> bool {
            self.items.lock().unwrap().is_empty()
        }
    }
}

/// Stands for the engine's error.
mod error {
    #[derive(Debug, thiserror::Error)]
    #[error("cause {0}")]
    pub(crate) struct Error(pub(crate) u32);
}

#[path = "."]
mod run {
    #[path = "../../../engine/src/run/open_set.rs"]
    pub(crate) mod open_set;
    #[path = "../../../engine/src/run/stop.rs"]
    pub(crate) mod stop;
}

#[path = "."]
mod guest {
    #[path = "../../../engine/src/guest/bitmap.rs"]
    mod bitmap;

    pub(crate) use bitmap::{DirtyBitmap, PAGES_PER_WORD};
}

#[path = "."]
mod work {
    #[path = "../../../engine/src/work/blocks.rs"]
    mod blocks;
    #[path = "../../../engine/src/work/next.rs"]
    mod next;
    #[path = "../../../engine/src/work/round.rs"]
    mod round;
    #[path = "../../../engine/src/work/urgent.rs"]
    mod urgent;

    pub(crate) use blocks::{BlockIndex, PerBlock};
    pub(crate) use next::{Next, Origin, Place};
    pub(crate) use round::{Batch, Claim, Round};
    pub(crate) use urgent::{Requested, UrgentPages, WantedPage};
}

use loom::thread;

use error::Error;
use guest::DirtyBitmap;
use run::open_set::OpenSet;
use run::stop::{Monitor, StopSwitch};
use sync::Arc;
use work::{Claim, Next, PerBlock, Place, Requested, Round, UrgentPages, WantedPage};

/// Two words are one chunk: three chunks.
const PAGES: usize = 5 * 64;

/// The blocks of a guest that has one.
fn only(bitmap: &Arc<DirtyBitmap>) -> PerBlock<Arc<DirtyBitmap>> {
    [Arc::clone(bitmap)].into_iter().collect()
}

fn wanted(blocks: &PerBlock<Arc<DirtyBitmap>>, page: usize) -> WantedPage {
    WantedPage { block: blocks.find(|_| true).unwrap(), page }
}

fn claim_all(round: &Round) -> Vec<usize> {
    let (mut claim, mut pages) = (Claim::default(), Vec::new());
    while let Some(batch) = round.claim(&mut claim, 128) {
        pages.extend(batch.pages);
    }
    pages
}

fn send_all(next: &Next<'_>) -> Vec<usize> {
    let (mut place, mut pages) = (Place::default(), Vec::new());
    while let Some(batch) = next.claim(&mut place, 128) {
        pages.extend(batch.pages);
    }
    pages
}

#[test]
fn two_workers_claim_every_page_once() {
    loom::model(|| {
        let bitmap = Arc::new(DirtyBitmap::new(PAGES));
        [0, 63, 64, 200, 319].into_iter().for_each(|page| bitmap.set(page));
        let round = Arc::new(Round::new(&only(&bitmap), 2));
        let other = Arc::clone(&round);
        let worker = thread::spawn(move || claim_all(&other));
        let mut pages = claim_all(&round);
        pages.extend(worker.join().unwrap());
        pages.sort_unstable();
        assert_eq!(pages, [0, 63, 64, 200, 319]);
        assert_eq!(bitmap.count(), 0);
    });
}

#[test]
fn a_page_that_is_set_meanwhile_is_claimed_or_still_set() {
    loom::model(|| {
        let bitmap = Arc::new(DirtyBitmap::new(64));
        bitmap.set(3);
        let round = Arc::new(Round::new(&only(&bitmap), 1));
        let log = Arc::clone(&bitmap);
        let writer = thread::spawn(move || log.set(5));
        let claimed = claim_all(&round);
        writer.join().unwrap();
        assert!(claimed.contains(&3));
        assert!(claimed.contains(&5) != bitmap.test(5), "once, now or in the next round");
    });
}

#[test]
fn who_takes_a_bit_sees_the_write_before_it() {
    loom::model(|| {
        let bitmap = Arc::new(DirtyBitmap::new(64));
        let memory = Arc::new(sync::AtomicU64::new(0));
        let (log, ram) = (Arc::clone(&bitmap), Arc::clone(&memory));
        let writer = thread::spawn(move || {
            ram.store(7, sync::Ordering::Relaxed);
            log.set(0);
        });
        let taken = Arc::new(DirtyBitmap::new(64));
        bitmap.move_to(&taken);
        if taken.test(0) {
            assert_eq!(memory.load(sync::Ordering::Relaxed), 7);
        }
        writer.join().unwrap();
    });
}

#[test]
fn what_a_failed_worker_puts_back_is_not_lost() {
    loom::model(|| {
        let bitmap = Arc::new(DirtyBitmap::new(PAGES));
        bitmap.set_range(60, 140);
        let round = Arc::new(Round::new(&only(&bitmap), 2));
        let other = Arc::clone(&round);
        let worker = thread::spawn(move || {
            let mut claim = Claim::default();
            if other.claim(&mut claim, 100).is_some() {
                other.put_back(&mut claim);
            }
        });
        let sent = claim_all(&round).len();
        worker.join().unwrap();
        assert_eq!(sent + bitmap.count(), 140);
    });
}

#[test]
fn of_cursor_and_request_one_sends_the_page() {
    loom::model(|| {
        let bitmap = Arc::new(DirtyBitmap::new(64));
        bitmap.set_range(3, 2);
        let round = Arc::new(Round::new(&only(&bitmap), 2));
        let urgent = Arc::new(UrgentPages::new(2, &only(&bitmap)));
        let (wants, served) = (Arc::clone(&urgent), Arc::clone(&urgent));
        let page = wanted(&only(&bitmap), 4);
        let asking = thread::spawn(move || assert_eq!(wants.request(page), Requested::Queued));
        let other = Arc::clone(&round);
        let worker = thread::spawn(move || send_all(&Next::new(&other, Some(&served))));
        let mut pages = send_all(&Next::new(&round, Some(&urgent)));
        asking.join().unwrap();
        pages.extend(worker.join().unwrap());
        // The request may come when the round is over: then its page has gone.
        pages.extend(send_all(&Next::new(&round, Some(&urgent))));
        pages.sort_unstable();
        assert_eq!(pages, [3, 4], "each page once");
        assert!(urgent.is_empty());
    });
}

#[test]
fn a_page_that_two_ask_for_is_in_the_queue_once_and_can_be_asked_for_again() {
    loom::model(|| {
        let bitmap = Arc::new(DirtyBitmap::new(64));
        let round = Round::new(&only(&bitmap), 1);
        let urgent = Arc::new(UrgentPages::new(2, &only(&bitmap)));
        let wanted = wanted(&only(&bitmap), 4);
        let other = Arc::clone(&urgent);
        let asking = thread::spawn(move || other.request(wanted));
        let here = urgent.request(wanted);
        let there = asking.join().unwrap();
        let queued = [here, there].iter().filter(|outcome| **outcome == Requested::Queued).count();
        assert_eq!(queued, 1);
        assert!(send_all(&Next::new(&round, Some(&urgent))).is_empty(), "a clean page is not sent");
        assert_eq!(urgent.request(wanted), Requested::Queued);
    });
}

#[test]
fn a_waiter_is_always_woken() {
    loom::model(|| {
        let stop = StopSwitch::default();
        let monitor = Monitor::new(false, &stop);
        let (other, tripping) = (monitor.clone(), stop.clone());
        let thread = thread::spawn(move || {
            // Whichever comes first must end the wait.
            tripping.trip(Error(1));
            other.modify_and_notify(|value| *value = true);
        });
        monitor.wait(&stop, None, |value| value.then_some(()));
        thread.join().unwrap();
    });
}

#[test]
fn of_two_causes_one_wins_and_every_action_runs_once() {
    loom::model(|| {
        let stop = StopSwitch::default();
        let runs = Arc::new(sync::AtomicUsize::new(0));
        let (tripping, counted) = (stop.clone(), Arc::clone(&runs));
        let thread = thread::spawn(move || tripping.trip(Error(1)));
        stop.on_trip(move || _ = counted.fetch_add(1, sync::Ordering::Relaxed));
        stop.trip(Error(2));
        thread.join().unwrap();
        assert_eq!(runs.load(sync::Ordering::Relaxed), 1);
        assert!(matches!(stop.cause_or(Error(0)), Error(1 | 2)));
        assert!(matches!(stop.cause_or(Error(0)), Error(0)), "taken once");
    });
}

#[test]
fn a_channel_that_is_added_while_all_are_closed_is_closed_too() {
    loom::model(|| {
        let open = Arc::new(OpenSet::new());
        let closed = [(); 2].map(|()| Arc::new(sync::AtomicBool::new(false)));
        assert!(open.add(Arc::clone(&closed[0])));
        let (other, late) = (Arc::clone(&open), Arc::clone(&closed[1]));
        let thread = thread::spawn(move || {
            if !other.add(Arc::clone(&late)) {
                late.store(true, sync::Ordering::Relaxed);
            }
        });
        open.close(|channel| channel.store(true, sync::Ordering::Relaxed));
        thread.join().unwrap();
        assert!(closed.iter().all(|channel| channel.load(sync::Ordering::Relaxed)));
    });
}
