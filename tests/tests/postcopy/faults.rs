//! Threads that touch memory whose pages follow, in order, at random, and from many at once.
#![allow(clippy::indexing_slicing, clippy::expect_used, reason = "test code may panic")]

use multifd_engine::{PAGE, PageFaults, PostcopyEnd, PostcopyReport, RamBlock};
use multifd_tests::{Failure, Outcome, skip};

use crate::author::{Author, content};
use crate::huge_pages::HugePages;
use crate::memory::{HUGE, Kind, Pair, check, load, start, text};

const PAGES: usize = 4 * HUGE / PAGE;

/// A host page of any kind.
const LAST: usize = HUGE / PAGE;

/// The order in which a thread touches pages.
#[derive(Clone, Copy, Debug)]
enum Touch {
    InOrder,
    /// By a step that is prime to the number of pages.
    AtRandom(usize),
}

/// Touches pages of all blocks but the last of all, which ends the test, and checks each.
fn touch(memory: &[RamBlock], how: Touch, count: usize) {
    let pages = memory.iter().map(RamBlock::pages).sum::<usize>() - LAST;
    for index in 0..count.min(pages) {
        let mut page = match how {
            Touch::InOrder => index,
            Touch::AtRandom(step) => index * step % pages,
        };
        let mut block = 0;
        while page >= memory[block].pages() {
            page -= memory[block].pages();
            block += 1;
        }
        assert!(load(&memory[block], page) == content(block, page, false), "page {page} of block {block}");
    }
}

/// Answers requests, up to one for the last pages of all. Gives how many there were.
fn serve(mut author: Author, last: (usize, usize)) -> Outcome<(Author, u64)> {
    for asked in 1.. {
        let (block, page) = author.request()?;
        author.host_page(block, page)?;
        if block == last.0 && page >= last.1 {
            return Ok((author, asked));
        }
    }
    Err(Failure::new("requests without an end"))
}

/// Threads fault on nothing but requested pages; then the rest comes.
fn faults(kinds: &[(Kind, usize)], threads: &[Touch], count: usize) -> Outcome<(PostcopyReport, PageFaults)> {
    faults_heard_by(1, kinds, threads, count)
}

/// The same with that many slices of RAM.
fn faults_heard_by(
    fault_threads: usize,
    kinds: &[(Kind, usize)],
    threads: &[Touch],
    count: usize,
) -> Outcome<(PostcopyReport, PageFaults)> {
    let Pair { author, mut guest, memory } =
        Pair::switched_with(kinds, |destination| destination.fault_threads(fault_threads))?;
    guest.loaded().map_err(text)?;
    let last_block = memory.len() - 1;
    let last = memory[last_block].pages() - LAST;
    let serving = start(move || serve(author, (last_block, last)));
    let toucher = |how: &Touch| {
        let (memory, how) = (memory.clone(), *how);
        start(move || touch(&memory, how, count))
    };
    let touching: Vec<_> = threads.iter().map(toucher).collect();
    let region = memory.clone();
    let ending = start(move || {
        let panicked = touching.into_iter().filter_map(|thread| thread.join().err()).count();
        assert!(load(&region[last_block], last + 2) == content(last_block, last + 2, false));
        panicked
    });
    // First: threads that get no answer wait for ever.
    let (mut author, asked) = serving.join().map_err(|_| Failure::new("the source panicked"))??;
    let panicked = ending.join().map_err(|_| Failure::new("the last page is not the source's"))?;
    assert_eq!(panicked, 0);
    author.background()?;
    let finishing = start(move || author.finish());
    let PostcopyEnd::Completed(report) = guest.wait().map_err(text)? else {
        return Err(Failure::new("the post-copy paused"));
    };
    finishing.join().map_err(|_| Failure::new("the source panicked"))??;
    check(&memory);
    let mut figures = report.postcopy.ok_or_else(|| Failure::new("no figures"))?;
    let faults = figures.faults.take().ok_or_else(|| Failure::new("no figures of faults"))?;
    assert_eq!(figures.requests, asked, "each is asked for once");
    assert!(faults.faults >= figures.requests, "{faults:?}");
    assert_eq!(faults.fault_us.histogram.iter().sum::<u64>(), faults.faults);
    assert_eq!(report.progress.faults, faults.faults);
    assert_eq!(report.progress.fault_max_us, faults.fault_us.max);
    // A page that was written before the switch is none of these.
    let pages: u64 = memory.iter().map(|block| block.pages() as u64).sum();
    assert!(faults.pages_pushed > 0 && faults.pages_pushed + figures.pages_requested <= pages, "{faults:?}");
    Ok((figures, faults))
}

const SIXTEEN: [Touch; 16] = {
    let mut all = [Touch::InOrder; 16];
    let mut index = 0;
    while index < 16 {
        all[index] = Touch::AtRandom(2 * index * index + 37);
        index += 1;
    }
    all
};

#[test]
fn pages_that_threads_touch_come_when_they_are_asked_for() -> Outcome {
    let kinds = [(Kind::Anonymous, PAGES), (Kind::Memfd, PAGES)];
    for threads in [&[Touch::InOrder][..], &[Touch::AtRandom(1031)], &SIXTEEN] {
        let (figures, faults) = faults(&kinds, threads, 600)?;
        assert!(faults.threads.len() <= threads.len() + 1, "{faults:?}");
        assert!(figures.requests > 100, "{figures:?}");
    }
    Ok(())
}

#[test]
fn faults_on_slices_of_ram_are_heard_by_a_thread_each() -> Outcome {
    // A block of fewer pages than there are slices is among them.
    let kinds = [(Kind::Memfd, 3), (Kind::Anonymous, PAGES), (Kind::Memfd, PAGES)];
    for fault_threads in [4, 16] {
        let (figures, _) = faults_heard_by(fault_threads, &kinds, &SIXTEEN, 600)?;
        assert!(figures.requests > 100, "{figures:?}");
    }
    Ok(())
}

#[test]
fn huge_pages_come_as_a_whole() -> Outcome {
    let kinds = [(Kind::Anonymous, PAGES), (Kind::Huge, 2 * PAGES)];
    let pool = match HugePages::reserve((2 * PAGES * PAGE).div_ceil(HUGE)) {
        Ok(pool) => pool,
        Err(why) => skip!("{why}"),
    };
    let (figures, _) = faults(&kinds, &SIXTEEN, 600)?;
    drop(pool);
    assert!(figures.pages_requested > figures.requests, "{figures:?}");
    Ok(())
}

/// A balloon, say: what it has dropped is zero, whatever the source sends.
#[test]
fn a_page_that_is_dropped_meanwhile_is_zero_and_stays_so() -> Outcome {
    for kind in [Kind::Anonymous, Kind::Memfd] {
        let Pair { mut author, mut guest, memory } = Pair::switched(&[(kind, PAGES)])?;
        guest.loaded().map_err(text)?;
        // Some of them are here, others are not.
        author.host_page(0, 101)?;
        let dropped = 96..160;
        let region = memory[0].clone();
        let range = dropped.clone();
        start(move || drop_pages(&region, range)).join().map_err(|_| Failure::new("no drop"))?;
        let author = start(move || author.background().map(|()| author)).join();
        let author = author.map_err(|_| Failure::new("the source panicked"))??;
        for page in dropped.clone() {
            assert!(load(&memory[0], page) == [0; PAGE], "page {page} of {kind:?}");
        }
        let finishing = start(move || author.finish());
        let end = guest.wait().map_err(text)?;
        assert!(matches!(end, PostcopyEnd::Completed(_)), "{end:?}");
        finishing.join().map_err(|_| Failure::new("the source panicked"))??;
        for page in 0..PAGES {
            let expected = if dropped.contains(&page) { [0; PAGE] } else { content(0, page, false) };
            assert!(load(&memory[0], page) == expected, "page {page} of {kind:?}");
        }
    }
    Ok(())
}

#[expect(unsafe_code, reason = "a guest's balloon drops pages by madvise")]
pub(crate) fn drop_pages(block: &RamBlock, pages: std::ops::Range<usize>) {
    let slice = block.memory().slice(pages.start * PAGE, pages.len() * PAGE).expect("pages of the block");
    let advice = if block.memory().file().is_some() { libc::MADV_REMOVE } else { libc::MADV_DONTNEED };
    // SAFETY: the range is mapped; that its content goes is what the test is about.
    let done = unsafe { libc::madvise(slice.ptr_guard_mut().as_ptr().cast(), slice.len(), advice) };
    assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
}
