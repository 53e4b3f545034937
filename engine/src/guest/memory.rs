//! Guest memory as this process has it mapped. The only module that knows pointers to it.
//!
//! The guest writes while we read, so no `&[u8]` over this memory ever exists: bytes are copied
//! through [`VolatileSlice`], or the kernel moves them by iovec.
#![expect(
    unsafe_code,
    reason = "guest memory is shared with vCPUs and devices: it can only be touched by pointer"
)]

use std::any::Any;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;
use std::sync::Arc;

use vm_memory::bitmap::Bitmap;
use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileSlice};

use super::PAGE;
use crate::io::write_parts;
use crate::os::retry;

/// A mapped range of guest memory, kept alive for as long as this value or a clone of it lives.
#[derive(Clone)]
pub struct HostMemory {
    start: NonNull<u8>,
    len: usize,
    file: Option<FileOffset>,
    /// `file`, if stores to the memory and writes to the file are the same thing.
    shared_file: Option<FileOffset>,
    /// Bytes in a page of the kernel's: more than [`PAGE`] for huge pages (hugetlbfs).
    host_page: usize,
    // Owns the mapping; only its drop matters.
    _owner: Arc<dyn Any + Send + Sync>,
}

// SAFETY: the memory behind `start` is only reached through volatile copies or system calls, which
// any thread may make; `_owner` is Send + Sync and keeps the mapping in place.
unsafe impl Send for HostMemory {}
// SAFETY: as above; there is no unsynchronised state beside the guest's own bytes.
unsafe impl Sync for HostMemory {}

impl HostMemory {
    /// The memory of a vm-memory region.
    ///
    /// # Errors
    /// `Other` for a region that has no address, which vm-memory does not make.
    pub fn from_region<B: Bitmap + Send + Sync + 'static>(region: Arc<MmapRegion<B>>) -> io::Result<Self> {
        let start =
            NonNull::new(region.as_ptr()).ok_or_else(|| io::Error::other("region without an address"))?;
        let file = region.file_offset().cloned();
        let shared_file = file.clone().filter(|_| region.flags() & libc::MAP_SHARED != 0);
        let host_page = match file.as_ref().and_then(|file| huge_page_of(file.file())) {
            Some(size) => size,
            None if region.flags() & libc::MAP_HUGETLB != 0 => huge_page_of_flags(region.flags())?,
            None => PAGE,
        };
        Ok(Self { start, len: region.size(), file, shared_file, host_page, _owner: region })
    }

    /// Maps the first `len` bytes of `file`, shared, for reading and writing. The file must be that
    /// long.
    ///
    /// # Errors
    /// What mmap says; `InvalidInput` for a file shorter than `len`.
    pub fn map_file(file: File, len: usize) -> io::Result<Self> {
        Self::map(Some(FileOffset::new(file, 0)), len, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED)
    }

    /// Maps the first `len` bytes of `file` for reading only: a source that must not change.
    ///
    /// # Errors
    /// As [`HostMemory::map_file`].
    pub fn map_file_read_only(file: File, len: usize) -> io::Result<Self> {
        Self::map(Some(FileOffset::new(file, 0)), len, libc::PROT_READ, libc::MAP_SHARED)
    }

    /// Fresh private memory, all zero.
    ///
    /// # Errors
    /// What mmap says.
    pub fn anonymous(len: usize) -> io::Result<Self> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        Self::map(None, len, libc::PROT_READ | libc::PROT_WRITE, flags)
    }

    fn map(file: Option<FileOffset>, len: usize, prot: i32, flags: i32) -> io::Result<Self> {
        let mut builder = MmapRegionBuilder::<()>::new(len).with_mmap_prot(prot).with_mmap_flags(flags);
        if let Some(file) = file {
            builder = builder.with_file_offset(file);
        }
        let region = builder.build().map_err(|error| match error {
            MmapRegionError::Mmap(error) => error,
            other => io::Error::new(io::ErrorKind::InvalidInput, other),
        })?;
        let memory = Self::from_region(Arc::new(region))?;
        memory.keep_out_of_core_dumps()?;
        Ok(memory)
    }

    /// Has the kernel leave the memory out of core dumps of this process (`MADV_DONTDUMP`): a
    /// guest's RAM holds its keys. Memory that is mapped here is left out from the start.
    ///
    /// # Errors
    /// What madvise says.
    pub fn keep_out_of_core_dumps(&self) -> io::Result<()> {
        // SAFETY: [start, start + len) is mapped for as long as `self` is there, and the advice
        // changes nothing that can be read or written.
        let outcome = unsafe { libc::madvise(self.start.as_ptr().cast(), self.len, libc::MADV_DONTDUMP) };
        if outcome == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True for memory of no length.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The file behind the memory and where in it the memory starts, if there is one.
    pub fn file(&self) -> Option<&FileOffset> {
        self.file.as_ref()
    }

    /// The file behind the memory, if stores to the memory and writes to the file are the same
    /// thing.
    pub(crate) fn shared_file(&self) -> Option<&FileOffset> {
        self.shared_file.as_ref()
    }

    /// A checked window; `None` if any of it lies outside.
    pub fn slice(&self, offset: usize, len: usize) -> Option<VolatileSlice<'_>> {
        if offset.checked_add(len)? > self.len {
            return None;
        }
        // SAFETY: offset <= self.len, so the result is inside the mapping or one past its end.
        let start = unsafe { self.start.add(offset) };
        // SAFETY:
        // - [start, start + len) lies inside the mapping, checked above;
        // - `_owner` keeps the mapping alive for the lifetime of `self`, which the slice borrows;
        // - all other accesses in this process are volatile as well.
        Some(unsafe { VolatileSlice::new(start.as_ptr(), len) })
    }

    /// Where it starts in this process.
    pub(crate) fn address(&self) -> u64 {
        self.start.as_ptr() as u64
    }

    /// Copies out by plain loads; false if the range is not inside. It must be known that they do
    /// not fault: see [`PageTable`](super::PageTable).
    #[must_use]
    pub(super) fn load(&self, offset: usize, into: &mut [u8]) -> bool {
        let Some(slice) = self.slice(offset, into.len()) else { return false };
        slice.read_slice(into, 0).is_ok()
    }

    /// Copies out of any memory, faults of which are errors. Holes of a shared file stay holes.
    pub(crate) fn read(&self, offset: usize, into: &mut [u8]) -> io::Result<()> {
        if self.shared_file.is_some() {
            return self.read_file(offset, into);
        }
        self.populate_to_read(offset, into.len())?;
        if self.load(offset, into) { Ok(()) } else { Err(io::ErrorKind::InvalidInput.into()) }
    }

    /// Copies out of the file behind the memory.
    pub(super) fn read_file(&self, offset: usize, into: &mut [u8]) -> io::Result<()> {
        let file = self.file.as_ref().filter(|_| self.slice(offset, into.len()).is_some());
        let file = file.ok_or(io::ErrorKind::InvalidInput)?;
        file.file().read_exact_at(into, file.start() + offset as u64)
    }

    /// True if what the memory holds can be written through its file.
    pub(crate) fn file_is_writable(&self) -> bool {
        self.shared_file.as_ref().is_some_and(|file| {
            // SAFETY: the descriptor is open; the request takes no pointer.
            let flags = unsafe { libc::fcntl(file.file().as_raw_fd(), libc::F_GETFL) };
            flags >= 0 && flags & libc::O_ACCMODE != libc::O_RDONLY && !self.is_huge()
        })
    }

    /// True for huge pages (hugetlbfs), also without a file.
    pub(super) fn is_huge(&self) -> bool {
        self.host_page > PAGE
    }

    /// Bytes in a page of the kernel's: 4096, or more for huge pages (hugetlbfs). Transparent huge
    /// pages are 4096.
    pub fn host_page_size(&self) -> usize {
        self.host_page
    }

    /// Which pages of the range are in memory.
    pub(crate) fn resident(&self, offset: usize, pages: usize) -> io::Result<Vec<bool>> {
        let slice = self.slice(offset, pages * PAGE).ok_or(io::ErrorKind::InvalidInput)?;
        let mut resident = vec![0_u8; pages];
        let start = slice.ptr_guard_mut().as_ptr().cast();
        // SAFETY: the kernel fills a byte for each page of the range, which is mapped.
        match unsafe { libc::mincore(start, slice.len(), resident.as_mut_ptr()) } {
            0 => Ok(resident.into_iter().map(|page| page & 1 != 0).collect()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Writes `parts`, one behind the other, by the cheapest means that fails cleanly.
    ///
    /// Shared file memory is written through its file: no page fault, and a full file system is an
    /// error where a store to the mapping would kill the process by SIGBUS. Other memory is copied
    /// to, once its pages are there.
    pub(crate) fn store(&self, offset: usize, parts: &[&[u8]]) -> io::Result<()> {
        if let Some(file) = &self.shared_file {
            if offset.checked_add(total(parts)).is_none_or(|end| end > self.len) {
                return Err(io::ErrorKind::InvalidInput.into());
            }
            match write_parts(file.file(), parts, file.start() + offset as u64) {
                // hugetlbfs maps but does not write.
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
                result => return result,
            }
        }
        self.populate_to_write(offset, total(parts))?;
        self.store_present(offset, parts)
    }

    /// As [`store`](Self::store), but through the mapping: for a file that another thread writes
    /// to, which a write would wait for.
    pub(crate) fn store_mapped(&self, offset: usize, parts: &[&[u8]]) -> io::Result<()> {
        match self.populate_to_write(offset, total(parts)) {
            Err(_) if self.shared_file.is_some() => self.store(offset, parts),
            populated => populated.and_then(|()| self.store_present(offset, parts)),
        }
    }

    /// Copies to pages that are there and were written to before.
    pub(crate) fn store_present(&self, offset: usize, parts: &[&[u8]]) -> io::Result<()> {
        let mut at = offset;
        for part in parts {
            let slice = self.slice(at, part.len()).ok_or(io::ErrorKind::InvalidInput)?;
            slice.copy_from(part);
            at += part.len();
        }
        Ok(())
    }

    /// Makes pages so that loads do not fault. EFAULT: they are not mapped for reading, or there is
    /// no room for them; EHWPOISON: the machine has lost them.
    pub(super) fn populate_to_read(&self, offset: usize, len: usize) -> io::Result<()> {
        self.populate(offset, len, libc::MADV_POPULATE_READ)
    }

    /// The same for stores.
    pub(super) fn populate_to_write(&self, offset: usize, len: usize) -> io::Result<()> {
        self.populate(offset, len, libc::MADV_POPULATE_WRITE)
    }

    /// Makes pages missing, also in the file that the memory is shared with: what they held is
    /// gone.
    pub(crate) fn drop_pages(&self, offset: usize, len: usize) -> io::Result<()> {
        let slice = self.slice(offset, len).ok_or(io::ErrorKind::InvalidInput)?;
        let done = match &self.shared_file {
            Some(file) => {
                let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
                let too_far = |_| io::Error::from(io::ErrorKind::InvalidInput);
                let start = i64::try_from(file.start() + offset as u64).map_err(too_far)?;
                let len = i64::try_from(len).map_err(too_far)?;
                // SAFETY: the descriptor is open; the call takes no pointer.
                unsafe { libc::fallocate(file.file().as_raw_fd(), mode, start, len) }
            }
            None => {
                let start = slice.ptr_guard_mut().as_ptr().cast();
                // SAFETY: the range is mapped, see `slice`; that its content goes is what is asked
                // for.
                unsafe { libc::madvise(start, slice.len(), libc::MADV_DONTNEED) }
            }
        };
        if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// Whether the kernel may put huge pages in the place of its pages.
    pub(crate) fn allow_huge_pages(&self, allow: bool) -> io::Result<()> {
        let advice = if allow { libc::MADV_HUGEPAGE } else { libc::MADV_NOHUGEPAGE };
        let slice = self.slice(0, self.len).ok_or(io::ErrorKind::InvalidInput)?;
        // SAFETY: the range is mapped, see `slice`; its content stays as it is.
        if unsafe { libc::madvise(slice.ptr_guard_mut().as_ptr().cast(), slice.len(), advice) } == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        // A kernel without such pages.
        if error.raw_os_error() == Some(libc::EINVAL) { Ok(()) } else { Err(error) }
    }

    fn populate(&self, offset: usize, len: usize, advice: i32) -> io::Result<()> {
        // The kernel takes whole pages, and memory starts at one.
        let (first, last) = (offset / PAGE * PAGE, offset.saturating_add(len).next_multiple_of(PAGE));
        let slice = self.slice(first, last.min(self.len) - first).ok_or(io::ErrorKind::InvalidInput)?;
        let start = slice.ptr_guard_mut().as_ptr();
        loop {
            // SAFETY: the range is mapped, see `slice`; its content stays as it is.
            if unsafe { libc::madvise(start.cast(), slice.len(), advice) } == 0 {
                return Ok(());
            }
            let error = io::Error::last_os_error();
            match error.raw_os_error() {
                Some(libc::EINTR | libc::EAGAIN) => {}
                // Linux before 5.14.
                Some(libc::EINVAL) => return probe(&slice, advice == libc::MADV_POPULATE_WRITE),
                // Part of it is not mapped.
                Some(libc::ENOMEM) => return Err(io::Error::from_raw_os_error(libc::EFAULT)),
                _ => return Err(error),
            }
        }
    }
}

/// Has the kernel read a byte of every page, or write it back: slower than to populate, and as
/// safe.
fn probe(slice: &VolatileSlice<'_>, write: bool) -> io::Result<()> {
    let start = slice.ptr_guard_mut().as_ptr();
    for offset in (0..slice.len()).step_by(PAGE) {
        let mut byte = 0_u8;
        let local = libc::iovec { iov_base: (&raw mut byte).cast(), iov_len: 1 };
        let there = libc::iovec { iov_base: start.wrapping_add(offset).cast(), iov_len: 1 };
        // SAFETY: takes no pointer.
        let process = unsafe { libc::getpid() };
        // SAFETY: `local` is one byte of ours; what `there` points to is read by the kernel, a
        // fault is an error.
        retry(|| unsafe { libc::process_vm_readv(process, &raw const local, 1, &raw const there, 1, 0) })?;
        if write {
            // SAFETY: as above; the byte is what it was. Only memory that nothing else writes yet
            // is stored to.
            retry(|| unsafe {
                libc::process_vm_writev(process, &raw const local, 1, &raw const there, 1, 0)
            })?;
        }
    }
    Ok(())
}

fn total(parts: &[&[u8]]) -> usize {
    parts.iter().map(|part| part.len()).sum()
}

/// HUGETLBFS_MAGIC of linux/magic.h.
const HUGETLBFS_MAGIC: libc::__fsword_t = 0x958458f6;

fn huge_page_of(file: &File) -> Option<usize> {
    // SAFETY: statfs is plain data, for which zeros are valid.
    let mut statfs: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: the descriptor is open; the call fills `statfs`.
    let done = unsafe { libc::fstatfs(file.as_raw_fd(), &raw mut statfs) };
    let huge = done == 0 && statfs.f_type == HUGETLBFS_MAGIC;
    usize::try_from(statfs.f_bsize).ok().filter(|_| huge)
}

/// Bytes in a page of anonymous memory that was mapped with MAP_HUGETLB: in the flags, or the
/// system's default.
fn huge_page_of_flags(flags: i32) -> io::Result<usize> {
    let shift = (flags >> libc::MAP_HUGE_SHIFT) & libc::MAP_HUGE_MASK;
    if shift != 0 {
        return 1_usize.checked_shl(shift.unsigned_abs()).ok_or_else(|| io::ErrorKind::InvalidInput.into());
    }
    let meminfo = std::fs::read_to_string("/proc/meminfo")?;
    let line = meminfo.lines().find_map(|line| line.strip_prefix("Hugepagesize:"));
    let kib = line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse::<usize>().ok());
    kib.and_then(|kib| kib.checked_mul(1024))
        .ok_or_else(|| io::Error::other("/proc/meminfo does not say how large a huge page is"))
}

impl std::fmt::Debug for HostMemory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HostMemory").field("len", &self.len).field("file", &self.file.is_some()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_that_is_mapped_here_is_in_no_core_dump() {
        let memory = HostMemory::anonymous(1 << 20).unwrap();
        let start = memory.slice(0, 1).unwrap().ptr_guard().as_ptr().addr();
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let mapping = smaps.split_once(&format!("\n{start:x}-")).unwrap().1;
        let flags = mapping.lines().find_map(|line| line.strip_prefix("VmFlags:")).unwrap();
        assert!(flags.split_whitespace().any(|flag| flag == "dd"), "{flags}");
    }
}
