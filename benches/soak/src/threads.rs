//! A guest whose vCPUs are threads of this process, with a balloon and memory that comes and goes.
#![expect(unsafe_code, reason = "memory is given back to the kernel by address")]

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;

use multifd_engine::{
    Coverage, DirtyBitmap, DirtyLog, DirtyLogError, HostMemory, PAGE, RamBlock, SourceBuilder, UserfaultLog,
};
use rustix::mm::{Advice, madvise};

use crate::Result;
use crate::guest::Guest;
use crate::random::Random;

const WRITERS: u64 = 2;

/// The guest, and its threads.
pub(crate) struct Threads {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    seed: u64,
}

struct Shared {
    blocks: Vec<RamBlock>,
    /// What was written, for the log that the threads keep.
    written: Vec<Arc<DirtyBitmap>>,
    /// The second block is plugged.
    plugged: AtomicBool,
    writes: AtomicU64,
    run: Mutex<Run>,
    changed: Condvar,
}

#[derive(Default)]
struct Run {
    paused: bool,
    ended: bool,
    standing: usize,
}

impl Threads {
    /// `ram` MiB, and half as much that can be plugged.
    pub(crate) fn new(ram: usize, random: &mut Random) -> Result<Self> {
        let block = |name: &str, len| {
            Ok::<_, Box<dyn std::error::Error + Send + Sync>>(RamBlock::new(
                name.try_into()?,
                HostMemory::anonymous(len)?,
            ))
        };
        let blocks = vec![block("ram", ram << 20)?, block("dimm0", ram << 19)?];
        let mut guest = Self::with(blocks, random.next());
        guest.run()?;
        Ok(guest)
    }

    /// Paused.
    fn with(blocks: Vec<RamBlock>, seed: u64) -> Self {
        let written = blocks.iter().map(|block| Arc::new(DirtyBitmap::new(block.pages()))).collect();
        let shared = Shared {
            blocks,
            written,
            plugged: AtomicBool::new(true),
            writes: AtomicU64::new(0),
            run: Mutex::new(Run { paused: true, ..Run::default() }),
            changed: Condvar::new(),
        };
        Self { shared: Arc::new(shared), threads: Vec::new(), seed }
    }
}

impl Guest for Threads {
    fn blocks(&self) -> Vec<RamBlock> {
        self.shared.blocks.clone()
    }

    fn log_into(&mut self, source: SourceBuilder, random: &mut Random) -> Result<SourceBuilder> {
        if random.one_in(2)
            && let Ok(log) = UserfaultLog::new()
        {
            return Ok(source.dirty_log(log));
        }
        Ok(source.dirty_log(Written(self.shared.written.clone())))
    }

    fn run(&mut self) -> Result<()> {
        let numbers = if self.threads.is_empty() { 0..WRITERS + 1 } else { 0..0 };
        for number in numbers {
            let (shared, mut random) = (Arc::clone(&self.shared), Random::new(self.seed + number));
            let name = if number == WRITERS { "balloon" } else { "writer" };
            self.threads.push(std::thread::Builder::new().name(name.to_owned()).spawn(move || {
                while shared.may_run() {
                    if number == WRITERS { shared.inflate(&mut random) } else { shared.write(&mut random) }
                }
            })?);
        }
        self.shared.lock().paused = false;
        self.shared.changed.notify_all();
        Ok(())
    }

    fn wait_for_writes(&self) -> Result<()> {
        let before = self.shared.writes.load(Ordering::Relaxed);
        while self.shared.writes.load(Ordering::Relaxed) < before + 200 {
            if self.threads.iter().any(JoinHandle::is_finished) {
                return Err("a thread of the guest has ended".into());
            }
            std::thread::yield_now();
        }
        Ok(())
    }

    fn pause(&mut self) -> Result<()> {
        let mut run = self.shared.lock();
        run.paused = true;
        while run.standing < self.threads.len() {
            run = self.shared.changed.wait(run).unwrap_or_else(PoisonError::into_inner);
        }
        Ok(())
    }

    fn state(&self) -> Result<Vec<u8>> {
        Ok(vec![u8::from(self.shared.plugged.load(Ordering::Relaxed))])
    }

    fn arrive(self, blocks: &[RamBlock], state: &[u8]) -> Result<Self> {
        let guest = Self::with(blocks.to_vec(), self.seed.wrapping_add(WRITERS + 1));
        guest.shared.plugged.store(state == [1], Ordering::Relaxed);
        Ok(guest)
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.shared.lock().ended = true;
        self.shared.changed.notify_all();
        self.threads.drain(..).for_each(|thread| drop(thread.join()));
    }
}

impl Shared {
    fn lock(&self) -> std::sync::MutexGuard<'_, Run> {
        self.run.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Stands while the guest is paused. False: it has ended.
    fn may_run(&self) -> bool {
        let mut run = self.lock();
        if run.paused && !run.ended {
            run.standing += 1;
            self.changed.notify_all();
            while run.paused && !run.ended {
                run = self.changed.wait(run).unwrap_or_else(PoisonError::into_inner);
            }
            run.standing -= 1;
        }
        !run.ended
    }

    /// A place in memory that is plugged: block, first page, at most `most` pages.
    fn place(&self, random: &mut Random, most: usize) -> (usize, usize, usize) {
        let block = usize::from(self.plugged.load(Ordering::Relaxed) && random.one_in(4));
        let pages = self.blocks.get(block).map_or(1, RamBlock::pages);
        // Half of all writes go to a sixteenth of the pages.
        let hot = random.one_in(2);
        let first = random.below(if hot { pages / 16 } else { pages });
        (block, first, (1 + random.below(most)).min(pages - first))
    }

    fn write(&self, random: &mut Random) {
        for _ in 0..32 {
            let (block, first, pages) = self.place(random, 4);
            let Some(ram) = self.blocks.get(block) else { return };
            let (offset, len) = (random.below(PAGE), 1 + random.below(pages * PAGE));
            let len = len.min(pages * PAGE - offset);
            let fill = if random.one_in(8) { 0 } else { random.next().to_le_bytes()[0] };
            if let Some(memory) = ram.memory().slice(first * PAGE + offset, len) {
                let bytes: Vec<u8> = (0..len).map(|at| if at % 64 == 0 { fill ^ 1 } else { fill }).collect();
                memory.copy_from(&bytes);
            }
            self.note(block, first, pages);
        }
        self.writes.fetch_add(32, Ordering::Relaxed);
    }

    /// Gives pages back; now and then all of the second block, which comes back later.
    fn inflate(&self, random: &mut Random) {
        if random.one_in(64) {
            self.plugged.fetch_not(Ordering::Relaxed);
        }
        if random.one_in(64) && !self.plugged.load(Ordering::Relaxed) {
            let pages = self.blocks.get(1).map_or(0, RamBlock::pages);
            self.give_back(1, 0, pages);
        }
        let (block, first, pages) = self.place(random, 64);
        self.give_back(block, first, pages);
        std::thread::yield_now();
    }

    fn give_back(&self, block: usize, first: usize, pages: usize) {
        let memory = self.blocks.get(block).and_then(|ram| ram.memory().slice(first * PAGE, pages * PAGE));
        let Some(memory) = memory else { return };
        // SAFETY: the range is mapped, private and anonymous: it reads as zero afterwards.
        let done =
            unsafe { madvise(memory.ptr_guard_mut().as_ptr().cast(), memory.len(), Advice::LinuxDontNeed) };
        if done.is_ok() {
            self.note(block, first, pages);
        }
    }

    /// After the write, not before it: a round in between would send the old page and take the
    /// mark.
    fn note(&self, block: usize, first: usize, pages: usize) {
        if let Some(written) = self.written.get(block) {
            written.set_range(first, pages);
        }
    }
}

/// The log that the threads keep.
struct Written(Vec<Arc<DirtyBitmap>>);

impl DirtyLog for Written {
    fn name(&self) -> &str {
        "written"
    }

    fn start(&mut self, _: &[RamBlock]) -> Result<(), DirtyLogError> {
        Ok(())
    }

    fn covers(&self, _: &RamBlock) -> Coverage {
        Coverage::Whole
    }

    fn sync(&mut self, bitmaps: &[Arc<DirtyBitmap>]) -> Result<(), DirtyLogError> {
        self.0.iter().zip(bitmaps).for_each(|(written, dirty)| written.move_to(dirty));
        Ok(())
    }

    fn stop(&mut self) {}
}
