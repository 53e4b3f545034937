//! Writes that the kernel notes in this process's page tables.

use std::fs::File;
use std::io;
use std::sync::Arc;

use super::{Coverage, DirtyLog, DirtyLogError};
use crate::guest::{DirtyBitmap, PAGE, RamBlock};
use crate::os::pagemap::PageRun;
use crate::os::userfaultfd::{self, Features, Userfault};

/// Runs of written pages fetched by one system call: 96 KiB of buffer.
const RUNS: usize = 4096;

/// Memory protected by one system call while others wait to change the address space: 1 GiB, the
/// largest page there is.
const PROTECT_AT_ONCE: u64 = 1 << 30;

/// userfaultfd write-protection, the asynchronous kind: any memory of this process, whichever
/// thread writes.
///
/// ```text
///   start   all pages write-protected, also those that nothing has touched yet
///   write   the first one to a page: the kernel lifts its protection and goes on (about a microsecond, no thread waits)
///   sync    one walk over the page tables fetches the unprotected pages and protects them again (PAGEMAP_SCAN)
/// ```
///
/// Memory may be anonymous or a shared file (memfd), of 4 KiB or huge pages; a write to a huge page
/// reports all of it. Stores of this process's threads are noted, and what the kernel writes for
/// them: read(2), io_uring, KVM's vCPUs (slower than KVM's own log).
///
/// # What it does not see
/// * **Another mapping of the same file.** A process that maps the memory on its own (a vhost-user
///   back-end), or a second mapping here, has page tables of its own: it needs a log of its own. So
///   does what writes to the file by write(2).
/// * Memory given back: MADV_DONTNEED and punched holes change what is read, and are not writes.
///
/// # What it needs
/// Linux 6.7 and /proc. No privilege: where seccomp forbids the system call, access to
/// /dev/userfaultfd. A block that has a userfaultfd already (postcopy, a snapshot that is being
/// taken) cannot have a second.
#[derive(Debug)]
pub struct UserfaultLog {
    userfault: Userfault,
    pagemap: File,
    runs: Vec<PageRun>,
    tracked: Vec<Tracked>,
}

/// A block that is write-protected.
#[derive(Debug)]
struct Tracked {
    /// Keeps the memory mapped, so that nothing else is mapped at `start` while it is registered.
    block: RamBlock,
    start: u64,
    len: u64,
}

impl UserfaultLog {
    /// Asks the kernel for all that the log needs.
    ///
    /// # Errors
    /// Names what this kernel or this process lacks. A [`SoftwareLog`](super::SoftwareLog) works
    /// everywhere.
    pub fn new() -> Result<Self, DirtyLogError> {
        let userfault = open()?;
        if let Err(cause) = userfault.enable(Features::NEEDED) {
            return Err(lacking(cause));
        }
        let pagemap = File::open("/proc/self/pagemap")
            .map_err(|cause| DirtyLogError::new("opening /proc/self/pagemap").because(cause))?;
        // Nothing is mapped at the end of an empty range: this asks only if the request is known.
        userfaultfd::take_written(&pagemap, 0..0, &mut [PageRun::default()])
            .map_err(|cause| DirtyLogError::new("PAGEMAP_SCAN, which Linux 6.7 has").because(cause))?;
        Ok(Self { userfault, pagemap, runs: vec![PageRun::default(); RUNS], tracked: Vec::new() })
    }

    fn protect(&mut self, block: &RamBlock) -> Result<(), DirtyLogError> {
        let start = address(block)?;
        let tracked = Tracked { block: block.clone(), start, len: block.used_len() };
        let failed = |doing: &str, cause: io::Error| {
            let text =
                format!("{doing} RAM block {}: {} bytes at {start:#x}", block.name(), block.used_len());
            DirtyLogError::new(text).because(cause)
        };
        self.userfault.register(tracked.start, tracked.len).map_err(|cause| failed("registering", cause))?;
        let (mut at, end) = (tracked.start, tracked.start + tracked.len);
        self.tracked.push(tracked);
        while at < end {
            let len = PROTECT_AT_ONCE.min(end - at);
            self.userfault.protect(at, len).map_err(|cause| failed("write-protecting", cause))?;
            at += len;
        }
        Ok(())
    }
}

impl DirtyLog for UserfaultLog {
    fn name(&self) -> &str {
        "userfaultfd"
    }

    fn start(&mut self, ram: &[RamBlock]) -> Result<(), DirtyLogError> {
        ram.iter().try_for_each(|block| self.protect(block))
    }

    fn covers(&self, block: &RamBlock) -> Coverage {
        match self.tracked.iter().any(|tracked| tracked.block.name() == block.name()) {
            true => Coverage::Whole,
            false => Coverage::Nothing,
        }
    }

    fn sync(&mut self, bitmaps: &[Arc<DirtyBitmap>]) -> Result<(), DirtyLogError> {
        if self.tracked.len() != bitmaps.len() {
            let (watched, count) = (self.tracked.len(), bitmaps.len());
            return Err(DirtyLogError::new(format!(
                "{watched} RAM blocks are watched, {count} have bitmaps: the log is not started"
            )));
        }
        for (tracked, bitmap) in self.tracked.iter().zip(bitmaps) {
            tracked.sync(&self.pagemap, &mut self.runs, bitmap)?;
        }
        Ok(())
    }

    fn stop(&mut self) {
        for tracked in self.tracked.drain(..) {
            if let Err(error) = self.userfault.unregister(tracked.start, tracked.len) {
                // The memory stays protected, which costs a fault a page and blocks no thread;
                // closing the descriptor ends it.
                tracing::warn!(block = %tracked.block.name(), %error, "userfaultfd does not let go");
            }
        }
    }
}

impl Tracked {
    fn sync(&self, pagemap: &File, runs: &mut [PageRun], bitmap: &DirtyBitmap) -> Result<(), DirtyLogError> {
        let (mut at, end) = (self.start, self.start + self.len);
        while at < end {
            let (filled, walked) = userfaultfd::take_written(pagemap, at..end, runs)
                .and_then(|step| if step.1 > at { Ok(step) } else { Err(io::ErrorKind::WriteZero.into()) })
                .map_err(|cause| {
                    // What was fetched before the error is protected again and not reported: all of
                    // it counts as written.
                    bitmap.set_range(self.page_of(at), bitmap.pages());
                    let name = self.block.name();
                    DirtyLogError::new(format!("fetching the written pages of RAM block {name}"))
                        .because(cause)
                })?;
            for run in runs.iter().take(filled) {
                let first = self.page_of(run.start);
                bitmap.set_range(first, self.page_of(run.end) - first);
            }
            at = walked;
        }
        Ok(())
    }

    /// Whole pages before an address of the block.
    fn page_of(&self, address: u64) -> usize {
        usize::try_from(address.saturating_sub(self.start)).unwrap_or(usize::MAX) / PAGE
    }
}

/// Where the block is in this process.
fn address(block: &RamBlock) -> Result<u64, DirtyLogError> {
    let memory = block.memory();
    let slice = memory.slice(0, memory.len());
    slice
        .map(|slice| slice.ptr_guard().as_ptr() as u64)
        .ok_or_else(|| DirtyLogError::new(format!("RAM block {} has no memory", block.name())))
}

fn open() -> Result<Userfault, DirtyLogError> {
    Userfault::open().map_err(|cause| DirtyLogError::new("opening a userfaultfd").because(cause))
}

/// Says what of the needed features the kernel has not: asked for too much, it does not tell.
fn lacking(cause: io::Error) -> DirtyLogError {
    let has = open().and_then(|probe| {
        let nothing = Features(0);
        probe.enable(nothing).map_err(|cause| DirtyLogError::new("asking userfaultfd").because(cause))
    });
    match has {
        Ok(has) => {
            let missing = Features::NEEDED.missing_in(has).join(", ");
            DirtyLogError::new(format!("userfaultfd without {missing}, which Linux 6.7 has")).because(cause)
        }
        Err(error) => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_kernel_lacks_is_named() {
        let linux_6_1 = Features(0x1fff);
        let missing = Features::NEEDED.missing_in(linux_6_1);
        assert_eq!(missing, ["UFFD_FEATURE_WP_UNPOPULATED", "UFFD_FEATURE_WP_ASYNC"]);
        assert!(Features::NEEDED.missing_in(Features(0x1ffff)).is_empty());
    }
}
