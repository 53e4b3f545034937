//! A guest whose threads use all of its memory where it has gone, and a model of what they wrote.

use std::thread;

use multifd_engine::RamBlock;

use crate::ram::{load, write};

/// In which order the threads of the guest use its pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    /// One thread, each page after the one before.
    Ascending,
    /// One thread, here and there.
    Random,
    /// 16 threads at once, each in its own part of each block: half of them in order, half here and
    /// there.
    Many,
}

/// The pages of one thread, in its order.
fn walk(pages: std::ops::Range<usize>, random: bool) -> impl Iterator<Item = usize> {
    // Odd, so that a power of two has all of its numbers.
    let (step, round) = if random { (1237, pages.len().next_power_of_two()) } else { (1, pages.len()) };
    (0..round).map(move |turn| pages.start + turn * step % round).filter(move |page| pages.contains(page))
}

/// Value of what a thread writes to a page that it has used.
const WRITTEN: usize = 0x7777;

/// Uses each page: compares it with the source's, and writes to every second. What was written is
/// read again at the end.
fn use_pages(there: &RamBlock, here: &RamBlock, pages: std::ops::Range<usize>, random: bool) {
    for page in walk(pages, random) {
        assert!(load(there, page) == load(here, page), "page {page} of {}", there.name());
        if page % 2 == 0 {
            write(there, page, WRITTEN);
        }
    }
}

/// The guest's threads, from the moment it may run on. Returns when they have used all pages.
pub(crate) fn run(there: &[RamBlock], here: &[RamBlock], order: Order) {
    let threads = if order == Order::Many { 16 } else { 1 };
    thread::scope(|scope| {
        for thread in 0..threads {
            scope.spawn(move || {
                let random = order == Order::Random || order == Order::Many && thread % 2 == 1;
                for (there, here) in there.iter().zip(here) {
                    let share = there.pages().div_ceil(threads);
                    let end = ((thread + 1) * share).min(there.pages());
                    use_pages(there, here, (thread * share).min(end)..end, random);
                }
            });
        }
    });
}

/// Compares every page with what the guest has written since it goes on, and what it had before.
pub(crate) fn check(there: &[RamBlock], here: &[RamBlock]) {
    for (there, here) in there.iter().zip(here) {
        for page in 0..there.pages() {
            if page % 2 == 0 {
                write(here, page, WRITTEN);
            }
            assert!(load(there, page) == load(here, page), "page {page} of {} at the end", there.name());
        }
    }
}
