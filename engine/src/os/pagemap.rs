//! Which pages of a process are in memory, or were written: the request PAGEMAP_SCAN on
//! /proc/PID/pagemap (Linux 6.7).

use std::fs::File;
use std::io;
use std::mem::size_of;
use std::ops::Range;
use std::os::fd::AsRawFd;

/// What is asked of each page, in bits of linux/fs.h.
#[derive(Clone, Copy, Debug, Default)]
pub struct PageQuery {
    /// Bits that must be set; those of `inverted` must not be.
    pub all: u64,
    /// Bits of which one must be set; 0: none has to be.
    pub any: u64,
    /// Bits whose meaning is inverted in every mask.
    pub inverted: u64,
    /// Bits that end a run of pages where they change.
    pub told: u64,
}

/// Neighbouring pages that matched.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
#[non_exhaustive]
pub struct PageRun {
    /// Address of the first, in the process.
    pub start: u64,
    /// Address behind the last.
    pub end: u64,
    categories: u64,
}

impl PageRun {
    /// True if its pages are in memory; asked for by [`PageQuery::told`].
    pub(crate) fn is_present(&self) -> bool {
        self.categories & PageQuery::PRESENT != 0
    }
}

impl PageQuery {
    /// PAGE_IS_WRITTEN: written since a userfaultfd protected it.
    pub const WRITTEN: u64 = 1 << 1;
    /// PAGE_IS_PRESENT
    pub const PRESENT: u64 = 1 << 3;
    /// PAGE_IS_SWAPPED
    pub const SWAPPED: u64 = 1 << 4;
    /// PAGE_IS_PFNZERO: the kernel's page of zeros.
    pub const ZERO: u64 = 1 << 5;

    /// Fills `runs` with what matches `within`. Returns how many are filled, and the address up to
    /// which pages were looked at.
    ///
    /// # Errors
    /// The kernel's: `ENOTTY` before Linux 6.7, otherwise its error for the addresses.
    pub fn scan(self, pagemap: &File, within: Range<u64>, runs: &mut [PageRun]) -> io::Result<(usize, u64)> {
        self.ask(0, pagemap, within, runs)
    }

    /// The same, and protects what matches in one step with the look; fails on pages that no
    /// userfaultfd watches without faults.
    pub(crate) fn scan_and_protect(
        self,
        pagemap: &File,
        within: Range<u64>,
        runs: &mut [PageRun],
    ) -> io::Result<(usize, u64)> {
        self.ask(PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC, pagemap, within, runs)
    }

    #[expect(unsafe_code, reason = "the request has no safe wrapper")]
    fn ask(
        self,
        flags: u64,
        pagemap: &File,
        within: Range<u64>,
        runs: &mut [PageRun],
    ) -> io::Result<(usize, u64)> {
        let mut argument = ScanArgument {
            size: size_of::<ScanArgument>() as u64,
            flags,
            start: within.start,
            end: within.end,
            walk_end: 0,
            runs: runs.as_mut_ptr() as u64,
            runs_len: runs.len() as u64,
            max_pages: 0,
            inverted: self.inverted,
            all: self.all,
            any: self.any,
            told: self.told,
        };
        // SAFETY:
        // * the descriptor is open;
        // * the request reads and writes a ScanArgument, of the size given;
        // * it writes at most `runs_len` runs to `runs`, which is borrowed for as long;
        // * the content and permissions of memory do not change: protection only makes the kernel
        //   note writes.
        let filled = unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN, &raw mut argument) };
        let filled = usize::try_from(filled).map_err(|_| io::Error::last_os_error())?;
        Ok((filled, argument.walk_end))
    }
}

const PM_SCAN_WP_MATCHING: u64 = 1;
const PM_SCAN_CHECK_WPASYNC: u64 = 1 << 1;

/// `_IOWR('f', 16, struct pm_scan_arg)`
const PAGEMAP_SCAN: libc::Ioctl = 0xc060_6610;

/// struct pm_scan_arg of linux/fs.h.
#[repr(C)]
struct ScanArgument {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    runs: u64,
    runs_len: u64,
    max_pages: u64,
    inverted: u64,
    all: u64,
    any: u64,
    told: u64,
}

// The size is part of the request's number.
const _: () = assert!(size_of::<ScanArgument>() == 0x60 && size_of::<PageRun>() == 24);
