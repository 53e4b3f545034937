//! A device that writes to guest memory by itself, as DMA does, and keeps a log of where it has.

use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use multifd_engine::vm_memory::Bytes as _;
use multifd_engine::{Coverage, DirtyBitmap, DirtyLog, DirtyLogError, PAGE, RamBlock};
use multifd_tests::{Failure, Outcome};

/// Writes as many times as it is told to, on a thread of its own.
pub(crate) struct Device {
    block: RamBlock,
    log: Arc<DirtyBitmap>,
    work: Arc<(Mutex<Work>, Condvar)>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Work {
    /// Writes that it was told to make, since the beginning.
    wanted: u64,
    done: u64,
    end: bool,
}

impl Device {
    /// A device that writes to these pages of `block`.
    pub(crate) fn new(block: RamBlock, pages: Range<usize>) -> Outcome<Self> {
        let log = Arc::new(DirtyBitmap::new(block.pages()));
        let work: Arc<(Mutex<Work>, Condvar)> = Arc::default();
        let (theirs, their_block, their_log) = (Arc::clone(&work), block.clone(), Arc::clone(&log));
        let thread = Builder::new().name("device".into()).spawn(move || {
            let mut random = 1;
            while wait_for_work(&theirs) {
                write(&their_block, &their_log, &pages, &mut random);
                lock(&theirs.0).done += 1;
                theirs.1.notify_all();
            }
        })?;
        Ok(Self { block, log, work, thread: Some(thread) })
    }

    /// A log of what it writes from now on.
    pub(crate) fn log(&self) -> impl DirtyLog + 'static {
        Log { block: self.block.clone(), index: 0, noted: Arc::clone(&self.log) }
    }

    /// Has it write that many times; returns when half of that is done, and the other half goes on.
    pub(crate) fn write(&self, writes: u64) -> Outcome {
        let mut work = lock(&self.work.0);
        work.wanted += writes;
        self.work.1.notify_all();
        self.wait(work, writes / 2)
    }

    /// Returns when it has written everything, and stops.
    pub(crate) fn stand_still(&self) -> Outcome {
        self.wait(lock(&self.work.0), 0)
    }

    /// Waits until no more than `left` of its writes are to be made.
    fn wait(&self, mut work: MutexGuard<'_, Work>, left: u64) -> Outcome {
        const SOON: Duration = Duration::from_secs(60);
        let deadline = Instant::now() + SOON;
        while work.done + left < work.wanted {
            let timeout = deadline.saturating_duration_since(Instant::now());
            if timeout.is_zero() {
                return Err(Failure::new(format!(
                    "device: {} of {} writes in {SOON:?}",
                    work.done, work.wanted
                )));
            }
            work = self.work.1.wait_timeout(work, timeout).unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(())
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        lock(&self.work.0).end = true;
        self.work.1.notify_all();
        if let Some(thread) = self.thread.take() {
            let ended = thread.join();
            assert!(ended.is_ok() || std::thread::panicking(), "the device panicked");
        }
    }
}

/// True: write once more. False: end.
fn wait_for_work(work: &(Mutex<Work>, Condvar)) -> bool {
    let idle = |work: &mut Work| work.done == work.wanted && !work.end;
    let work = work.1.wait_while(lock(&work.0), idle);
    !work.unwrap_or_else(PoisonError::into_inner).end
}

/// One write: mostly a few bytes of a page that was written before, sometimes a whole page of
/// something else, or of zeros.
fn write(block: &RamBlock, log: &DirtyBitmap, pages: &Range<usize>, random: &mut u64) {
    let value = next(random);
    let page = pages.start + below(value >> 8, pages.len());
    let few = value.to_le_bytes();
    let many: Vec<u8>;
    let (offset, bytes) = match value % 8 {
        0 => {
            many = (0..PAGE / 8).flat_map(|_| next(random).to_le_bytes()).collect();
            (0, &many[..])
        }
        1 => (0, &[0; PAGE][..]),
        _ => (below(value >> 40, PAGE - few.len()), &few[..]),
    };
    let written = block.memory().slice(page * PAGE + offset, bytes.len());
    written.expect("the page is in the block").write_slice(bytes, 0).expect("so are the bytes");
    // After the write: a thread that takes the bit sees what was written.
    log.set(page);
}

fn below(value: u64, limit: usize) -> usize {
    usize::try_from(value % limit as u64).unwrap_or_default()
}

/// Xorshift.
fn next(random: &mut u64) -> u64 {
    *random ^= *random << 13;
    *random ^= *random >> 7;
    *random ^= *random << 17;
    random.wrapping_mul(0x2545_f491_4f6c_dd1d)
}

fn lock(work: &Mutex<Work>) -> MutexGuard<'_, Work> {
    work.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Log {
    block: RamBlock,
    /// Which of the migration's blocks it is.
    index: usize,
    noted: Arc<DirtyBitmap>,
}

impl DirtyLog for Log {
    fn name(&self) -> &str {
        "device"
    }

    fn start(&mut self, ram: &[RamBlock]) -> Result<(), DirtyLogError> {
        let mine = ram.iter().position(|block| block.name() == self.block.name());
        self.index = mine.ok_or_else(|| DirtyLogError::new("looking for the device's memory"))?;
        Ok(())
    }

    /// Nothing but the device writes, whichever block it is.
    fn covers(&self, _: &RamBlock) -> Coverage {
        Coverage::Whole
    }

    fn sync(&mut self, bitmaps: &[Arc<DirtyBitmap>]) -> Result<(), DirtyLogError> {
        let bitmap = bitmaps.get(self.index);
        self.noted.move_to(bitmap.ok_or_else(|| DirtyLogError::new("looking for the device's bitmap"))?);
        Ok(())
    }

    fn stop(&mut self) {}
}
