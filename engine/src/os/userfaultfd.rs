//! The kernel's side of [`UserfaultLog`](crate::UserfaultLog), and in `missing` of a pager: a
//! descriptor and its requests.
//! Layouts are those of linux/userfaultfd.h; the `userfaultfd` crate does not know write-protection
//! without faults.
#![expect(unsafe_code, reason = "the requests have no safe wrapper")]

use std::fs::File;
use std::io;
use std::mem::size_of;
use std::ops;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use crate::os::ioctl::request;
use crate::os::pagemap::{PageQuery, PageRun};

#[cfg(feature = "vhost")]
mod foreign;
mod missing;

#[cfg(feature = "vhost")]
pub(crate) use foreign::ForeignPages;
pub(crate) use missing::{MemoryEvent, MissingPages, Wake};

const UFFD_API: u64 = 0xaa;
/// Faults of system calls and vCPUs are not delivered to us. None is with [`Features::WP_ASYNC`],
/// and with this flag a process needs no privilege.
const UFFD_USER_MODE_ONLY: i32 = 1;
const REGISTER_MODE_WP: u64 = 1 << 1;
const WRITEPROTECT_MODE_WP: u64 = 1;

const USERFAULTFD_IOC_NEW: libc::Ioctl = request(0, 0xaa, 0, 0);
const UFFDIO_API: libc::Ioctl = request(3, 0xaa, 0x3f, size_of::<Api>());
const UFFDIO_REGISTER: libc::Ioctl = request(3, 0xaa, 0, size_of::<Register>());
const UFFDIO_UNREGISTER: libc::Ioctl = request(2, 0xaa, 1, size_of::<Range>());
const UFFDIO_WRITEPROTECT: libc::Ioctl = request(3, 0xaa, 6, size_of::<WriteProtect>());

#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct Range {
    start: u64,
    len: u64,
}

#[repr(C)]
struct Register {
    range: Range,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct WriteProtect {
    range: Range,
    mode: u64,
}

const _: () = {
    assert!(size_of::<Api>() == 24 && size_of::<Range>() == 16);
    assert!(size_of::<Register>() == 32 && size_of::<WriteProtect>() == 24);
    assert!(UFFDIO_API == 0xc018_aa3f && UFFDIO_REGISTER == 0xc020_aa00 && UFFDIO_UNREGISTER == 0x8010_aa01);
    assert!(UFFDIO_WRITEPROTECT == 0xc018_aa06 && USERFAULTFD_IOC_NEW == 0xaa00);
};

/// A userfaultfd, for the memory of this process.
#[derive(Debug)]
pub(crate) struct Userfault(OwnedFd);

/// What a userfaultfd can do, by the kernel's bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Features(pub(crate) u64);

impl Features {
    const WP: u64 = 1;
    const EVENT_REMOVE: u64 = 1 << 3;
    const MISSING_HUGETLBFS: u64 = 1 << 4;
    const MISSING_SHMEM: u64 = 1 << 5;
    const THREAD_ID: u64 = 1 << 8;
    const WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
    const WP_UNPOPULATED: u64 = 1 << 13;
    const POISON: u64 = 1 << 14;
    const WP_ASYNC: u64 = 1 << 15;

    /// What the log is built on: the kernel notes a write to a protected page by itself (WP_ASYNC,
    /// Linux 6.7), on files and huge pages too, and on pages that nothing has touched.
    pub(crate) const NEEDED: Self =
        Self(Self::WP | Self::WP_HUGETLBFS_SHMEM | Self::WP_UNPOPULATED | Self::WP_ASYNC);

    /// What a pager is built on: missing pages of any memory, and being told of pages that are
    /// dropped (Linux 4.11), and of the thread that waits (4.14).
    pub(crate) const PAGER: Self =
        Self(Self::EVENT_REMOVE | Self::MISSING_HUGETLBFS | Self::MISSING_SHMEM | Self::THREAD_ID);

    /// The same, with UFFDIO_POISON (Linux 6.6) if `here` has it.
    fn with_poison_of(self, here: Self) -> Self {
        Self(self.0 | here.0 & Self::POISON)
    }

    fn has_poison(self) -> bool {
        self.0 & Self::POISON != 0
    }

    /// The names of what `self` has and `other` has not.
    pub(crate) fn missing_in(self, other: Self) -> Vec<&'static str> {
        [
            (Self::WP, "UFFD_FEATURE_PAGEFAULT_FLAG_WP"),
            (Self::WP_HUGETLBFS_SHMEM, "UFFD_FEATURE_WP_HUGETLBFS_SHMEM"),
            (Self::WP_UNPOPULATED, "UFFD_FEATURE_WP_UNPOPULATED"),
            (Self::WP_ASYNC, "UFFD_FEATURE_WP_ASYNC"),
            (Self::EVENT_REMOVE, "UFFD_FEATURE_EVENT_REMOVE"),
            (Self::MISSING_HUGETLBFS, "UFFD_FEATURE_MISSING_HUGETLBFS"),
            (Self::MISSING_SHMEM, "UFFD_FEATURE_MISSING_SHMEM"),
            (Self::THREAD_ID, "UFFD_FEATURE_THREAD_ID"),
        ]
        .into_iter()
        .filter_map(|(bit, name)| (self.0 & !other.0 & bit != 0).then_some(name))
        .collect()
    }
}

impl Userfault {
    /// By the system call, or by the device where a filter forbids the call.
    pub(crate) fn open() -> io::Result<Self> {
        Self::open_with(UFFD_USER_MODE_ONLY)
    }

    /// The same, for faults of system calls and vCPUs, too.
    fn open_for_kernel() -> io::Result<Self> {
        Self::open_with(0)
    }

    fn open_with(mode: i32) -> io::Result<Self> {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | mode;
        // SAFETY: takes no pointer.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
        let refused = match i32::try_from(fd) {
            // SAFETY: a new descriptor, owned here only.
            Ok(fd) if fd >= 0 => return Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) })),
            _ => io::Error::last_os_error(),
        };
        let Ok(device) = File::options().read(true).write(true).open("/dev/userfaultfd") else {
            return Err(refused);
        };
        // SAFETY: this request's argument is the flags, no pointer.
        let fd = unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, flags) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a new descriptor, owned here only.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Switches `wanted` on and returns what the kernel has. `InvalidInput`: it does not have all
    /// of `wanted`. Once a descriptor.
    pub(crate) fn enable(&self, wanted: Features) -> io::Result<Features> {
        let mut api = Api { api: UFFD_API, features: wanted.0, ioctls: 0 };
        // SAFETY: the request reads and writes an Api.
        unsafe { ask(&self.0, UFFDIO_API, &raw mut api) }?;
        Ok(Features(api.features))
    }

    /// Lets pages of `len` bytes from `start` be write-protected.
    pub(crate) fn register(&self, start: u64, len: u64) -> io::Result<()> {
        let mut register = Register { range: Range { start, len }, mode: REGISTER_MODE_WP, ioctls: 0 };
        // SAFETY: the request reads and writes a Register. It does not change what the memory
        // holds, and with WP_ASYNC no thread that writes to it is blocked.
        unsafe { ask(&self.0, UFFDIO_REGISTER, &raw mut register) }.map(drop)
    }

    /// Takes `register` back, with all protection.
    pub(crate) fn unregister(&self, start: u64, len: u64) -> io::Result<()> {
        let mut range = Range { start, len };
        // SAFETY: the request reads a Range.
        unsafe { ask(&self.0, UFFDIO_UNREGISTER, &raw mut range) }.map(drop)
    }

    /// Write-protects registered pages, also those that are not there yet.
    pub(crate) fn protect(&self, start: u64, len: u64) -> io::Result<()> {
        let mut protect = WriteProtect { range: Range { start, len }, mode: WRITEPROTECT_MODE_WP };
        // SAFETY: the request reads a WriteProtect; as in `register`, no thread is blocked.
        unsafe { ask(&self.0, UFFDIO_WRITEPROTECT, &raw mut protect) }.map(drop)
    }
}

/// Finds the pages of `within` that were written and protects them again, each page in one step.
/// Returns how many of `runs` are filled, and the address up to which pages were looked at. After
/// an error, pages may have been protected that no run tells of.
pub(crate) fn take_written(
    pagemap: &File,
    within: ops::Range<u64>,
    runs: &mut [PageRun],
) -> io::Result<(usize, u64)> {
    // Asked for this category and no other, the kernel counts a page that has lost its mapping as
    // written, as it must: reclaim takes the mapping of a written file page away, and the mark with
    // it.
    let written = PageQuery { all: PageQuery::WRITTEN, told: PageQuery::WRITTEN, ..PageQuery::default() };
    written.scan_and_protect(pagemap, within, runs)
}

/// # Safety
/// `number` must be a request that reads or writes a `T`, and nothing beyond what `argument`
/// describes.
unsafe fn ask<T>(fd: &impl AsRawFd, number: libc::Ioctl, argument: *mut T) -> io::Result<usize> {
    // SAFETY: the descriptor is open; the rest by the caller.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), number, argument) };
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}
