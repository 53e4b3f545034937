//! Guest memory as this process has it mapped. The only module that knows pointers to it.
//!
//! The guest writes while we read, so no `&[u8]` over this memory ever exists: bytes are copied through
//! [`VolatileSlice`], or the kernel moves them by iovec.
#![expect(
    unsafe_code,
    reason = "guest memory is shared with vCPUs and devices: it can only be touched by pointer"
)]

use std::any::Any;
use std::fs::File;
use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;
use std::sync::Arc;

use multifd_transports::{Channel, ZeroCopy};
use vm_memory::bitmap::Bitmap;
use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileSlice};

use super::{PAGE, file_io};

/// A mapped range of guest memory, kept alive for as long as this value or a clone of it lives.
#[derive(Clone)]
pub struct HostMemory {
    start: NonNull<u8>,
    len: usize,
    file: Option<FileOffset>,
    /// `file`, if stores to the memory and writes to the file are the same thing.
    shared_file: Option<FileOffset>,
    /// Of huge pages (hugetlbfs).
    huge: bool,
    // Owns the mapping; only its drop matters.
    _owner: Arc<dyn Any + Send + Sync>,
}

// SAFETY: the memory behind `start` is only reached through volatile copies or system calls, which any thread may make;
// `_owner` is Send + Sync and keeps the mapping in place.
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
        let huge =
            region.flags() & libc::MAP_HUGETLB != 0 || file.as_ref().is_some_and(|file| is_huge(file.file()));
        Ok(Self { start, len: region.size(), file, shared_file, huge, _owner: region })
    }

    /// Maps the first `len` bytes of `file`, shared, for reading and writing. The file must be that long.
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
        Self::from_region(Arc::new(region))
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

    /// The file behind the memory, if stores to the memory and writes to the file are the same thing.
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

    /// Copies out by plain loads; false if the range is not inside. It must be known that they do not fault: see
    /// [`PageTable`](super::PageTable).
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
            flags >= 0 && flags & libc::O_ACCMODE != libc::O_RDONLY && !self.huge
        })
    }

    /// True for huge pages (hugetlbfs), also without a file.
    pub(super) fn is_huge(&self) -> bool {
        self.huge
    }

    /// Which pages of the range are in memory.
    pub(super) fn resident(&self, offset: usize, pages: usize) -> io::Result<Vec<bool>> {
        let slice = self.slice(offset, pages * PAGE).ok_or(io::ErrorKind::InvalidInput)?;
        let mut resident = vec![0_u8; pages];
        let start = slice.ptr_guard_mut().as_ptr().cast();
        // SAFETY: the kernel fills a byte for each page of the range, which is mapped.
        match unsafe { libc::mincore(start, slice.len(), resident.as_mut_ptr()) } {
            0 => Ok(resident.into_iter().map(|page| page & 1 != 0).collect()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Writes guest memory the way that costs least and fails cleanly.
    ///
    /// Shared file memory is written through its file: no page fault, and a full file system is an error where a store to
    /// the mapping would kill the process by SIGBUS. Other memory is copied to, once its pages are there.
    pub(crate) fn store(&self, offset: usize, from: &[u8]) -> io::Result<()> {
        if let Some(file) = &self.shared_file {
            if offset.checked_add(from.len()).is_none_or(|end| end > self.len) {
                return Err(io::ErrorKind::InvalidInput.into());
            }
            match file.file().write_all_at(from, file.start() + offset as u64) {
                // hugetlbfs maps but does not write.
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
                result => return result,
            }
        }
        self.populate_to_write(offset, from.len())?;
        self.store_present(offset, from)
    }

    /// As [`store`](Self::store), but through the mapping: for a file that somebody else writes to, whom a write would wait for.
    pub(crate) fn store_mapped(&self, offset: usize, from: &[u8]) -> io::Result<()> {
        match self.populate_to_write(offset, from.len()) {
            Err(_) if self.shared_file.is_some() => self.store(offset, from),
            populated => populated.and_then(|()| self.store_present(offset, from)),
        }
    }

    /// Copies to pages that are there and were written to before.
    pub(crate) fn store_present(&self, offset: usize, from: &[u8]) -> io::Result<()> {
        let slice = self.slice(offset, from.len()).ok_or(io::ErrorKind::InvalidInput)?;
        slice.copy_from(from);
        Ok(())
    }

    /// Makes pages so that loads do not fault. EFAULT: they are not mapped for reading, or there is no room for them;
    /// EHWPOISON: the machine has lost them.
    pub(super) fn populate_to_read(&self, offset: usize, len: usize) -> io::Result<()> {
        self.populate(offset, len, libc::MADV_POPULATE_READ)
    }

    /// The same for stores.
    pub(super) fn populate_to_write(&self, offset: usize, len: usize) -> io::Result<()> {
        self.populate(offset, len, libc::MADV_POPULATE_WRITE)
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

/// Has the kernel read a byte of every page, or write it back: slower than to populate, and as safe.
fn probe(slice: &VolatileSlice<'_>, write: bool) -> io::Result<()> {
    let start = slice.ptr_guard_mut().as_ptr();
    for offset in (0..slice.len()).step_by(PAGE) {
        let mut byte = 0_u8;
        let local = libc::iovec { iov_base: (&raw mut byte).cast(), iov_len: 1 };
        let there = libc::iovec { iov_base: start.wrapping_add(offset).cast(), iov_len: 1 };
        // SAFETY: takes no pointer.
        let process = unsafe { libc::getpid() };
        // SAFETY: `local` is one byte of ours; what `there` points to is read by the kernel, a fault is an error.
        retry(|| unsafe { libc::process_vm_readv(process, &raw const local, 1, &raw const there, 1, 0) })?;
        if write {
            // SAFETY: as above; the byte is what it was. Only memory that nothing else writes yet is stored to.
            retry(|| unsafe {
                libc::process_vm_writev(process, &raw const local, 1, &raw const there, 1, 0)
            })?;
        }
    }
    Ok(())
}

/// HUGETLBFS_MAGIC of linux/magic.h.
const HUGETLBFS_MAGIC: libc::__fsword_t = 0x958458f6;

fn is_huge(file: &File) -> bool {
    // SAFETY: statfs is plain data, for which zeros are valid.
    let mut statfs: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: the descriptor is open; the call fills `statfs`.
    let done = unsafe { libc::fstatfs(file.as_raw_fd(), &raw mut statfs) };
    done == 0 && statfs.f_type == HUGETLBFS_MAGIC
}

impl std::fmt::Debug for HostMemory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HostMemory").field("len", &self.len).field("file", &self.file.is_some()).finish()
    }
}

/// A list of memory ranges, private and guest, that the kernel reads or fills in one call.
///
/// The list's buffer is kept in [`IoVecs`] between packets.
pub(crate) struct Ranges<'a> {
    list: &'a mut Vec<libc::iovec>,
    memory: PhantomData<&'a HostMemory>,
}

/// The reusable buffer of [`Ranges`].
#[derive(Default)]
pub(crate) struct IoVecs(Vec<libc::iovec>);

// SAFETY: the pointers in it are only used by the `Ranges` that wrote them, which clears the list first.
unsafe impl Send for IoVecs {}

/// Most ranges the kernel takes in one call (UIO_MAXIOV).
pub(super) const MAX_RANGES_PER_CALL: usize = 1024;

impl IoVecs {
    pub(crate) fn start<'a>(&'a mut self) -> Ranges<'a> {
        self.0.clear();
        Ranges { list: &mut self.0, memory: PhantomData }
    }
}

impl<'a> Ranges<'a> {
    /// Adds private bytes to be sent.
    pub(crate) fn private(&mut self, bytes: &'a [u8]) {
        self.list.push(libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() });
    }

    /// Adds guest memory, joined with the range before it if they touch.
    pub(crate) fn guest(&mut self, slice: &VolatileSlice<'a>) {
        let start = slice.ptr_guard_mut().as_ptr();
        match self.list.last_mut() {
            Some(last) if last.iov_base.wrapping_byte_add(last.iov_len) == start.cast() => {
                last.iov_len += slice.len();
            }
            _ => self.list.push(libc::iovec { iov_base: start.cast(), iov_len: slice.len() }),
        }
    }

    /// Sends all of it.
    pub(crate) fn send(self, channel: &Channel) -> io::Result<()> {
        if let Some(file) = channel.file() {
            return file_io::write_all(self.list, channel, file);
        }
        let Some(fd) = channel.direct() else { return self.send_copied(channel) };
        send_ranges(channel, self.list, |left| retry(|| send_once(fd, left, 0)))
    }

    /// Sends the bytes of `header`, then all of it without copying guest memory, which may change for as long as `account`
    /// has sends outstanding: what arrives then is newer than the page that was asked for, and the page is dirty again.
    /// Gives the calls that had to copy because the kernel had no room to keep track of more.
    pub(crate) fn send_zero_copy(
        self,
        header: &[u8],
        channel: &Channel,
        account: &mut ZeroCopy,
    ) -> io::Result<usize> {
        let Some(fd) = channel.direct() else { return Err(io::ErrorKind::Unsupported.into()) };
        // A header alone must not wait for pages that never come.
        let more = if self.list.is_empty() { 0 } else { libc::MSG_MORE };
        let mut start = [libc::iovec { iov_base: header.as_ptr().cast_mut().cast(), iov_len: header.len() }];
        send_ranges(channel, &mut start, |left| retry(|| send_once(fd, left, more)))?;
        let mut refused = 0;
        send_ranges(channel, self.list, |left| match retry(|| send_once(fd, left, libc::MSG_ZEROCOPY)) {
            Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {
                refused += 1;
                retry(|| send_once(fd, left, 0))
            }
            outcome => outcome.inspect(|_| account.note_send()),
        })?;
        Ok(refused)
    }

    /// A channel that is not a plain socket takes private bytes only.
    fn send_copied(self, channel: &Channel) -> io::Result<()> {
        let len = self.list.iter().map(|range| range.iov_len).sum();
        let mut left = &mut self.list[..];
        channel.send_filled(len, &mut |mut into| {
            while let (Some(range), false) = (left.first(), into.is_empty()) {
                let (now, later) = into.split_at_mut(range.iov_len.min(into.len()));
                // SAFETY: every range lies in memory borrowed for 'a, see `private` and `guest`.
                let slice = unsafe { VolatileSlice::new(range.iov_base.cast(), now.len()) };
                slice.copy_to(now);
                left = advance(std::mem::take(&mut left), now.len());
                into = later;
            }
        })
    }

    /// Fills all of it. `UnexpectedEof` says that the peer ended before that.
    pub(crate) fn receive(self, channel: &Channel) -> io::Result<()> {
        let Some(fd) = channel.direct() else { return self.receive_copied(channel) };
        let mut left = &mut self.list[..];
        while !left.is_empty() {
            let received = retry(|| receive_once(fd, left)).map_err(|error| channel.explain(error))?;
            if received == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            channel.note_direct_received(received as u64);
            left = advance(left, received);
        }
        Ok(())
    }

    fn receive_copied(self, channel: &Channel) -> io::Result<()> {
        let len = self.list.iter().map(|range| range.iov_len).sum();
        let mut left = &mut self.list[..];
        channel.recv_each(len, &mut |mut from| {
            while let (Some(range), false) = (left.first(), from.is_empty()) {
                let (now, later) = from.split_at(range.iov_len.min(from.len()));
                // SAFETY: as in `send_copied`; received ranges come from `guest` only, whose memory may be written.
                let slice = unsafe { VolatileSlice::new(range.iov_base.cast(), now.len()) };
                slice.copy_from(now);
                left = advance(std::mem::take(&mut left), now.len());
                from = later;
            }
        })
    }
}

/// Calls `send` until all of `left` is on its way.
fn send_ranges(
    channel: &Channel,
    mut left: &mut [libc::iovec],
    mut send: impl FnMut(&mut [libc::iovec]) -> io::Result<usize>,
) -> io::Result<()> {
    while !left.is_empty() {
        let sent = send(left).map_err(|error| channel.explain(error))?;
        channel.note_direct_sent(sent as u64);
        left = advance(left, sent);
    }
    Ok(())
}

fn message(ranges: &mut [libc::iovec]) -> libc::msghdr {
    // SAFETY: msghdr is plain data for which all zeros means "nothing".
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = ranges.as_mut_ptr();
    message.msg_iovlen = ranges.len().min(MAX_RANGES_PER_CALL);
    message
}

fn send_once(fd: BorrowedFd<'_>, ranges: &mut [libc::iovec], flags: i32) -> isize {
    let message = message(ranges);
    // SAFETY: `message` points to valid ranges; the kernel pins what it sends later (MSG_ZEROCOPY).
    // MSG_NOSIGNAL: a closed peer is an error, not a signal.
    unsafe { libc::sendmsg(fd.as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL | flags) }
}

fn receive_once(fd: BorrowedFd<'_>, ranges: &mut [libc::iovec]) -> isize {
    let mut message = message(ranges);
    // SAFETY: `message` points to valid, writable ranges. MSG_WAITALL: one call a packet instead of one a segment.
    unsafe { libc::recvmsg(fd.as_raw_fd(), &raw mut message, libc::MSG_WAITALL) }
}

pub(super) fn retry(mut call: impl FnMut() -> isize) -> io::Result<usize> {
    loop {
        if let Ok(count) = usize::try_from(call()) {
            return Ok(count);
        }
        let error = io::Error::last_os_error();
        match error.kind() {
            io::ErrorKind::Interrupted => {}
            _ => return Err(error),
        }
    }
}

/// Drops the first `count` bytes.
pub(super) fn advance(ranges: &mut [libc::iovec], mut count: usize) -> &mut [libc::iovec] {
    let done = ranges
        .iter()
        .take_while(|range| {
            let whole = count >= range.iov_len;
            count -= if whole { range.iov_len } else { 0 };
            whole
        })
        .count();
    let (_, left) = ranges.split_at_mut(done);
    if let Some(first) = left.first_mut() {
        first.iov_base = first.iov_base.wrapping_byte_add(count);
        first.iov_len -= count;
    }
    left
}
