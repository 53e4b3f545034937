//! A guest whose threads use all of its memory where it has gone, and a model of what they wrote.

use std::fs::File;
use std::thread;

use multifd_engine::vm_memory::Bytes;
use multifd_engine::{HostMemory, PAGE, RamBlock};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

pub(crate) const BLOCKS: [(&str, usize); 2] = [("pc.ram", 2048), ("vga.vram", 300)];

pub(crate) fn memory(memfd: bool) -> Vec<RamBlock> {
    BLOCKS
        .map(|(name, pages)| {
            let memory = if memfd {
                let file = File::from(memfd_create("ram", MemfdFlags::CLOEXEC).unwrap());
                ftruncate(&file, (pages * PAGE) as u64).unwrap();
                HostMemory::map_file(file, pages * PAGE).unwrap()
            } else {
                HostMemory::anonymous(pages * PAGE).unwrap()
            };
            RamBlock::new(name.try_into().unwrap(), memory)
        })
        .to_vec()
}

pub(crate) fn write(block: &RamBlock, page: usize, value: usize) {
    let bytes = ((value << 16 | page) as u64 | 1 << 63).to_le_bytes();
    block.memory().slice(page * PAGE, PAGE).unwrap().write_slice(&bytes.repeat(PAGE / 8), 0).unwrap();
}

/// Loads a page, as a vCPU would: a fault waits for it.
pub(crate) fn load(block: &RamBlock, page: usize) -> [u8; PAGE] {
    let mut bytes = [0; PAGE];
    block.memory().slice(page * PAGE, PAGE).unwrap().read_slice(&mut bytes, 0).unwrap();
    bytes
}

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
