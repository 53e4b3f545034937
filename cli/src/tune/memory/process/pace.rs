//! Cores are the process's before they are ours.

use std::thread;
use std::time::{Duration, Instant};

/// Work in short bursts with a rest after each, by a thread that waits for its turn.
///
/// Where no core is free, a vCPU stands still while we run on its core: for a burst, and not for the 3 ms that the scheduler
/// would give us.
#[derive(Debug)]
pub(super) struct Pace {
    since: Instant,
    /// What the thread was before.
    policy: i32,
}

impl Pace {
    pub(super) fn start() -> Self {
        let policy = policy();
        set_policy(libc::SCHED_BATCH);
        Self { since: Instant::now(), policy }
    }

    /// To be called often; rests when that is due.
    pub(super) fn rest(&mut self) {
        if self.since.elapsed() < BURST {
            return;
        }
        self.sleep(REST);
    }

    /// Waits until then.
    pub(super) fn wait_until(&mut self, then: Instant) {
        self.sleep(then.saturating_duration_since(Instant::now()));
    }

    #[expect(clippy::disallowed_methods, reason = "time has to pass, and there is nothing else to wait for")]
    fn sleep(&mut self, time: Duration) {
        thread::sleep(time);
        self.since = Instant::now();
    }
}

impl Drop for Pace {
    fn drop(&mut self) {
        set_policy(self.policy);
    }
}

/// A fifth of the longest pause that a guest may have by us.
const BURST: Duration = Duration::from_micros(200);

const REST: Duration = Duration::from_micros(200);

/// Does what takes long on a core, and touches no memory of the process, when nobody else wants the core.
pub(in crate::tune) fn politely<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    let polite = || {
        set_policy(libc::SCHED_IDLE);
        work()
    };
    thread::scope(|scope| match scope.spawn(polite).join() {
        Ok(done) => done,
        Err(panic) => std::panic::resume_unwind(panic),
    })
}

#[expect(unsafe_code, reason = "neither std nor rustix knows policies")]
fn policy() -> i32 {
    // SAFETY: takes no pointer; 0 is this thread.
    unsafe { libc::sched_getscheduler(0) }
}

/// Of this thread. Where that is not allowed, it stays as it is.
#[expect(unsafe_code, reason = "neither std nor rustix knows policies")]
fn set_policy(policy: i32) {
    let parameter = libc::sched_param { sched_priority: 0 };
    // SAFETY: the parameter is read and not kept; 0 is this thread.
    unsafe { libc::sched_setscheduler(0, policy, &raw const parameter) };
}
