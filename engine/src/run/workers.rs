//! The one place where threads are made. Whatever ends one of them ends the migration.
//!
//! ```text
//!  worker returns Err ─┐
//!  worker panics ──────┼─> StopSwitch::trip(cause) ──> every on_trip action: sockets shut down, waits woken
//!  caller cancels ─────┘        first cause wins        every thread joined
//! ```
//!
//! Behind the point of no return nothing trips the switch: a panic is told to what
//! [`Crew::on_panic`] has named.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::JoinHandle;

use multifd_transports::ThreadHook;

use crate::error::{Error, ErrorKind, Phase, Result};
use crate::run::stop::{StopSwitch, lock};

/// What is told that a thread has panicked.
type OnPanic = Box<dyn Fn(Error) + Send + Sync>;

/// The threads of one migration. Dropping it cancels and joins them.
pub(crate) struct Crew {
    stop: StopSwitch,
    hook: ThreadHook,
    threads: Mutex<Vec<JoinHandle<()>>>,
    panicked: Arc<OnceLock<OnPanic>>,
}

impl Crew {
    pub(crate) fn new(stop: StopSwitch) -> Self {
        Self { stop, hook: ThreadHook::default(), threads: Mutex::default(), panicked: Arc::default() }
    }

    /// Calls `hook` on every thread that is started from now on.
    pub(crate) fn with_hook(mut self, hook: ThreadHook) -> Self {
        self.hook = hook;
        self
    }

    pub(crate) fn stop(&self) -> &StopSwitch {
        &self.stop
    }

    /// Tells `told` of each panic of a thread that the switch does not take, because it is sealed.
    /// The first call counts.
    pub(crate) fn on_panic(&self, told: impl Fn(Error) + Send + Sync + 'static) {
        self.panicked.get_or_init(|| Box::new(told));
    }

    /// Starts a thread whose every bad end, a panic included, trips the switch.
    pub(crate) fn spawn(
        &self,
        name: &str,
        phase: Phase,
        body: impl FnOnce() -> Result<()> + Send + 'static,
    ) -> Result<()> {
        let (stop, hook, panicked) = (self.stop.clone(), self.hook.clone(), Arc::clone(&self.panicked));
        let label = name.to_owned();
        let thread = std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || match catch_unwind(AssertUnwindSafe(|| hooked(&hook, &label, body))) {
                Ok(Ok(())) => {}
                Ok(Err(error)) => stop.trip(error),
                Err(panic) => {
                    let detail = format!("thread panicked: {}", panic_text(&*panic));
                    let error = Error::new(ErrorKind::Panicked, phase, detail).on(label);
                    match panicked.get() {
                        Some(told) if stop.is_sealed() => told(error),
                        _ => stop.trip(error),
                    }
                }
            })
            .map_err(|error| Error::io(phase, format_args!("starting thread {name}"), error))?;
        let mut threads = lock(&self.threads);
        // One that has ended needs no join, and would keep its stack until then.
        threads.retain(|thread| !thread.is_finished());
        threads.push(thread);
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

fn hooked(hook: &ThreadHook, name: &str, body: impl FnOnce() -> Result<()>) -> Result<()> {
    hook.call(name);
    body()
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
    use crate::run::stop::Monitor;
    use std::time::Duration;

    fn error(text: &'static str) -> Error {
        Error::new(ErrorKind::Transport, Phase::Active, text)
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
    fn a_hook_that_panics_ends_the_migration_and_not_the_process() {
        let crew = Crew::new(StopSwitch::default())
            .with_hook(ThreadHook::new(|name| panic!("no seccomp filter for {name}")));
        crew.spawn("mig-test", Phase::Setup, || panic!("runs all the same")).unwrap();
        crew.join();
        let cause = crew.stop().cause_or(error("none"));
        assert_eq!(cause.kind(), ErrorKind::Panicked);
        assert!(cause.to_string().contains("no seccomp filter for mig-test"), "{cause}");
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
}
