//! The demo's guest: memory of this process, and threads that write to it as a busy machine would.

use std::io;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use multifd_engine::{DirtyMarker, HostMemory, PAGE, RamBlock};
use multifd_wire::BlockName;

use super::content::{Content, RUN_PAGES, Random};

/// The guest's one RAM block.
pub(super) const BLOCK: &str = "demo.ram";

/// Writers; as many as a small guest has vCPUs.
const WRITERS: usize = 2;

/// How often a writer writes its share.
const TICK: Duration = Duration::from_millis(2);

/// Nine writes in ten go to a tenth of the pages.
const HOT_SHARE: usize = 10;

/// Writers that run or are paused.
pub(super) struct Guest {
    pub(super) block: RamBlock,
    writers: Vec<JoinHandle<()>>,
    state: Arc<(Mutex<Run>, Condvar)>,
}

#[derive(Default)]
struct Run {
    paused: bool,
    ended: bool,
    standing: usize,
    /// Percent of their time for which the writers are throttled.
    throttle: u8,
}

impl Guest {
    /// A guest with `ram` bytes, rounded down to whole pages, filled and paused.
    pub(super) fn new(ram: u64) -> io::Result<Self> {
        let pages = usize::try_from(ram).map_err(io::Error::other)? / PAGE;
        if pages == 0 {
            return Err(io::Error::other(format!(
                "{ram} bytes of RAM, expected at least one page of {PAGE}"
            )));
        }
        let memory = HostMemory::anonymous(pages * PAGE)?;
        let mut content = Content::new();
        for first in (0..pages).step_by(RUN_PAGES) {
            let run = content.run();
            let len = run.len().min((pages - first) * PAGE);
            if let Some(slice) = memory.slice(first * PAGE, len) {
                slice.copy_from(run.get(..len).unwrap_or_default());
            }
        }
        let block = RamBlock::new(BlockName::try_from(BLOCK).map_err(io::Error::other)?, memory);
        Ok(Self { block, writers: Vec::new(), state: Arc::default() })
    }

    /// Lets the guest write `dirty_rate` bytes per second, in whole pages. `marker`: where it has
    /// to note its writes itself.
    pub(super) fn run(&mut self, dirty_rate: u64, marker: Option<&DirtyMarker>) -> io::Result<()> {
        let per_tick = dirty_rate as f64 / PAGE as f64 * TICK.as_secs_f64() / WRITERS as f64;
        for number in 0..WRITERS {
            let writer = Writer {
                block: self.block.clone(),
                marker: marker.cloned(),
                state: Arc::clone(&self.state),
                random: Random::new(number as u64 + 1),
                per_tick,
            };
            let name = format!("guest-{number}");
            self.writers.push(thread::Builder::new().name(name).spawn(move || writer.run())?);
        }
        Ok(())
    }

    /// Throttles the writers for this percentage of their time, as a VMM would its vCPUs.
    pub(super) fn throttle(&self, percent: u8) {
        lock(&self.state).throttle = percent;
    }

    /// Pauses the writers; returns when all have stopped writing.
    pub(super) fn pause(&self) {
        let mut run = lock(&self.state);
        run.paused = true;
        self.state.1.notify_all();
        while run.standing < self.writers.len() {
            run = self.state.1.wait(run).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        lock(&self.state).ended = true;
        self.state.1.notify_all();
        for writer in self.writers.drain(..) {
            let _ = writer.join();
        }
    }
}

struct Writer {
    block: RamBlock,
    marker: Option<DirtyMarker>,
    state: Arc<(Mutex<Run>, Condvar)>,
    random: Random,
    per_tick: f64,
}

impl Writer {
    fn run(mut self) {
        let (mut due, mut last) = (0.0, Instant::now());
        while let Some(share) = self.wait_for_tick() {
            // What the scheduler kept from us is made up for, within reason.
            let ticks = (last.elapsed().as_secs_f64() / TICK.as_secs_f64()).min(50.0);
            last = Instant::now();
            due += self.per_tick * ticks * share;
            while due >= 1.0 {
                due -= 1.0;
                self.write_a_page();
            }
        }
    }

    /// The share of its time that the guest may run now; `None` when it has ended.
    fn wait_for_tick(&self) -> Option<f64> {
        let (_, changed) = &*self.state;
        let mut run = lock(&self.state);
        if !run.paused && !run.ended {
            run = changed.wait_timeout(run, TICK).unwrap_or_else(PoisonError::into_inner).0;
        }
        if run.paused {
            run.standing += 1;
            changed.notify_all();
            while run.paused && !run.ended {
                run = changed.wait(run).unwrap_or_else(PoisonError::into_inner);
            }
            run.standing -= 1;
        }
        (!run.ended).then(|| 1.0 - f64::from(run.throttle) / 100.0)
    }

    fn write_a_page(&mut self) {
        let pages = self.block.pages();
        let hot = (pages / HOT_SHARE).max(1);
        let page = if self.random.below(10) < 9 { self.random.below(hot) } else { self.random.below(pages) };
        let value = self.random.next().to_le_bytes();
        let at = page * PAGE + self.random.below(PAGE / 64) * 64;
        if let Some(slice) = self.block.memory().slice(at, value.len()) {
            slice.copy_from(&value[..]);
        }
        if let Some(marker) = &self.marker {
            marker.mark(0, at as u64, value.len() as u64);
        }
    }
}

fn lock(state: &(Mutex<Run>, Condvar)) -> std::sync::MutexGuard<'_, Run> {
    state.0.lock().unwrap_or_else(PoisonError::into_inner)
}
