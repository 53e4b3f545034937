//! The log that the kernel keeps for any memory of this process.

use std::sync::atomic::AtomicBool;

use multifd_engine::conformance::{check_dirty_log, scribble};
use multifd_engine::vm_memory::Bytes;
use multifd_engine::{DirtyLog, HostMemory, PAGE, RamBlock, UserfaultLog};

use crate::huge_pages::HugePages;
use crate::memory::{
    HUGE_PAGE, advise, anonymous, anonymous_huge, bitmaps, block, map_anew, memfd, pages, pipe, read_into,
    store,
};
use crate::skip::skipped;

const RUNS: usize = 40;

fn log() -> Option<UserfaultLog> {
    UserfaultLog::new()
        .map_err(|error| {
            let cause = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
            skipped(&format!("{error}: {cause}"));
        })
        .ok()
}

/// Two threads that store, and one that has the kernel write.
fn check(ram: &[RamBlock], runs: usize) {
    let Some(mut log) = log() else { return };
    let storing = |seed| {
        move |running: &AtomicBool| {
            scribble(ram, seed, running, |block, offset, bytes| store(ram, block, offset, bytes));
        }
    };
    let (read, write) = pipe();
    let reading = |running: &AtomicBool| {
        scribble(ram, 3, running, |block, offset, bytes| {
            read_into(ram, block, offset, (&read, &write), bytes);
        });
    };
    check_dirty_log(&mut log, ram, runs, &[&storing(1), &storing(2), &reading]);
}

#[test]
fn no_write_to_anonymous_memory_is_lost() {
    check(&[block("a", anonymous(3000)), block("b", anonymous(1001))], RUNS);
}

#[test]
fn no_write_to_a_memfd_is_lost() {
    check(&[block("a", memfd(3000 * PAGE, 0).unwrap()), block("b", memfd(1001 * PAGE, 0).unwrap())], RUNS);
}

#[test]
fn no_write_to_memory_of_transparent_huge_pages_is_lost() {
    let memory = anonymous(8192);
    advise(&memory, 0, memory.len(), libc::MADV_HUGEPAGE);
    for offset in (0..memory.len()).step_by(PAGE) {
        memory.slice(offset, 1).unwrap().write_obj(1_u8, 0).unwrap();
    }
    check(&[block("a", memory)], RUNS / 2);
}

#[test]
fn no_write_to_huge_pages_is_lost() {
    let huge = match HugePages::reserve(24) {
        Ok(huge) => huge,
        Err(why) => return skipped(&why),
    };
    let shared = memfd(12 * HUGE_PAGE, libc::MFD_HUGETLB | libc::MFD_HUGE_2MB).unwrap();
    let private = anonymous_huge(12 * HUGE_PAGE).unwrap();
    a_huge_page_is_reported_as_a_whole(&shared);
    a_huge_page_is_reported_as_a_whole(&private);
    check(&[block("a", shared), block("b", private)], RUNS / 6);
    drop(huge);
}

fn a_huge_page_is_reported_as_a_whole(memory: &HostMemory) {
    let Some(mut log) = log() else { return };
    let ram = [block("huge", memory.clone())];
    let mut bitmaps = bitmaps(&ram);
    store(&ram, 0, 0, &[1]);
    log.start(&ram).unwrap();
    store(&ram, 0, 3 * HUGE_PAGE + 700 * PAGE / 2, &[1]);
    log.sync(&bitmaps).unwrap();
    assert_eq!(pages(&mut bitmaps[0]), (3 * 512..4 * 512).collect::<Vec<_>>());
    log.sync(&bitmaps).unwrap();
    assert_eq!(pages(&mut bitmaps[0]), [0; 0]);
    log.stop();
}

/// Of each kind of memory: some written before the start, some never touched.
fn kinds() -> [RamBlock; 2] {
    let kinds = [block("anonymous", anonymous(2000)), block("memfd", memfd(2000 * PAGE, 0).unwrap())];
    for offset in (0..1000 * PAGE).step_by(PAGE) {
        store(&kinds, 0, offset, &[1]);
        store(&kinds, 1, offset, &[1]);
    }
    kinds
}

#[test]
fn exactly_what_was_written_is_reported_once() {
    let Some(mut log) = log() else { return };
    let ram = kinds();
    let mut bitmaps = bitmaps(&ram);
    log.start(&ram).unwrap();
    for block in 0..2 {
        store(&ram, block, 7 * PAGE - 1, &[1, 2]);
        store(&ram, block, 1999 * PAGE, &[1]);
        // Reading brings pages in, and is no write.
        let mut page = [0; PAGE];
        assert!((0..2000).all(|number| ram[block].read_page(number, &mut page)));
    }
    log.sync(&bitmaps).unwrap();
    for bitmap in &mut bitmaps {
        assert_eq!(pages(bitmap), [6, 7, 1999]);
    }
    log.sync(&bitmaps).unwrap();
    store(&ram, 1, 5 * PAGE, &[1]);
    for bitmap in &mut bitmaps {
        assert_eq!(pages(bitmap), [0; 0]);
    }
    log.stop();
    let error = log.sync(&bitmaps).unwrap_err();
    assert_eq!(error.to_string(), "0 RAM blocks are watched, 2 have bitmaps: the log is not started");
    assert_eq!(pages(&mut bitmaps[1]), [0; 0], "after the end nothing is noted");
}

#[test]
fn memory_that_is_mapped_anew_meanwhile_fails_the_sync() {
    let Some(mut log) = log() else { return };
    let ram = [block("a", anonymous(64))];
    log.start(&ram).unwrap();
    map_anew(ram[0].memory(), 16 * PAGE, 16 * PAGE);
    store(&ram, 0, 20 * PAGE, &[1]);
    let error = log.sync(&bitmaps(&ram)).unwrap_err();
    assert_eq!(error.to_string(), "fetching the written pages of RAM block a");
    log.stop();
}

/// As reclaim does it: the data is in the file, the page table forgets that it was written.
#[test]
fn a_written_page_that_loses_its_mapping_is_reported() {
    let Some(mut log) = log() else { return };
    let ram = kinds();
    let mut bitmaps = bitmaps(&ram);
    log.start(&ram).unwrap();
    for page in [3, 999, 1500] {
        store(&ram, 1, page * PAGE, &[9]);
        advise(ram[1].memory(), page * PAGE, PAGE, libc::MADV_DONTNEED);
    }
    log.sync(&bitmaps).unwrap();
    let reported = pages(&mut bitmaps[1]);
    assert!([3, 999, 1500].iter().all(|page| reported.contains(page)), "{reported:?}");
    log.stop();
}

#[test]
fn more_runs_than_fit_a_call_are_fetched() {
    let Some(mut log) = log() else { return };
    let ram = [block("a", anonymous(30_000))];
    let mut bitmaps = bitmaps(&ram);
    log.start(&ram).unwrap();
    let every_other: Vec<_> = (0..30_000).step_by(2).collect();
    for page in &every_other {
        store(&ram, 0, page * PAGE, &[1]);
    }
    log.sync(&bitmaps).unwrap();
    assert_eq!(pages(&mut bitmaps[0]), every_other);
    log.stop();
}

#[test]
fn memory_has_one_log_at_a_time_and_is_free_after_it() {
    let (Some(mut first), Some(mut second)) = (log(), log()) else { return };
    let ram = kinds();
    first.start(&ram).unwrap();
    let error = second.start(&ram).unwrap_err();
    assert!(error.to_string().starts_with("registering RAM block anonymous: 8192000 bytes at 0x"), "{error}");
    second.stop();
    first.stop();
    second.start(&ram).unwrap();
    drop(second);
    first.start(&ram).unwrap();
    first.stop();
}
