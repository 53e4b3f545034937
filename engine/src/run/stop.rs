//! The one switch that ends a migration, and the waits that it wakes. Checked under every
//! interleaving by tests/loom.

use std::time::{Duration, Instant};

use crate::error::Error;
use crate::sync::{Arc, AtomicBool, Condvar, Mutex, MutexGuard, Ordering, PoisonError};

type OnTrip = Box<dyn FnOnce(&StopSwitch) + Send>;

/// Ends a migration, once. Cheap to clone; any thread may trip it.
#[derive(Clone, Default)]
pub(crate) struct StopSwitch(Arc<SwitchState>);

#[derive(Default)]
struct SwitchState {
    tripped: AtomicBool,
    inner: Mutex<SwitchInner>,
}

#[derive(Default)]
struct SwitchInner {
    /// There is nothing left to stop.
    sealed: bool,
    cause: Option<Error>,
    on_trip: Vec<OnTrip>,
}

/// A value under a lock whose waiters a tripped [`StopSwitch`] wakes.
pub(crate) struct Monitor<T>(Arc<(Mutex<T>, Condvar)>);

impl StopSwitch {
    /// Keeps `cause` if it is the first, and wakes everything that was registered.
    pub(crate) fn trip(&self, cause: Error) {
        let actions = {
            let mut inner = lock(&self.0.inner);
            if inner.sealed || self.0.tripped.load(Ordering::Relaxed) {
                tracing::debug!(%cause, "after the first cause, or after the end");
                return;
            }
            inner.cause = Some(cause);
            self.0.tripped.store(true, Ordering::Release);
            std::mem::take(&mut inner.on_trip)
        };
        actions.into_iter().for_each(|action| action(self));
    }

    /// Runs `action` when the switch trips; at once if it has tripped.
    pub(crate) fn on_trip(&self, action: impl FnOnce() + Send + 'static) {
        self.on_trip_of(|_| action());
    }

    /// The same of an `action` that looks at the cause.
    pub(crate) fn on_trip_of(&self, action: impl FnOnce(&Self) + Send + 'static) {
        {
            let mut inner = lock(&self.0.inner);
            if inner.sealed {
                return;
            }
            if !self.0.tripped.load(Ordering::Relaxed) {
                inner.on_trip.push(Box::new(action));
                return;
            }
        }
        action(self);
    }

    /// Nothing trips the switch from now on: the point of no return. False: it has tripped before.
    ///
    /// What would have run then is let go of: it keeps connections open.
    #[must_use]
    pub(crate) fn seal(&self) -> bool {
        let mut inner = lock(&self.0.inner);
        inner.sealed = !self.0.tripped.load(Ordering::Relaxed);
        let (sealed, never) = (inner.sealed, std::mem::take(&mut inner.on_trip));
        drop(inner);
        drop(never);
        sealed
    }

    /// Nothing trips the switch any more.
    pub(crate) fn is_sealed(&self) -> bool {
        lock(&self.0.inner).sealed
    }

    /// No thread is left that a trip would wake. What would have run then keeps memory and
    /// connections alive, this switch among them.
    pub(crate) fn release(&self) {
        let _never = std::mem::take(&mut lock(&self.0.inner).on_trip);
    }

    pub(crate) fn tripped(&self) -> bool {
        self.0.tripped.load(Ordering::Acquire)
    }

    /// Looks at the first cause, if it is there.
    pub(crate) fn look_at_cause<R>(&self, look: impl FnOnce(&Error) -> R) -> Option<R> {
        lock(&self.0.inner).cause.as_ref().map(look)
    }

    /// The first cause, for the one caller who reports it; `otherwise` if it was taken or never
    /// set.
    pub(crate) fn cause_or(&self, otherwise: Error) -> Error {
        lock(&self.0.inner).cause.take().unwrap_or(otherwise)
    }
}

impl<T> Clone for Monitor<T> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<T: Send + 'static> Monitor<T> {
    pub(crate) fn new(value: T, stop: &StopSwitch) -> Self {
        let this = Self(Arc::new((Mutex::new(value), Condvar::new())));
        let woken = this.clone();
        stop.on_trip(move || {
            // Taking the lock orders the trip before the next check of a waiter that is about to
            // sleep.
            drop(lock(&woken.0.0));
            woken.notify();
        });
        this
    }

    /// Changes the value and wakes every waiter.
    pub(crate) fn modify_and_notify<R>(&self, change: impl FnOnce(&mut T) -> R) -> R {
        let result = change(&mut lock(&self.0.0));
        self.notify();
        result
    }

    /// Changes something that no waiter waits for.
    pub(crate) fn modify_silently<R>(&self, change: impl FnOnce(&mut T) -> R) -> R {
        change(&mut lock(&self.0.0))
    }

    /// Reads the value.
    pub(crate) fn read<R>(&self, read: impl FnOnce(&T) -> R) -> R {
        read(&lock(&self.0.0))
    }

    /// Wakes every waiter after a change that a `ready` of [`Monitor::wait`] has made.
    pub(crate) fn notify(&self) {
        self.0.1.notify_all();
    }

    /// Waits until `ready` gives a value. `None`: the switch tripped, or `limit` passed.
    ///
    /// What `ready` changes wakes no other waiter: see [`Monitor::notify`].
    pub(crate) fn wait<R>(
        &self,
        stop: &StopSwitch,
        limit: Option<Duration>,
        mut ready: impl FnMut(&mut T) -> Option<R>,
    ) -> Option<R> {
        // A limit past the end of time is none.
        let deadline = limit.and_then(|limit| Instant::now().checked_add(limit));
        let mut guard = lock(&self.0.0);
        loop {
            if let Some(value) = ready(&mut guard) {
                return Some(value);
            }
            if stop.tripped() {
                return None;
            }
            guard = match deadline {
                None => self.0.1.wait(guard).unwrap_or_else(PoisonError::into_inner),
                Some(deadline) => {
                    let left = deadline.checked_duration_since(Instant::now())?;
                    self.0.1.wait_timeout(guard, left).unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
    }
}

/// Locks `mutex`, also after a panic in another thread that held it.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic while a lock is held trips the switch; the data behind it is only read to wind up.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(all(test, not(multifd_loom)))]
mod tests {
    use super::*;
    use crate::error::{ErrorKind, Phase};

    fn error(text: &'static str) -> Error {
        Error::new(ErrorKind::Transport, Phase::Active, text)
    }

    #[test]
    fn first_cause_wins() {
        let stop = StopSwitch::default();
        stop.trip(error("first"));
        stop.trip(error("second"));
        assert_eq!(stop.cause_or(error("none")).to_string(), "active: first");
    }

    #[test]
    fn an_action_registered_late_runs_at_once() {
        let stop = StopSwitch::default();
        stop.trip(error("early"));
        let ran = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&ran);
        stop.on_trip(move || seen.store(true, Ordering::Relaxed));
        assert!(ran.load(Ordering::Relaxed));
    }

    #[test]
    fn a_wait_ends_at_its_deadline() {
        let stop = StopSwitch::default();
        let monitor = Monitor::new((), &stop);
        assert!(monitor.wait(&stop, Some(Duration::from_millis(5)), |()| None::<()>).is_none());
        assert!(!stop.tripped());
    }
}
