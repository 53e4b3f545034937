//! What a [`DirtyLog`] must do, as a function that tries it on real memory, under real writers. The
//! logs of this crate and foreign ones go through the same.
//!
//! ```
//! use multifd_engine::conformance::{check_dirty_log, scribble};
//! use multifd_engine::vm_memory::Bytes;
//! use multifd_engine::{HostMemory, PAGE, RamBlock, SoftwareLog};
//!
//! let ram = [RamBlock::new("ram".try_into().unwrap(), HostMemory::anonymous(256 * PAGE).unwrap())];
//! let mut log = SoftwareLog::new(&ram);
//! let marker = log.marker();
//! check_dirty_log(&mut log, &ram, 10, &[&|running| {
//!     scribble(&ram, 1, running, |block, offset, bytes| {
//!         let all = ram[block].memory().slice(0, ram[block].memory().len()).unwrap();
//!         all.write_slice(bytes, offset).unwrap();
//!         marker.mark(block, offset as u64, bytes.len() as u64);
//!     });
//! }]);
//! ```

use std::hint;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use multifd_wire::BlockName;

use super::coverage::pages_covered;
use super::{Coverage, DirtyLog};
use crate::guest::{DirtyBitmap, PAGE, RamBlock};

/// Writes to the guest's memory on a thread of its own, at least once, and returns soon after
/// `running` is false.
pub type Writer<'a> = &'a (dyn Fn(&AtomicBool) + Sync);

/// Writes of a writer between two pauses.
const WRITES_AT_ONCE: usize = 4;

/// Most turns of a spin loop between two groups of writes, some microseconds: a page should not be
/// written many times between two syncs, since a write that is noted hides one to the same page
/// that is lost.
const MOST_SPINS: usize = 400;

/// Lets `writers` write to `ram` while the memory is copied in rounds, by what the log reports:
/// when the writers have stopped, after one more `sync`, the copy must equal the memory byte for
/// byte.
///
/// Does so `runs` times with the log started before and again with a second start, and once with
/// writers that write while the log starts. About a millisecond a run and MiB; with less than some
/// MiB, writes to the same pages hide that one of them is lost.
///
/// # Panics
/// When a page differs that was not reported: a lost write. When the log says that it covers what
/// it cannot, gives an error, or the writers wrote nothing.
pub fn check_dirty_log(log: &mut dyn DirtyLog, ram: &[RamBlock], runs: usize, writers: &[Writer<'_>]) {
    for start in 0..2 {
        let mut copy = None;
        let mut changed = 0;
        for run in 0..runs.max(1) {
            let what = format!("{} log, start {start}, run {run}", log.name());
            with_writers(writers, || {
                let copy = copy.get_or_insert_with(|| {
                    log.start(ram).unwrap_or_else(|error| panic!("{what}: {error}"));
                    check_coverage(log, ram, &what);
                    Copy::of(ram)
                });
                // A different number of rounds each time: writers are caught at every stage of
                // their work.
                for _ in 0..run % 5 {
                    changed += copy.round(log, ram, &what);
                    thread::yield_now();
                }
            });
            if let Some(copy) = &mut copy {
                changed += copy.round(log, ram, &what);
                copy.assert_equal(ram, &what);
            }
        }
        log.stop();
        assert!(
            changed > 0,
            "{} log: no page changed in {runs} runs: there is nothing to report",
            log.name()
        );
    }
}

/// What a log covers lies in its blocks, and a block that it was not started for is not covered: a
/// log that answers "all" to every question would hide that a block is in no log.
fn check_coverage(log: &dyn DirtyLog, ram: &[RamBlock], what: &str) {
    for block in ram {
        pages_covered(log, block).unwrap_or_else(|wrong| panic!("{what}: {wrong}"));
    }
    let Some(any) = ram.first() else { return };
    let name = BlockName::try_from("conformance: another block").unwrap_or_else(|error| panic!("{error}"));
    let other = RamBlock::new(name, any.memory().clone());
    assert!(
        log.covers(&other) == Coverage::Nothing,
        "{what}: it says that it covers a block that it was not started for"
    );
}

/// Writes counted values to random pages until `running` is false: half of them to a few hot pages,
/// the rest anywhere. `write` does it: block, offset in it, bytes.
pub fn scribble(
    ram: &[RamBlock],
    seed: u64,
    running: &AtomicBool,
    mut write: impl FnMut(usize, usize, &[u8]),
) {
    let mut random = Random(seed);
    let mut count = seed << 32;
    loop {
        for _ in 0..WRITES_AT_ONCE {
            let block = random.below(ram.len());
            let pages = ram.get(block).map_or(0, RamBlock::pages);
            let hot = random.below(2) == 0;
            let page = random.below(if hot { pages.div_ceil(64) } else { pages });
            let offset = random.below(PAGE / 8) * 8;
            count += 1;
            write(block, page * PAGE + offset, &count.to_le_bytes());
        }
        (0..random.below(MOST_SPINS)).for_each(|_| hint::spin_loop());
        if !running.load(Ordering::Relaxed) {
            break;
        }
    }
}

/// A destination: it has what the log reported, as it was when it was copied.
struct Copy {
    blocks: Vec<Vec<u8>>,
    bitmaps: Vec<Arc<DirtyBitmap>>,
}

impl Copy {
    fn of(ram: &[RamBlock]) -> Self {
        let bitmaps: Vec<_> = ram.iter().map(|block| Arc::new(DirtyBitmap::new(block.pages()))).collect();
        let blocks = ram.iter().map(|block| vec![0; block.pages() * PAGE]).collect();
        let mut copy = Self { blocks, bitmaps };
        copy.bitmaps.iter().for_each(|bitmap| bitmap.set_range(0, bitmap.pages()));
        copy.take(ram);
        copy
    }

    /// Returns how many pages were reported and had changed.
    fn round(&mut self, log: &mut dyn DirtyLog, ram: &[RamBlock], what: &str) -> usize {
        log.sync(&self.bitmaps).unwrap_or_else(|error| panic!("{what}: {error}"));
        self.take(ram)
    }

    fn take(&mut self, ram: &[RamBlock]) -> usize {
        let mut changed = 0;
        let mut now = [0; PAGE];
        for ((block, copy), bitmap) in ram.iter().zip(&mut self.blocks).zip(&self.bitmaps) {
            let words = copy.chunks_mut(64 * PAGE).enumerate();
            for (word, pages) in words {
                let bits = bitmap.take_word(word);
                for (bit, page) in pages.chunks_mut(PAGE).enumerate().filter(|(bit, _)| bits >> bit & 1 == 1)
                {
                    assert!(block.read_page(word * 64 + bit, &mut now), "no such page");
                    changed += usize::from(*page != now);
                    page.copy_from_slice(&now);
                }
            }
        }
        changed
    }

    fn assert_equal(&self, ram: &[RamBlock], what: &str) {
        let mut now = [0; PAGE];
        for (block, copy) in ram.iter().zip(&self.blocks) {
            for (page, copy) in copy.chunks(PAGE).enumerate() {
                assert!(block.read_page(page, &mut now), "no such page");
                assert!(copy == now, "{what}: page {page} of {} was written and not reported", block.name());
            }
        }
    }
}

fn with_writers(writers: &[Writer<'_>], read: impl FnOnce()) {
    /// Lets the writers end also when `read` panics: the scope waits for them.
    struct Running(AtomicBool);
    impl Running {
        fn end(&self) {
            self.0.store(false, Ordering::Relaxed);
        }
    }
    struct EndOnDrop<'a>(&'a Running);
    impl Drop for EndOnDrop<'_> {
        fn drop(&mut self) {
            self.0.end();
        }
    }
    let running = Running(AtomicBool::new(true));
    thread::scope(|scope| {
        for writer in writers {
            scope.spawn(|| writer(&running.0));
        }
        let _end = EndOnDrop(&running);
        read();
    });
}

/// SplitMix64: short, and good enough to spread writes.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = self.0;
        bits = (bits ^ bits >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ bits >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        usize::try_from((bits ^ bits >> 31) >> 1).unwrap_or(0) % limit.max(1)
    }
}

#[cfg(test)]
mod tests;
