//! The pauses of a guest.
//!
//! A thread writes to its memory for ever, frees pages and touches them again, maps and unmaps, and
//! reads the clock after each step. A step takes microseconds; a longer one had to wait, for one of
//! these:
//!
//! - for a core: the kernel counts that (schedstat), and it is subtracted. Most of it is other
//!   load;
//! - for a lock, asleep: the kernel counts that as a voluntary switch. A reader of the process can
//!   cause it;
//! - for the machine itself, if that is virtual. No counter shows this; such a thread has not
//!   switched.
#![expect(clippy::cast_possible_truncation, reason = "the pages of a test are few")]

use std::fmt;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::str::FromStr;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use multifd_engine::HostMemory;
use multifd_engine::vm_memory::Bytes;

use super::super::super::PAGE;
use super::guest::discard;

/// The longest steps of a lap.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Gaps {
    pub(super) steps: u64,
    /// By the clock, whatever the reason.
    pub(super) any: Duration,
    /// Without the time that the thread waited for a core.
    pub(super) running: Duration,
    /// Of that, where the thread slept.
    pub(super) asleep: Duration,
}

impl fmt::Display for Gaps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let nanos = [self.any, self.running, self.asleep].map(|gap| gap.as_nanos());
        write!(f, "{} {} {} {}", self.steps, nanos[0], nanos[1], nanos[2])
    }
}

impl FromStr for Gaps {
    type Err = std::num::ParseIntError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let numbers = text.split(' ').map(str::parse).collect::<Result<Vec<u64>, _>>()?;
        let gap = |number: usize| Duration::from_nanos(numbers[number]);
        Ok(Self { steps: numbers[0], any: gap(1), running: gap(2), asleep: gap(3) })
    }
}

/// The thread.
pub(super) struct Racer(Arc<Mutex<Gaps>>);

impl Racer {
    #[expect(clippy::disallowed_methods, reason = "it ends with its process")]
    pub(super) fn start(memory: HostMemory) -> Self {
        let gaps = Arc::new(Mutex::new(Gaps::default()));
        let shared = Arc::clone(&gaps);
        thread::spawn(move || race(&memory, &shared));
        Self(gaps)
    }

    /// What there was since the last time.
    pub(super) fn lap(&self) -> Gaps {
        std::mem::take(&mut *self.0.lock().unwrap())
    }
}

fn race(memory: &HostMemory, gaps: &Mutex<Gaps>) {
    let schedstat = File::open("/proc/thread-self/schedstat").unwrap();
    let mut before = Account::now(&schedstat);
    for step in 0_u64.. {
        touch(memory, step);
        let now = Account::now(&schedstat);
        // Never waits for the lock: a step that finds it taken counts with the next.
        let Ok(mut gaps) = gaps.try_lock() else { continue };
        let any = now.at - before.at;
        let running = any.saturating_sub(now.waited - before.waited);
        gaps.steps += 1;
        gaps.any = gaps.any.max(any);
        gaps.running = gaps.running.max(running);
        if now.slept > before.slept {
            gaps.asleep = gaps.asleep.max(running);
        }
        drop(gaps);
        before = now;
    }
}

/// Writes to a few pages, hot and cold; frees some at times, which causes page faults; and at times
/// takes the lock of the address space as a writer.
fn touch(memory: &HostMemory, step: u64) {
    let pages = (memory.len() / PAGE) as u64;
    for near in 0..16 {
        let page = (step * 7919 + near * 31) % pages;
        memory.slice(page as usize * PAGE, 8).unwrap().write_obj(step, 0).unwrap();
    }
    if step.is_multiple_of(64) {
        discard(memory, ((step * 131) % (pages - 8)) as usize * PAGE, 8 * PAGE);
    }
    if step.is_multiple_of(256) {
        drop(HostMemory::anonymous(PAGE).unwrap());
    }
}

struct Account {
    at: Instant,
    /// For a core, in all.
    waited: Duration,
    slept: i64,
}

impl Account {
    /// Reads again if the thread lost its core meanwhile, which is common at the end of a system
    /// call: that wait must be in both counters or in neither.
    fn now(schedstat: &File) -> Self {
        loop {
            let waited = waited(schedstat);
            let now = Self { at: Instant::now(), waited, slept: voluntary_switches() };
            if self::waited(schedstat) == waited {
                return now;
            }
        }
    }
}

fn waited(schedstat: &File) -> Duration {
    let mut text = [0; 64];
    let len = schedstat.read_at(&mut text, 0).unwrap();
    let text = std::str::from_utf8(&text[..len]).unwrap();
    Duration::from_nanos(text.split(' ').nth(1).unwrap().parse().unwrap())
}

#[expect(unsafe_code, reason = "neither std nor rustix knows rusage")]
fn voluntary_switches() -> i64 {
    // SAFETY: all-zero bytes are a rusage: it consists of integers.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel writes one rusage.
    assert_eq!(unsafe { libc::getrusage(libc::RUSAGE_THREAD, &raw mut usage) }, 0);
    usage.ru_nvcsw
}
