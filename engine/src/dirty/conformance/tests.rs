//! The suite is only as good as the faults that it finds.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::AtomicU64;

use vm_memory::Bytes;

use super::*;
use crate::dirty::{DirtyLogError, SoftwareLog};
use crate::guest::HostMemory;

fn ram() -> Vec<RamBlock> {
    let block = |name: &str, pages| {
        RamBlock::new(name.try_into().unwrap(), HostMemory::anonymous(pages * PAGE).unwrap())
    };
    vec![block("a", 2000), block("b", 500)]
}

fn store(ram: &[RamBlock], block: usize, offset: usize, bytes: &[u8]) {
    ram[block].memory().slice(offset, bytes.len()).unwrap().write_slice(bytes, 0).unwrap();
}

fn marking(ram: &[RamBlock], log: &mut dyn DirtyLog, marked: impl Fn(usize, usize, usize) + Sync) {
    let write = |seed, running: &AtomicBool| {
        scribble(ram, seed, running, |block, offset, bytes| {
            store(ram, block, offset, bytes);
            marked(block, offset, bytes.len());
        });
    };
    // The last writes of each run: whatever the scheduler does, these pages have changed.
    let count = AtomicU64::new(1);
    let edges = |running: &AtomicBool| {
        while running.load(Ordering::Relaxed) {
            thread::yield_now();
        }
        for (block, of) in ram.iter().enumerate() {
            for page in [0, of.pages() - 1] {
                let bytes = count.fetch_add(1, Ordering::Relaxed).to_le_bytes();
                store(ram, block, page * PAGE, &bytes);
                marked(block, page * PAGE, bytes.len());
            }
        }
    };
    // Two seeds: a writer that follows the other from page to page notes the writes that the
    // other loses.
    check_dirty_log(log, ram, 20, &[&|running| write(7, running), &|running| write(8, running), &edges]);
}

/// Loses every `nth` write.
fn loses(nth: usize) -> bool {
    let ram = ram();
    let mut log = SoftwareLog::new(&ram);
    let marker = log.marker();
    let writes = std::sync::atomic::AtomicUsize::new(1);
    let run = || {
        marking(&ram, &mut log, |block, offset, len| {
            if !writes.fetch_add(1, Ordering::Relaxed).is_multiple_of(nth) {
                marker.mark(block, offset as u64, len as u64);
            }
        });
    };
    catch_unwind(AssertUnwindSafe(run)).is_err()
}

#[test]
fn a_lost_write_is_found() {
    // Enough of them to be found in a few runs, on a machine that is busy with other things,
    // too.
    assert!(loses(5));
    assert!(!loses(usize::MAX));
}

/// What a log does wrong.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fault {
    None,
    /// Of what it notes.
    ReportsNothing,
    LosesTheFirstPage,
    LosesTheLastPage,
    ReportsTheNextPage,
    ForgetsABlock,
    MistakesTheBlock,
    /// Of when it notes.
    BeginsAtTheFirstSync,
    TiresOfSyncs,
    LosesWhatRaces,
    WorksOnlyOnce,
    /// Of what it says.
    CoversAllBlocks,
    CoversPagesThatAreNotThere,
    FailsToStart,
    FailsToSync,
}

/// A software log that is wrong.
struct Faulty {
    fault: Fault,
    log: SoftwareLog,
    starts: usize,
    syncs: usize,
    stops: usize,
}

impl Faulty {
    /// Its log's own bitmaps, changed by the fault.
    fn report(&self, mine: &[Arc<DirtyBitmap>], theirs: &[Arc<DirtyBitmap>]) {
        for (block, bitmap) in mine.iter().enumerate() {
            let (pages, to) = (
                bitmap.pages(),
                match self.fault {
                    Fault::MistakesTheBlock => theirs.len() - 1 - block,
                    _ => block,
                },
            );
            for page in (0..pages).filter(|page| bitmap.test(*page)) {
                let page = match self.fault {
                    Fault::ReportsNothing => continue,
                    Fault::LosesTheFirstPage if page == 0 => continue,
                    Fault::LosesTheLastPage if page == pages - 1 => continue,
                    Fault::ForgetsABlock if block == 1 => continue,
                    Fault::WorksOnlyOnce if self.starts > 1 => continue,
                    Fault::TiresOfSyncs if self.syncs > 9 => continue,
                    Fault::BeginsAtTheFirstSync if self.syncs == 1 => continue,
                    Fault::ReportsTheNextPage => page + 1,
                    _ => page,
                };
                theirs[to].set_range(page, 1);
            }
        }
    }
}

impl DirtyLog for Faulty {
    fn name(&self) -> &str {
        "faulty"
    }
    fn start(&mut self, ram: &[RamBlock]) -> Result<(), DirtyLogError> {
        (self.starts, self.syncs) = (self.starts + 1, 0);
        if self.fault == Fault::FailsToStart {
            return Err(DirtyLogError::new("no mood"));
        }
        self.log.start(ram)
    }
    fn covers(&self, block: &RamBlock) -> Coverage {
        match self.fault {
            Fault::CoversAllBlocks => Coverage::Whole,
            Fault::CoversPagesThatAreNotThere => {
                Coverage::Pages(std::iter::once(1..block.pages() + 1).collect())
            }
            _ => self.log.covers(block),
        }
    }
    fn sync(&mut self, bitmaps: &[Arc<DirtyBitmap>]) -> Result<(), DirtyLogError> {
        self.syncs += 1;
        if self.fault == Fault::FailsToSync {
            return Err(DirtyLogError::new("no mood"));
        }
        let copies =
            || bitmaps.iter().map(|bitmap| Arc::new(DirtyBitmap::new(bitmap.pages()))).collect::<Vec<_>>();
        let mine = copies();
        self.log.sync(&mine)?;
        self.report(&mine, bitmaps);
        if self.fault == Fault::LosesWhatRaces {
            // Read, and then cleared, instead of both at once: what is written between is lost.
            let lost = copies();
            for _ in 0..20_000 {
                self.log.sync(&lost)?;
                if lost.iter().any(|bitmap| bitmap.count() > 0) {
                    break;
                }
                thread::yield_now();
            }
        }
        Ok(())
    }
    fn stop(&mut self) {
        self.stops += 1;
        self.log.stop();
    }
}

/// The complaint about a log with this fault, and how often it was started and stopped.
fn complaint(fault: Fault) -> (Option<String>, usize, usize) {
    let ram = ram();
    let log = SoftwareLog::new(&ram);
    let marker = log.marker();
    let mut log = Faulty { fault, log, starts: 0, syncs: 0, stops: 0 };
    let run = || {
        marking(&ram, &mut log, |block, offset, len| marker.mark(block, offset as u64, len as u64));
    };
    let panic = catch_unwind(AssertUnwindSafe(run)).err();
    let text = panic.map(|panic| panic.downcast::<String>().map_or_else(|_| String::new(), |text| *text));
    (text, log.starts, log.stops)
}

#[test]
fn a_log_without_fault_passes_and_is_stopped_as_often_as_it_was_started() {
    assert_eq!(complaint(Fault::None), (None, 2, 2));
}

#[test]
fn every_fault_of_a_log_is_found_and_named() {
    let lost = "was written and not reported";
    for (fault, text) in [
        (Fault::ReportsNothing, lost),
        (Fault::LosesTheFirstPage, "start 0"),
        (Fault::LosesTheLastPage, lost),
        (Fault::ReportsTheNextPage, lost),
        (Fault::ForgetsABlock, "of b was written and not reported"),
        (Fault::MistakesTheBlock, lost),
        (Fault::BeginsAtTheFirstSync, lost),
        (Fault::TiresOfSyncs, lost),
        (Fault::LosesWhatRaces, lost),
        (Fault::WorksOnlyOnce, "start 1"),
        (Fault::CoversAllBlocks, "covers a block that it was not started for"),
        (Fault::CoversPagesThatAreNotThere, "covers pages 1..2001 of RAM block a, which has 2000"),
        (Fault::FailsToStart, "start 0, run 0: no mood"),
        (Fault::FailsToSync, "start 0, run 0: no mood"),
    ] {
        let (complaint, ..) = complaint(fault);
        let complaint = complaint.unwrap_or_else(|| panic!("{fault:?} is not found"));
        assert!(complaint.contains(text), "{fault:?}: {complaint}");
    }
}

struct Silent;
impl DirtyLog for Silent {
    fn name(&self) -> &str {
        "silent"
    }
    fn start(&mut self, _: &[RamBlock]) -> Result<(), DirtyLogError> {
        Ok(())
    }
    fn covers(&self, _: &RamBlock) -> Coverage {
        Coverage::Nothing
    }
    fn sync(&mut self, _: &[Arc<DirtyBitmap>]) -> Result<(), DirtyLogError> {
        Ok(())
    }
    fn stop(&mut self) {}
}

#[test]
#[should_panic(expected = "there is nothing to report")]
fn writers_that_write_nothing_are_found() {
    check_dirty_log(&mut Silent, &ram(), 1, &[&|_| {}]);
}
