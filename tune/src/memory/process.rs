//! The memory of a live process, read from outside while it runs.
//!
//! ```text
//!  /proc/PID/maps ──> mappings that may be RAM ──> blocks
//!  /proc/PID/pagemap, or the file behind a shared mapping ──> which pages are held
//!  /proc/PID/mem,     or that file                        ──> their content
//! ```
//!
//! **RAM.** Mappings that are readable, writable and not executable (an emulator's translated code
//! is executable), that are memory and not a device's, and that have at least an eighth of the size
//! of the largest of them: stacks, heaps and firmware are far smaller than RAM. Each is one block.
//! Neighbouring parts of one file count as one; anonymous memory may include a neighbour that the
//! kernel does not tell apart.
//!
//! **Held pages.** Pages that the process has touched and that are in memory or in swap. A page
//! that was only read, and is the kernel's page of zeros, is not held. Pages of a shared mapping
//! may have been written by others (vhost-user, a QEMU before this one): they are looked up in the
//! file behind the mapping, where that can be opened, which takes CAP_CHECKPOINT_RESTORE, and in
//! the page table otherwise. Pages beyond the end of a file are not held. A page that is not held
//! is never read: reading would allocate it. (A process may free a page in the microseconds between
//! the lookup and the read: then it gets a page of zeros back. A page in swap is brought back.)
//!
//! **No pause.** The process is never stopped: no ptrace, no signal, and no clear_refs or
//! write-protection, which would tell writes apart, but would block all page faults while they walk
//! the page table. Each request holds the lock of its address space as a reader for at most a few
//! microseconds. See `pace.rs` for the use of its cores.

mod held;
mod maps;
pub(crate) mod pace;
mod reading;
pub(crate) mod refusal;
mod rewrites;
#[cfg(test)]
mod tests;

use std::fs;

use super::{BATCH_PAGES, Batch, Extent, Memory, PAGE, Rewrites};
use crate::Result;
use pace::Pace;
use reading::Content;
use refusal::{ProcessError, Target};

/// A live process whose memory can be read.
#[derive(Debug)]
pub(super) struct Process {
    target: Target,
    content: Content,
    extent: Extent,
}

/// Finds the memory of a process, and its held pages.
pub(super) fn open(pid: u32) -> Result<Process> {
    let host = rustix::param::page_size();
    if host != PAGE {
        return Err(ProcessError::PageSize { pid, found: host }.into());
    }
    let target = Target::find(pid)?;
    let maps = fs::read(target.file("maps")).map_err(|error| target.refuses(error))?;
    let mappings = maps::ram(&maps::parse(&String::from_utf8_lossy(&maps)));
    if mappings.is_empty() {
        return Err(ProcessError::NoRam { process: target.to_string() }.into());
    }
    let content = Content::open(&target, &mappings).map_err(|error| target.refuses(error))?;
    let extent = content.extent().map_err(|error| target.refuses(error))?;
    if !content.alive() {
        return Err(target.ended().into());
    }
    Ok(Process { target, content, extent })
}

impl Memory for Process {
    fn name(&self) -> String {
        self.target.to_string()
    }

    fn extent(&self) -> &Extent {
        &self.extent
    }

    fn read(&mut self, wanted: &[Batch], progress: &dyn Fn(u64)) -> Result<Vec<Vec<u8>>> {
        let mut pace = Pace::start();
        let mut done = 0;
        let read = |batch: &Batch| {
            let first = batch.number * BATCH_PAGES;
            let mut pages = Vec::new();
            let held = self.content.held(batch.block, first..first + BATCH_PAGES)?;
            for run in held.runs() {
                for start in run.clone().step_by(PIECE) {
                    let end = run.end.min(start + PIECE as u64);
                    self.content.read(batch.block, first + start..first + end, &mut pages)?;
                    pace.rest();
                }
            }
            done += pages.len() as u64;
            progress(done);
            Ok(pages)
        };
        let read: std::io::Result<_> = wanted.iter().map(read).collect();
        self.checked(read)
    }

    fn rewrites(&mut self) -> Result<Option<Rewrites>> {
        self.checked(rewrites::watch(&self.content, &self.extent)).map(Some)
    }
}

impl Process {
    /// The result, if the process still runs: to the kernel it is no error that an ended one holds
    /// no pages.
    fn checked<T>(&self, result: std::io::Result<T>) -> Result<T> {
        if !self.content.alive() {
            return Err(self.target.ended().into());
        }
        Ok(result.map_err(|error| self.target.refuses(error))?)
    }
}

/// Pages read between two calls of [`Pace::rest`]: some 60 us.
const PIECE: usize = 32;
