//! A part of RAM with a userfaultfd of its own.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, Instant};

use crate::destination::sharing::SharedFault;
use crate::os::userfaultfd::MissingPages;
use crate::run::stop::lock;

/// A part of every block, whose page faults have a descriptor of their own, and a thread that hears
/// of them.
pub(super) struct Slice {
    pub(super) missing: MissingPages,
    /// Held for reading while a page is placed, for writing while events are read: between the
    /// kernel's word that a page is dropped and our note of it, none may be placed.
    gate: RwLock<()>,
    /// By the address of the host page.
    waiting: Mutex<HashMap<u64, Vec<Waiting>>>,
    /// Nothing reads its events any more.
    stopped: AtomicBool,
}

/// A thread that waits for a page.
pub(super) struct Waiting {
    pub(super) waiter: Waiter,
    since: Instant,
}

/// What waits for a page.
pub(super) enum Waiter {
    /// A thread of this process, by its number.
    Thread(u32),
    /// One of a process that shares the memory.
    Shared(SharedFault),
}

impl Slice {
    pub(super) fn new(missing: MissingPages) -> Self {
        Self { missing, gate: RwLock::default(), waiting: Mutex::default(), stopped: AtomicBool::new(false) }
    }

    /// As long as this lives, no event is read: a page may be placed.
    pub(super) fn placing(&self) -> RwLockReadGuard<'_, ()> {
        self.gate.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// As long as this lives, no page is placed: events may be read.
    pub(super) fn reading(&self) -> RwLockWriteGuard<'_, ()> {
        self.gate.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on, this thread waits for the host page at this address. One that says so again is
    /// one: another process can be woken by its own owner.
    pub(super) fn note_waiting(&self, at: u64, waiter: Waiter) {
        let mut all = lock(&self.waiting);
        let waiting = all.entry(at).or_default();
        if !waiting.iter().any(|other| other.waiter.is_again(&waiter)) {
            waiting.push(Waiting { waiter, since: Instant::now() });
        }
    }

    /// Threads that wait for the host page at this address no longer.
    pub(super) fn answered(&self, at: u64) -> Vec<Waiting> {
        lock(&self.waiting).remove(&at).unwrap_or_default()
    }

    /// Addresses of host pages that threads wait for.
    pub(super) fn waited_for(&self) -> Vec<u64> {
        lock(&self.waiting).keys().copied().collect()
    }

    /// Nothing reads events from now on.
    pub(super) fn note_stopped(&self) {
        self.stopped.store(true, Ordering::Release);
    }

    pub(super) fn has_stopped(&self) -> bool {
        self.stopped.load(Ordering::Acquire)
    }
}

impl Waiting {
    /// So far.
    pub(super) fn waited(&self) -> Duration {
        self.since.elapsed()
    }
}

impl Waiter {
    fn is_again(&self, other: &Self) -> bool {
        matches!((self, other), (Self::Shared(this), Self::Shared(other)) if this.is_again(other))
    }

    /// The host page at this address is there. The kernel has woken the threads of this process.
    pub(super) fn wake(&self, at: u64, len: u64) {
        if let Self::Shared(fault) = self {
            fault.wake(at, len);
        }
    }
}
