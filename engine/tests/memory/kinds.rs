//! Memory of every kind, and what a VMM does to it.
#![expect(unsafe_code, reason = "memory of special kinds has no safe wrapper")]

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::FromRawFd;
use std::sync::Arc;

use multifd_engine::unstable::{PageQuery, PageRun};
use multifd_engine::vm_memory::{FileOffset, MmapRegion};
use multifd_engine::{HostMemory, PAGE, RamBlock};

use crate::PAGES;

pub(crate) const READ_WRITE: i32 = libc::PROT_READ | libc::PROT_WRITE;
pub(crate) const PRIVATE: i32 = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;

pub(crate) fn block(memory: HostMemory) -> RamBlock {
    RamBlock::new("ram@0x0".try_into().unwrap(), memory)
}

pub(crate) fn map(protection: i32, flags: i32, file: Option<File>, pages: usize) -> io::Result<HostMemory> {
    let file = file.map(|file| FileOffset::new(file, 0));
    let region = MmapRegion::<()>::build(file, pages * PAGE, protection, flags).map_err(io::Error::other)?;
    HostMemory::from_region(Arc::new(region))
}

pub(crate) fn anonymous() -> RamBlock {
    block(map(READ_WRITE, PRIVATE, None, PAGES).unwrap())
}

pub(crate) fn memfd(flags: libc::c_uint, len: usize) -> io::Result<File> {
    // SAFETY: the name is a C string.
    let fd = unsafe { libc::memfd_create(c"guest".as_ptr(), flags | libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a new descriptor that nothing else owns.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(len as u64)?;
    Ok(file)
}

pub(crate) fn file() -> File {
    memfd(0, PAGES * PAGE).unwrap()
}

pub(crate) fn start(block: &RamBlock, pages: &Range<usize>) -> *mut libc::c_void {
    let slice = block.memory().slice(pages.start * PAGE, pages.len() * PAGE).unwrap();
    slice.ptr_guard_mut().as_ptr().cast()
}

pub(crate) fn protect(block: &RamBlock, pages: Range<usize>, protection: i32) {
    // SAFETY: the range is mapped; what is done to it afterwards is what these tests are about.
    let done = unsafe { libc::mprotect(start(block, &pages), pages.len() * PAGE, protection) };
    assert_eq!(done, 0, "{}", io::Error::last_os_error());
}

pub(crate) fn advise(block: &RamBlock, pages: Range<usize>, advice: i32) {
    // SAFETY: the range is mapped and only read and written volatile.
    let done = unsafe { libc::madvise(start(block, &pages), pages.len() * PAGE, advice) };
    assert_eq!(done, 0, "{}", io::Error::last_os_error());
}

/// Pages that the page table has.
pub(crate) fn populated(block: &RamBlock) -> usize {
    let pagemap = File::open("/proc/self/pagemap").unwrap();
    let held = PageQuery { any: PageQuery::PRESENT | PageQuery::SWAPPED, ..PageQuery::default() };
    let from = start(block, &(0..block.pages())) as u64;
    let mut runs = [PageRun::default(); 64];
    let (filled, _) = held.scan(&pagemap, from..from + block.used_len(), &mut runs).unwrap();
    runs[..filled].iter().map(|run| (run.end - run.start) as usize / PAGE).sum()
}

pub(crate) fn free_huge_pages() -> usize {
    let text = std::fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages");
    text.map_or(0, |text| text.trim().parse().unwrap())
}
