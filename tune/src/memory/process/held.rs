//! The held pages of a process, from /proc/PID/pagemap, without touching them.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use multifd_engine::unstable::{PageQuery, PageRun};

use super::super::PAGE;

/// The page table of a process, as /proc/PID/pagemap shows it.
#[derive(Debug)]
pub(super) struct PageTable {
    file: File,
    /// The kernel is older than Linux 6.7 and does not have PAGEMAP_SCAN.
    plain: AtomicBool,
}

impl PageTable {
    pub(super) fn new(file: File) -> Self {
        Self { file, plain: AtomicBool::new(false) }
    }

    /// Behaves as on an older kernel.
    #[cfg(test)]
    pub(super) fn forget_requests(&self) {
        self.plain.store(true, Relaxed);
    }

    /// Calls `found` with runs of held pages, in order. `within` are at most [`STEP`] bytes of
    /// addresses.
    pub(super) fn held(&self, within: Range<u64>, mut found: impl FnMut(Range<u64>)) -> io::Result<()> {
        if !self.plain.load(Relaxed) {
            match self.scan(within.clone(), &mut found) {
                // ENOTTY: no such request. EINVAL: a request of that number with other arguments.
                Err(error) if matches!(error.raw_os_error(), Some(libc::ENOTTY | libc::EINVAL)) => {
                    self.plain.store(true, Relaxed);
                }
                done => return done,
            }
        }
        self.read_entries(within, found)
    }

    fn scan(&self, within: Range<u64>, found: &mut impl FnMut(Range<u64>)) -> io::Result<()> {
        let mut runs = [PageRun::default(); 64];
        let mut start = within.start;
        while start < within.end {
            let (filled, walked) = HELD.scan(&self.file, start..within.end, &mut runs)?;
            runs.iter().take(filled).for_each(|run| found(run.start..run.end));
            if walked <= start {
                break;
            }
            start = walked;
        }
        Ok(())
    }

    /// Reads an entry of 64 bits per page: Documentation/admin-guide/mm/pagemap.rst. Entries do not
    /// tell the kernel's page of zeros apart.
    fn read_entries(&self, within: Range<u64>, mut found: impl FnMut(Range<u64>)) -> io::Result<()> {
        const PRESENT_OR_SWAPPED: u64 = 1 << 63 | 1 << 62;
        const ENTRY: usize = size_of::<u64>();
        let first = within.start / PAGE as u64;
        let count = usize::try_from(within.end / PAGE as u64 - first).unwrap_or(0);
        let mut bytes = vec![0; count * ENTRY];
        // A process that has ended has no entries.
        let read = self.file.read_at(&mut bytes, first * ENTRY as u64)?;
        let (entries, _) = bytes.get(..read).unwrap_or_default().as_chunks::<ENTRY>();
        let mut address = within.start;
        for entry in entries {
            if u64::from_ne_bytes(*entry) & PRESENT_OR_SWAPPED != 0 {
                found(address..address + PAGE as u64);
            }
            address += PAGE as u64;
        }
        Ok(())
    }
}

/// Pages in memory or in swap, without the kernel's page of zeros.
const HELD: PageQuery = PageQuery {
    all: PageQuery::ZERO,
    any: PageQuery::PRESENT | PageQuery::SWAPPED,
    inverted: PageQuery::ZERO,
    told: PageQuery::ZERO,
};

/// Bytes of addresses per request: 16 MiB. The kernel walks them with the lock of the address space
/// held, in some 20 us.
pub(super) const STEP: u64 = 16 << 20;

/// The held pages of a batch: bit n is its page n.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Mask(u128);

impl Mask {
    pub(super) fn insert(&mut self, pages: Range<u64>) {
        for page in pages.start..pages.end.min(u128::BITS.into()) {
            self.0 |= 1 << page;
        }
    }

    pub(super) fn count(self) -> u64 {
        self.0.count_ones().into()
    }

    /// Runs of neighbouring pages, in order.
    pub(super) fn runs(self) -> impl Iterator<Item = Range<u64>> {
        let mut next = 0;
        std::iter::from_fn(move || {
            let left = self.0.checked_shr(next).filter(|left| *left != 0)?;
            let start = next + left.trailing_zeros();
            next = start + (self.0 >> start).trailing_ones();
            Some(start.into()..next.into())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_of_a_mask_are_those_that_went_in() {
        let apart: [&[Range<u64>]; 3] = [&[], &[0..1, 127..128], &[1..5, 6..7, 64..66, 120..128]];
        let whole = std::slice::from_ref(&(0..128));
        for runs in apart.into_iter().chain([whole]) {
            let mut mask = Mask::default();
            runs.iter().for_each(|run| mask.insert(run.clone()));
            assert_eq!(mask.runs().collect::<Vec<_>>(), runs);
            assert_eq!(mask.count(), runs.iter().map(|run| run.end - run.start).sum::<u64>());
        }
    }
}
