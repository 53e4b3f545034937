//! Scheduling that gives the guest precedence: short bursts of reading, idle priority for
//! measurements.

use std::thread;
use std::time::{Duration, Instant};

/// Pacing of requests about the process: short bursts, each followed by a rest, and not preempted
/// within one where permitted.
///
/// Where no core is free, a vCPU waits for one of these bursts, not for the 3 ms of a time slice.
/// Low priority would be worse: the kernel may preempt a request while it holds the lock of the
/// address space, and a thread of the process that maps or unmaps memory then waits until all other
/// threads have run. On two busy cores such a thread slept for 4 to 7 ms at SCHED_BATCH, 4 to 6 ms
/// at SCHED_IDLE, 2 to 7 ms at nice 0, and 0.3 to 1.1 ms (once 2.6) at SCHED_FIFO, which is used
/// here and needs CAP_SYS_NICE. Where cores are free, there is no difference (docs/tuning.md).
#[derive(Debug)]
pub(super) struct Pace {
    since: Instant,
    /// The thread's policy before.
    policy: i32,
}

impl Pace {
    pub(super) fn start() -> Self {
        let policy = policy();
        // The lowest real-time priority.
        set_policy(libc::SCHED_FIFO, 1);
        Self { since: Instant::now(), policy }
    }

    /// Rests if the burst is over. To be called often.
    pub(super) fn rest(&mut self) {
        if self.since.elapsed() >= BURST {
            self.sleep(BURST);
        }
    }

    /// Waits until `then`.
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

/// Longest burst: a fifth of the longest pause that the guest may see. With a rest of the same
/// length it takes at most half a core.
const BURST: Duration = Duration::from_micros(200);

/// Runs long work that does not touch the process, on idle cores only.
pub(crate) fn politely<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    let polite = || {
        set_policy(libc::SCHED_IDLE, 0);
        work()
    };
    thread::scope(|scope| match scope.spawn(polite).join() {
        Ok(done) => done,
        Err(panic) => std::panic::resume_unwind(panic),
    })
}

#[expect(unsafe_code, reason = "neither std nor rustix has scheduling policies")]
fn policy() -> i32 {
    // SAFETY: takes no pointer; 0 is this thread.
    unsafe { libc::sched_getscheduler(0) }
}

/// Sets this thread's policy. Without permission it stays as it is.
#[expect(unsafe_code, reason = "neither std nor rustix has scheduling policies")]
fn set_policy(policy: i32, priority: i32) {
    let parameter = libc::sched_param { sched_priority: priority };
    // SAFETY: the parameter is read and not kept; 0 is this thread.
    unsafe { libc::sched_setscheduler(0, policy, &raw const parameter) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_has_its_policy_back_when_the_work_is_done() {
        let before = policy();
        drop(Pace::start());
        assert_eq!(policy(), before);
        assert_eq!(politely(policy), libc::SCHED_IDLE);
        assert_eq!(policy(), before);
    }
}
