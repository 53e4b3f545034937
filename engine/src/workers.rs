//! The one place where threads are made, and the one switch that ends a migration.
//!
//! ```text
//!  worker returns Err ─┐
//!  worker panics ──────┼─> StopSwitch::trip(cause) ──> every on_trip action: sockets shut down, waits woken
//!  caller cancels ─────┘        first cause wins        every thread joined
//! ```

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::error::{Error, ErrorKind, Phase, Result};

type OnTrip = Box<dyn FnOnce() + Send>;

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
    cause: Option<Error>,
    on_trip: Vec<OnTrip>,
}

/// The threads of one migration. Dropping it cancels and joins them.
pub(crate) struct Crew {
    stop: StopSwitch,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

/// A value under a lock whose waiters a tripped [`StopSwitch`] wakes.
pub(crate) struct Monitor<T>(Arc<(Mutex<T>, Condvar)>);

impl StopSwitch {
    /// Keeps `cause` if it is the first, and wakes everything that was registered.
    pub(crate) fn trip(&self, cause: Error) {
        let actions = {
            let mut inner = lock(&self.0.inner);
            if self.0.tripped.load(Ordering::Relaxed) {
                tracing::debug!(%cause, "after the first cause");
                return;
            }
            inner.cause = Some(cause);
            self.0.tripped.store(true, Ordering::Release);
            std::mem::take(&mut inner.on_trip)
        };
        actions.into_iter().for_each(|action| action());
    }

    /// Runs `action` when the switch trips; at once if it has tripped.
    pub(crate) fn on_trip(&self, action: impl FnOnce() + Send + 'static) {
        {
            let mut inner = lock(&self.0.inner);
            if !self.0.tripped.load(Ordering::Relaxed) {
                inner.on_trip.push(Box::new(action));
                return;
            }
        }
        action();
    }

    pub(crate) fn tripped(&self) -> bool {
        self.0.tripped.load(Ordering::Acquire)
    }

    /// The first cause, for the one caller who reports it; `otherwise` if it was taken or never set.
    pub(crate) fn cause_or(&self, otherwise: Error) -> Error {
        lock(&self.0.inner).cause.take().unwrap_or(otherwise)
    }
}

impl Crew {
    pub(crate) fn new(stop: StopSwitch) -> Self {
        Self { stop, threads: Mutex::default() }
    }

    pub(crate) fn stop(&self) -> &StopSwitch {
        &self.stop
    }

    /// Starts a thread whose every bad end, a panic included, trips the switch.
    pub(crate) fn spawn(
        &self,
        name: &str,
        phase: Phase,
        body: impl FnOnce() -> Result<()> + Send + 'static,
    ) -> Result<()> {
        let stop = self.stop.clone();
        let label = name.to_owned();
        let thread = std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || match catch_unwind(AssertUnwindSafe(body)) {
                Ok(Ok(())) => {}
                Ok(Err(error)) => stop.trip(error),
                Err(panic) => stop.trip(
                    Error::new(
                        ErrorKind::Panicked,
                        phase,
                        format!("thread panicked: {}", panic_text(&*panic)),
                    )
                    .on(label),
                ),
            })
            .map_err(|error| Error::io(phase, format_args!("starting thread {name}"), error))?;
        lock(&self.threads).push(thread);
        Ok(())
    }

    /// Waits for every thread, the ones started meanwhile included.
    pub(crate) fn join(&self) {
        loop {
            let Some(thread) = lock(&self.threads).pop() else { return };
            // The body is wrapped in catch_unwind: join cannot report anything new.
            let _ = thread.join();
        }
    }
}

impl Drop for Crew {
    fn drop(&mut self) {
        if !lock(&self.threads).is_empty() {
            self.stop.trip(Error::new(ErrorKind::Cancelled, Phase::Setup, "dropped before its end"));
            self.join();
        }
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
            // Taking the lock orders the trip before the next check of a waiter that is about to sleep.
            drop(lock(&woken.0.0));
            woken.0.1.notify_all();
        });
        this
    }

    /// Changes the value and wakes every waiter.
    pub(crate) fn update<R>(&self, change: impl FnOnce(&mut T) -> R) -> R {
        let result = change(&mut lock(&self.0.0));
        self.0.1.notify_all();
        result
    }

    /// Looks at the value, or notes something in it that nobody waits for.
    pub(crate) fn with<R>(&self, look: impl FnOnce(&mut T) -> R) -> R {
        look(&mut lock(&self.0.0))
    }

    /// Waits until `ready` gives a value. `None`: the switch tripped, or `limit` passed.
    pub(crate) fn wait<R>(
        &self,
        stop: &StopSwitch,
        limit: Option<Duration>,
        mut ready: impl FnMut(&mut T) -> Option<R>,
    ) -> Option<R> {
        let deadline = limit.map(|limit| Instant::now() + limit);
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

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic while a lock is held trips the switch; the data behind it is only read to wind up.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn panic_text(panic: &(dyn Any + Send)) -> &str {
    panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message")
}

#[cfg(test)]
mod tests {
    use super::*;

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
    fn a_panic_trips_the_switch_and_wakes_a_waiter() {
        let crew = Crew::new(StopSwitch::default());
        let monitor = Monitor::new(0_u32, crew.stop());
        crew.spawn("mig-test", Phase::Active, || panic!("on purpose")).unwrap();
        let woken = monitor.wait(crew.stop(), Some(Duration::from_secs(10)), |_| None::<()>);
        assert!(woken.is_none());
        assert!(crew.stop().tripped(), "woken by the trip, not by the deadline");
        crew.join();
        let cause = crew.stop().cause_or(error("none"));
        assert_eq!(cause.kind(), ErrorKind::Panicked);
        assert!(cause.to_string().contains("on purpose"), "{cause}");
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
    fn dropping_the_crew_ends_its_threads() {
        let crew = Crew::new(StopSwitch::default());
        let monitor = Monitor::new((), crew.stop());
        let stop = crew.stop().clone();
        crew.spawn("mig-test", Phase::Active, move || {
            monitor.wait(&stop, None, |()| None::<()>);
            Ok(())
        })
        .unwrap();
        drop(crew);
    }

    #[test]
    fn a_wait_ends_at_its_deadline() {
        let stop = StopSwitch::default();
        let monitor = Monitor::new((), &stop);
        assert!(monitor.wait(&stop, Some(Duration::from_millis(5)), |()| None::<()>).is_none());
        assert!(!stop.tripped());
    }
}
