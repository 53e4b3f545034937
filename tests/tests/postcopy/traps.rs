//! What can go wrong with memory whose pages follow, and must not go unnoticed.
#![allow(clippy::indexing_slicing, clippy::expect_used, reason = "test code may panic")]

use std::fs;
use std::os::unix::net::UnixStream;
use std::sync::Mutex;
use std::sync::mpsc::channel;

use multifd_engine::vm_memory::{Bytes as _, WriteVolatile as _};
use multifd_engine::wire::{BlockRef, PageSize, RamRecord};
use multifd_engine::{Channel, DirtyLog as _, PAGE, PostcopyEnd, PostcopyGuest, RamBlock, UserfaultLog};
use multifd_tests::{Failure, Outcome, skip};
use rustix::fs::{MemfdFlags, memfd_create};

use crate::author::{Author, content};
use crate::faults::drop_pages;
use crate::huge_pages::HugePages;
use crate::memory::{HUGE, Kind, Pair, check, load, start, text};

const PAGES: usize = 600;

/// Whether faults on missing pages of the block wait for a userfaultfd.
fn faults_wait(block: &RamBlock) -> Outcome<bool> {
    let smaps = fs::read_to_string("/proc/self/smaps")?;
    let start = block.memory().slice(0, 1).map_or(0, |slice| slice.ptr_guard().as_ptr() as usize);
    let of_block = smaps.split_once(&format!("{start:x}-")).map_or("", |(_, rest)| rest);
    let flags = of_block.lines().find_map(|line| line.strip_prefix("VmFlags:"));
    let flags = flags.ok_or_else(|| Failure::new("the block is not mapped"))?;
    Ok(flags.split(' ').any(|flag| flag == "um"))
}

/// Goes on over a new link after a pause, to the end.
fn recover_and_finish(author: Author, guest: &mut PostcopyGuest) -> Outcome {
    let (ours, theirs) = UnixStream::pair()?;
    let recovering = start(move || author.recover(ours));
    guest.recover_over(Channel::try_from(theirs)?, None).map_err(text)?;
    let author = recovering.join().map_err(|_| Failure::new("the source panicked"))??;
    finish(author, guest)
}

fn finish(mut author: Author, guest: &mut PostcopyGuest) -> Outcome {
    author.background()?;
    let finishing = start(move || author.finish());
    let end = guest.wait().map_err(text)?;
    assert!(matches!(end, PostcopyEnd::Completed(_)), "{end:?}");
    finishing.join().map_err(|_| Failure::new("the source panicked"))?
}

fn paused(guest: &mut PostcopyGuest) -> Outcome<String> {
    match guest.wait().map_err(text)? {
        PostcopyEnd::Paused(why) => Ok(why.chain()),
        PostcopyEnd::Completed(_) => Err(Failure::new("completed")),
    }
}

/// Reads by a system call, which says an error where a load would get a signal.
fn can_be_read(block: &RamBlock, page: usize) -> bool {
    let slice = block.memory().slice(page * PAGE, PAGE).expect("a page of the block");
    let mut copy = fs::File::from(memfd_create("copy", MemfdFlags::CLOEXEC).expect("a memfd"));
    copy.write_all_volatile(&slice).is_ok()
}

/// The last descriptor of a userfaultfd, closed, would let every missing page read as zero.
#[test]
fn what_is_missing_is_never_read_as_zero_whatever_becomes_of_the_destination() -> Outcome {
    let Pair { author, guest, memory } = Pair::switched(&[(Kind::Anonymous, PAGES)])?;
    guest.loaded().map_err(text)?;
    drop(guest);
    drop(author);
    assert!(faults_wait(&memory[0])?);
    // A page that had come is there.
    assert!(load(&memory[0], 0) == content(0, 0, false));
    Ok(())
}

/// Neither the thread that hears of faults nor the one that places pages takes the descriptor
/// along.
#[test]
fn what_is_missing_is_never_read_as_zero_when_a_thread_panics() -> Outcome {
    for thread in ["mig-fault", "mig-postcopy"] {
        // As soon as the test wants it to.
        let (go_on, waits) = channel::<()>();
        let waits = Mutex::new(waits);
        let hook = move |name: &str| {
            if name == thread {
                let _ = waits.lock().expect("the only lock").recv();
                panic!("a hook that panics");
            }
        };
        let Pair { author, mut guest, memory } =
            Pair::switched_with(&[(Kind::Memfd, PAGES)], |destination| destination.thread_hook(hook))?;
        guest.loaded().map_err(text)?;
        drop(go_on);
        let why = paused(&mut guest)?;
        assert!(why.contains("panicked"), "{thread}: {why}");
        let (_ours, theirs) = UnixStream::pair()?;
        assert!(guest.recover_over(Channel::try_from(theirs)?, None).is_err(), "{thread}");
        drop((guest, author));
        assert!(faults_wait(&memory[0])?, "{thread}");
    }
    Ok(())
}

#[test]
fn threads_that_wait_go_on_with_an_error_when_what_is_missing_is_poisoned() -> Outcome {
    for kind in [Kind::Anonymous, Kind::Memfd] {
        let Pair { mut author, guest, memory } =
            Pair::switched_with(&[(kind, PAGES)], |destination| destination.fault_threads(2))?;
        guest.loaded().map_err(text)?;
        let read = |page: usize| {
            let block = memory[0].clone();
            start(move || can_be_read(&block, page))
        };
        let waiting = [read(31), read(PAGES - 1)];
        let mut asked = [author.request()?, author.request()?];
        asked.sort_unstable();
        assert_eq!(asked, [(0, 31), (0, PAGES - 1)]);
        let region = memory[0].clone();
        start(move || drop_pages(&region, 41..45)).join().map_err(|_| Failure::new("no drop"))?;
        let lost = guest.poison_missing().map_err(text)?;
        for thread in waiting {
            assert!(!thread.join().map_err(|_| Failure::new("a reader panicked"))?, "{kind:?}");
        }
        // Every tenth page had come, and four were dropped.
        assert_eq!(lost, PAGES - PAGES.div_ceil(10) - 4, "{kind:?}");
        assert!(!can_be_read(&memory[0], 32), "{kind:?}");
        assert!(load(&memory[0], 30) == content(0, 30, false) && load(&memory[0], 42) == [0; PAGE]);
        assert!(!faults_wait(&memory[0])?, "{kind:?}");
        author.hear().expect_err("the link is gone");
    }
    Ok(())
}

/// The kernel says ENOMEM then; a thread that touches such a page without a userfaultfd gets
/// SIGBUS.
#[test]
fn an_empty_pool_of_huge_pages_pauses_and_a_larger_one_lets_it_go_on() -> Outcome {
    const HOSTS: usize = 4;
    let free = fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages");
    if free.map_or(true, |free| free.trim() != "0") {
        skip!("no free huge pages, or none at all");
    }
    // For the page that comes before the switch.
    let pool = match HugePages::reserve(1) {
        Ok(pool) => pool,
        Err(why) => skip!("{why}"),
    };
    let pages = HOSTS * HUGE / PAGE;
    let Pair { mut author, mut guest, memory } = Pair::switched(&[(Kind::Unreserved, pages)])?;
    guest.loaded().map_err(text)?;
    let block = memory[0].clone();
    let waiting = start(move || load(&block, pages - 1) == content(0, pages - 1, false));
    assert_eq!(author.request()?, (0, pages - HUGE / PAGE));
    // The link may be gone before the end of the section was taken.
    let _ = author.host_page(0, pages - 1);
    let why = paused(&mut guest)?;
    assert!(why.contains("no page of 2048 KiB is left in this host's pool of huge pages"), "{why}");
    let more = HugePages::reserve(HOSTS - 1).map_err(Failure::new)?;
    recover_and_finish(author, &mut guest)?;
    assert!(waiting.join().map_err(|_| Failure::new("a reader panicked"))?);
    check(&memory);
    drop((guest, memory, more, pool));
    Ok(())
}

#[test]
fn a_page_that_comes_again_unasked_does_not_undo_what_the_guest_has_written() -> Outcome {
    let Pair { mut author, mut guest, memory } =
        Pair::switched(&[(Kind::Anonymous, PAGES), (Kind::Memfd, PAGES)])?;
    guest.loaded().map_err(text)?;
    let written = [0xa5; PAGE];
    for (block, region) in memory.iter().enumerate() {
        author.host_page(block, 33)?;
        let region = region.clone();
        let writing = start(move || {
            let slice = region.memory().slice(33 * PAGE, PAGE).expect("a page of the block");
            slice.write_slice(&written, 0).expect("a page's bytes");
        });
        // It may have been asked for before it came.
        writing.join().map_err(|_| Failure::new("a writer panicked"))?;
        for _ in 0..3 {
            author.stale_page(block, 33)?;
        }
    }
    finish(author, &mut guest)?;
    for (block, ram) in memory.iter().enumerate() {
        for page in 0..PAGES {
            let expected = if page == 33 { written } else { content(block, page, false) };
            assert!(load(ram, page) == expected, "page {page} of block {block}");
        }
    }
    Ok(())
}

#[test]
fn pages_that_cannot_be_pause_by_name_and_are_not_placed() -> Outcome {
    let Pair { mut author, mut guest, memory } = Pair::switched(&[(Kind::Anonymous, PAGES)])?;
    guest.loaded().map_err(text)?;
    let named = |name: &str| name.try_into().map(BlockRef::Named);
    let offset = |page: usize| (page * PAGE) as u64;
    let total = offset(PAGES);
    let records = [
        (RamRecord::Page { offset: 0, block: named("ram.b")? }, "unknown RAM block \"ram.b\""),
        (
            RamRecord::Page { offset: offset(PAGES), block: named("ram.a")? },
            "pages of 4096 bytes below 0x258000",
        ),
        (RamRecord::Zero { offset: 1 << 40, block: named("ram.a")? }, "offset 0x10000000000"),
        (RamRecord::Page { offset: 0, block: BlockRef::Same }, "no RAM block was named before it"),
        (RamRecord::Xbzrle { offset: 0, block: named("ram.a")?, len: 8 }, "a difference after the switch"),
        (RamRecord::MemSize { total }, "a second list of RAM blocks"),
    ];
    for (record, says) in records {
        let mut bytes = Vec::new();
        record.encode(PageSize::K4, &mut bytes);
        bytes.extend([0x77; PAGE]);
        // The link may be gone before all of it was taken.
        let _ = author.records(&bytes);
        let why = paused(&mut guest)?;
        assert!(why.contains(says), "{says}: {why}");
        let (ours, theirs) = UnixStream::pair()?;
        let recovering = start(move || author.recover(ours));
        guest.recover_over(Channel::try_from(theirs)?, None).map_err(text)?;
        author = recovering.join().map_err(|_| Failure::new("the source panicked"))??;
    }
    finish(author, &mut guest)?;
    check(&memory);
    Ok(())
}

/// Order of tear-down: memory is taken from the userfaultfd before that is closed, so another one
/// can have it at once. While pages follow, it cannot.
#[test]
fn memory_is_free_for_a_dirty_log_when_all_pages_are_here_and_not_before() -> Outcome {
    let mut log = match UserfaultLog::new() {
        Ok(log) => log,
        Err(error) => skip!("userfaultfd: {error}"),
    };
    for kind in [Kind::Anonymous, Kind::Memfd] {
        let Pair { author, mut guest, memory } = Pair::switched(&[(kind, PAGES)])?;
        guest.loaded().map_err(text)?;
        assert!(log.start(&memory).is_err(), "{kind:?}: pages are missing");
        log.stop();
        assert!(faults_wait(&memory[0])?, "{kind:?}");
        finish(author, &mut guest)?;
        assert!(!faults_wait(&memory[0])?, "{kind:?}");
        log.start(&memory).map_err(|error| Failure::new(format!("{kind:?}: {error}")))?;
        log.stop();
        check(&memory);
    }
    Ok(())
}

/// Write-protected and missing at once is more than a kernel can say of one page.
#[test]
fn memory_that_a_dirty_log_watches_is_refused_before_the_switch() -> Outcome {
    let mut log = match UserfaultLog::new() {
        Ok(log) => log,
        Err(error) => skip!("userfaultfd: {error}"),
    };
    let block = crate::author::Block { name: "ram.a", pages: PAGES, host: 1 };
    let memory = vec![block.over(Kind::Memfd.memory(PAGES * PAGE)?)];
    log.start(&memory).map_err(|error| Failure::new(error.to_string()))?;
    let (ours, theirs) = UnixStream::pair()?;
    let destination = multifd_engine::Destination::builder(memory)
        .postcopy(true)
        .over(Channel::try_from(theirs)?, Vec::new())
        .map_err(text)?;
    let receiving = start(move || destination.receive_live());
    let mut author = Author::new(ours, &[block])?;
    // It may be refused while it still speaks.
    let _ = author.precopy();
    let received = receiving.join().map_err(|_| Failure::new("the destination panicked"))?;
    let error = received.err().ok_or_else(|| Failure::new("not refused"))?;
    assert!(error.source_may_resume(), "{error}");
    let says = "RAM block ram.a: its writes are watched by a userfaultfd, as by a dirty log";
    assert!(error.chain().contains(says), "{}", error.chain());
    log.stop();
    Ok(())
}
