//! A guest of this process: memory of its own, threads that write to it, and a log that they keep.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;

use multifd_engine::{Coverage, DirtyBitmap, DirtyLog, DirtyLogError, HostMemory, PAGE, RamBlock};
use vm_memory::Bytes;

/// Writer threads that run, stand still, or end.
pub(crate) struct Guest {
    pub(crate) block: RamBlock,
    log: Arc<DirtyBitmap>,
    writers: Vec<JoinHandle<()>>,
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<Run>,
    changed: Condvar,
    end: AtomicBool,
    writes: AtomicU64,
}

#[derive(Default)]
struct Run {
    paused: bool,
    standing: usize,
}

/// How a writer writes.
#[derive(Clone, Copy)]
pub(crate) struct Load {
    pub(crate) threads: usize,
    /// Pages that are written; the others keep what they had.
    pub(crate) hot_pages: usize,
    /// Bytes changed by each write, always at the same place of the page.
    pub(crate) bytes: usize,
}

impl Guest {
    /// `pages` of RAM with all kinds of content, which no thread writes yet.
    pub(crate) fn new(name: &str, pages: usize) -> Self {
        let memory = HostMemory::anonymous(pages * PAGE).unwrap();
        let block = RamBlock::new(name.try_into().unwrap(), memory);
        for page in 0..pages {
            let slice = block.memory().slice(page * PAGE, PAGE).unwrap();
            match page % 4 {
                0 => {}
                1 => slice.write_slice(&[page as u8 | 1; PAGE], 0).unwrap(),
                2 => slice.write_slice(&"all work and no play ".repeat(196).as_bytes()[..PAGE], 0).unwrap(),
                _ => {
                    let mut seed = page as u64 | 1;
                    let bytes: Vec<u8> = (0..PAGE / 8).flat_map(|_| next(&mut seed).to_le_bytes()).collect();
                    slice.write_slice(&bytes, 0).unwrap();
                }
            }
        }
        let shared = Shared {
            state: Mutex::default(),
            changed: Condvar::new(),
            end: AtomicBool::new(false),
            writes: AtomicU64::new(0),
        };
        Self { block, log: Arc::new(DirtyBitmap::new(pages)), writers: Vec::new(), shared: Arc::new(shared) }
    }

    /// Lets threads write.
    pub(crate) fn run(mut self, load: Load) -> Self {
        for thread in 0..load.threads {
            let (block, log, shared) = (self.block.clone(), Arc::clone(&self.log), Arc::clone(&self.shared));
            self.writers.push(
                std::thread::Builder::new()
                    .spawn(move || write(&block, &log, &shared, load, thread))
                    .unwrap(),
            );
        }
        self
    }

    /// A log of what is written from now on; each can be used once.
    pub(crate) fn log(&self) -> impl DirtyLog + 'static {
        Log(Arc::clone(&self.log))
    }

    /// Writes so far.
    pub(crate) fn writes(&self) -> u64 {
        self.shared.writes.load(Ordering::Relaxed)
    }

    /// Returns when no thread writes any more.
    pub(crate) fn pause(&self) {
        let mut run = self.shared.state.lock().unwrap();
        run.paused = true;
        while run.standing < self.writers.len() {
            run = self.shared.changed.wait(run).unwrap();
        }
    }

    pub(crate) fn resume(&self) {
        self.shared.state.lock().unwrap().paused = false;
        self.shared.changed.notify_all();
    }

    /// Waits until the writers have written again.
    pub(crate) fn wait_for_writes(&self) {
        let before = self.writes();
        while self.writes() < before + 1000 {
            std::thread::yield_now();
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.shared.end.store(true, Ordering::Relaxed);
        self.resume();
        self.writers.drain(..).for_each(|writer| writer.join().unwrap());
    }
}

fn write(block: &RamBlock, log: &DirtyBitmap, shared: &Shared, load: Load, thread: usize) {
    let mut seed = thread as u64 * 0x9e37_79b9 + 1;
    while !shared.end.load(Ordering::Relaxed) {
        stand_if_paused(shared);
        for _ in 0..64 {
            let value = next(&mut seed);
            let page = value as usize % load.hot_pages;
            let at = page * PAGE + 512;
            let fill = vec![value as u8; load.bytes];
            block.memory().slice(at, load.bytes).unwrap().write_slice(&fill, 0).unwrap();
            log.set(page);
        }
        shared.writes.fetch_add(64, Ordering::Relaxed);
    }
}

fn stand_if_paused(shared: &Shared) {
    let mut run = shared.state.lock().unwrap();
    if !run.paused {
        return;
    }
    run.standing += 1;
    shared.changed.notify_all();
    while run.paused {
        run = shared.changed.wait(run).unwrap();
    }
    run.standing -= 1;
}

struct Log(Arc<DirtyBitmap>);

impl DirtyLog for Log {
    fn name(&self) -> &str {
        "test"
    }

    fn start(&mut self, _ram: &[RamBlock]) -> Result<(), DirtyLogError> {
        Ok(())
    }

    fn covers(&self, _: &RamBlock) -> Coverage {
        Coverage::Whole
    }

    fn sync(&mut self, bitmaps: &[Arc<DirtyBitmap>]) -> Result<(), DirtyLogError> {
        self.0.move_to(&bitmaps[0]);
        Ok(())
    }

    fn stop(&mut self) {}
}

pub(crate) fn next(seed: &mut u64) -> u64 {
    *seed ^= *seed << 13;
    *seed ^= *seed >> 7;
    *seed ^= *seed << 17;
    seed.wrapping_mul(0x2545_f491_4f6c_dd1d)
}
