//! The engine's claim cursor and stop switch, run under every interleaving that loom finds.
//!
//! The files are the engine's own, compiled here with loom's primitives in the place of `crate::sync`.
#![cfg(test)]
#![expect(dead_code, reason = "only what is checked here is used here")]

mod sync {
    pub(crate) use loom::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
    pub(crate) use loom::sync::{Arc, Condvar, Mutex, MutexGuard};
    pub(crate) use std::sync::PoisonError;
}

/// Stands for the engine's error.
mod error {
    #[derive(Debug, thiserror::Error)]
    #[error("cause {0}")]
    pub(crate) struct Error(pub(crate) u32);
}

#[path = "../../../engine/src/stop.rs"]
mod stop;

#[path = "."]
mod ram {
    #[path = "../../../engine/src/ram/bitmap.rs"]
    mod bitmap;
    #[path = "../../../engine/src/ram/round.rs"]
    mod round;

    pub(crate) use bitmap::DirtyBitmap;
    pub(crate) use round::{Batch, Claim, Round};
}

use loom::thread;

use error::Error;
use ram::{Batch, Claim, DirtyBitmap, Round};
use stop::{Monitor, StopSwitch};
use sync::Arc;

/// Two words are one chunk: three chunks.
const PAGES: usize = 5 * 64;

fn claim_all(round: &Round) -> Vec<usize> {
    let (mut claim, mut batch, mut pages) = (Claim::default(), Batch::default(), Vec::new());
    while round.claim(&mut claim, 128, &mut batch) {
        pages.extend(&batch.pages);
    }
    pages
}

#[test]
fn two_workers_claim_every_page_once() {
    loom::model(|| {
        let bitmap = Arc::new(DirtyBitmap::new(PAGES));
        [0, 63, 64, 200, 319].into_iter().for_each(|page| bitmap.set(page));
        let round = Arc::new(Round::new(&[Arc::clone(&bitmap)], 2));
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
        let round = Arc::new(Round::new(&[Arc::clone(&bitmap)], 1));
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
        let round = Arc::new(Round::new(&[Arc::clone(&bitmap)], 2));
        let other = Arc::clone(&round);
        let worker = thread::spawn(move || {
            let (mut claim, mut batch) = (Claim::default(), Batch::default());
            if other.claim(&mut claim, 100, &mut batch) {
                other.put_back(&mut claim, &batch);
            }
        });
        let sent = claim_all(&round).len();
        worker.join().unwrap();
        assert_eq!(sent + bitmap.count(), 140);
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
