//! Cores, and the locks of the process, are the process's before they are ours.

use std::thread;
use std::time::{Duration, Instant};

/// For work that asks the kernel about the process: short bursts with a rest after each, and, where that is allowed, nobody who
/// takes the core away within one.
///
/// Where no core is free, a vCPU stands still for a burst of ours, and not for the 3 ms that the scheduler would give us. And
/// low priority would be no kindness: the kernel likes to take the core away in the middle of what is asked, with the lock of the
/// address space held, and whoever in the process maps or unmaps memory then waits until everybody else has had a turn. On two
/// busy cores such a thread slept for 4 to 7 ms at SCHED_BATCH, 4 to 6 ms at SCHED_IDLE, 2 to 7 ms at nice 0, and 0.3 to 1.1 ms
/// (once 2.6) at SCHED_FIFO, which is taken here; it needs CAP_SYS_NICE. Where cores are free, all are alike (docs/tuning.md).
#[derive(Debug)]
pub(super) struct Pace {
    since: Instant,
    /// What the thread was before.
    policy: i32,
}

impl Pace {
    pub(super) fn start() -> Self {
        let policy = policy();
        // The lowest of the priorities that are above all ordinary ones.
        set_policy(libc::SCHED_FIFO, 1);
        Self { since: Instant::now(), policy }
    }

    /// To be called often; rests when that is due.
    pub(super) fn rest(&mut self) {
        if self.since.elapsed() >= BURST {
            self.sleep(BURST);
        }
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
        set_policy(self.policy, 0);
    }
}

/// A fifth of the longest pause that a guest may have by us. Resting for as long, we take half a core at most.
const BURST: Duration = Duration::from_micros(200);

/// Does what takes long on a core, and touches nothing of the process, when nobody else wants the core.
pub(in crate::tune) fn politely<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    let polite = || {
        set_policy(libc::SCHED_IDLE, 0);
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
fn set_policy(policy: i32, priority: i32) {
    let parameter = libc::sched_param { sched_priority: priority };
    // SAFETY: the parameter is read and not kept; 0 is this thread.
    unsafe { libc::sched_setscheduler(0, policy, &raw const parameter) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_is_what_it_was_when_the_work_is_done() {
        let before = policy();
        drop(Pace::start());
        assert_eq!(policy(), before);
        assert_eq!(politely(policy), libc::SCHED_IDLE);
        assert_eq!(policy(), before);
    }
}
