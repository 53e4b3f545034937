//! Guest memory of every kind, and ways to write to it.
#![expect(unsafe_code, reason = "memory of special kinds, and writes by the kernel, have no safe wrapper")]

use std::fs::File;
use std::io;
use std::os::fd::FromRawFd;
use std::sync::Arc;

use multifd_engine::vm_memory::mmap::MmapRegionBuilder;
use multifd_engine::vm_memory::{Bytes, VolatileSlice};
use multifd_engine::{DirtyBitmap, HostMemory, PAGE, RamBlock};

pub(crate) const HUGE_PAGE: usize = 2 << 20;

pub(crate) fn block(name: &str, memory: HostMemory) -> RamBlock {
    RamBlock::new(name.try_into().unwrap(), memory)
}

pub(crate) fn anonymous(pages: usize) -> HostMemory {
    HostMemory::anonymous(pages * PAGE).unwrap()
}

pub(crate) fn memfd(len: usize, flags: libc::c_uint) -> io::Result<HostMemory> {
    // SAFETY: the name is a C string.
    let fd = unsafe { libc::memfd_create(c"guest".as_ptr(), flags | libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a new descriptor with no other owner.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(len as u64)?;
    HostMemory::map_file(file, len)
}

/// Private huge pages.
pub(crate) fn anonymous_huge(len: usize) -> io::Result<HostMemory> {
    let region = MmapRegionBuilder::<()>::new(len)
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB)
        .build()
        .map_err(io::Error::other)?;
    HostMemory::from_region(Arc::new(region))
}

/// Maps other memory in the place of a part, as a VMM does that unplugs memory and plugs some
/// again.
pub(crate) fn map_anew(memory: &HostMemory, offset: usize, len: usize) {
    let slice = memory.slice(offset, len).unwrap();
    let (access, flags) =
        (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED);
    let at = slice.ptr_guard_mut().as_ptr();
    // SAFETY: the range lies in memory that these tests only read and write volatile.
    let mapped = unsafe { libc::mmap(at.cast(), len, access, flags, -1, 0) };
    assert_eq!(mapped.cast(), at, "mmap: {}", io::Error::last_os_error());
}

pub(crate) fn advise(memory: &HostMemory, offset: usize, len: usize, advice: i32) {
    let slice = memory.slice(offset, len).unwrap();
    // SAFETY: the range lies in memory that is mapped, and that these tests only read and write
    // volatile.
    let done = unsafe { libc::madvise(slice.ptr_guard_mut().as_ptr().cast(), len, advice) };
    assert_eq!(done, 0, "madvise: {}", io::Error::last_os_error());
}

/// A store by this thread.
pub(crate) fn store(ram: &[RamBlock], block: usize, offset: usize, bytes: &[u8]) {
    slice(ram, block, offset, bytes.len()).write_slice(bytes, 0).unwrap();
}

/// A write by the kernel, as a socket's or a disk's read into guest memory.
pub(crate) fn read_into(ram: &[RamBlock], block: usize, offset: usize, pipe: (&File, &File), bytes: &[u8]) {
    io::Write::write_all(&mut { pipe.1 }, bytes).unwrap();
    let slice = slice(ram, block, offset, bytes.len());
    let into = slice.ptr_guard_mut();
    let fd = std::os::fd::AsRawFd::as_raw_fd(pipe.0);
    // SAFETY: the range lies in mapped memory.
    let read = unsafe { libc::read(fd, into.as_ptr().cast(), into.len()) };
    assert_eq!(usize::try_from(read), Ok(bytes.len()), "{}", io::Error::last_os_error());
}

pub(crate) fn pipe() -> (File, File) {
    let (read, write) = io::pipe().unwrap();
    (std::os::fd::OwnedFd::from(read).into(), std::os::fd::OwnedFd::from(write).into())
}

fn slice(ram: &[RamBlock], block: usize, offset: usize, len: usize) -> VolatileSlice<'_> {
    ram[block].memory().slice(offset, len).unwrap()
}

pub(crate) fn bitmaps(ram: &[RamBlock]) -> Vec<Arc<DirtyBitmap>> {
    ram.iter().map(|block| Arc::new(DirtyBitmap::new(block.pages()))).collect()
}

/// The set pages, and clears them.
pub(crate) fn pages(bitmap: &mut Arc<DirtyBitmap>) -> Vec<usize> {
    let set = (0..bitmap.pages()).filter(|page| bitmap.test(*page)).collect();
    *bitmap = Arc::new(DirtyBitmap::new(bitmap.pages()));
    set
}
