//! The memory of a live process, looked at from outside while it runs.
//!
//! ```text
//!  /proc/PID/maps ──> mappings that may be RAM ──> blocks
//!  /proc/PID/pagemap, or the file behind a shared mapping ──> which pages are held
//!  /proc/PID/mem,     or that file                        ──> their content
//! ```
//!
//! **What is taken for RAM.** Mappings that can be read and written and not executed (an emulator's translated code is
//! executable), that are memory and no device's, and that have at least an eighth of the size of the largest of them: stacks,
//! heaps and firmware are far smaller than RAM. Each is one block. Neighbouring parts of one file count as one; memory without a
//! file may come with a neighbour that the kernel tells nobody apart from it.
//!
//! **What is held.** Pages that the process has touched, and that are in memory or in swap; a page that was only read, and is
//! the kernel's page of zeros, is not. A shared mapping's pages may have been made by others (vhost-user, a QEMU before this
//! one): they are asked for in the file behind it, where that can be opened, which takes CAP_CHECKPOINT_RESTORE, and in the page
//! table otherwise. Pages beyond the end of a file are nobody's. A page that is not held is never read: that would make one.
//! (Between the question and the reading, microseconds later, a process may give a page up: then it gets a page of zeros back.
//! A page in swap is brought back.)
//!
//! **No pause.** The process is never stopped: no ptrace, no signal, and no clear_refs or write-protection, which would tell
//! writes apart, but hold all page faults up for as long as they take to go through the page table. What is asked takes the
//! lock of its address space for at most a few microseconds at a time as a reader. See `pace.rs` for its cores.

mod held;
mod maps;
pub(in crate::tune) mod pace;
mod reading;
mod refusal;
mod rewrites;
#[cfg(test)]
mod tests;

use std::fs;

use super::{BATCH_PAGES, Batch, Extent, Memory, PAGE, Rewrites};
use crate::tune::Result;
use pace::Pace;
use reading::Content;
use refusal::Target;

/// A live process whose memory can be read.
#[derive(Debug)]
pub(super) struct Process {
    target: Target,
    content: Content,
    extent: Extent,
}

/// Finds the memory of a process, and which of its pages are held.
pub(super) fn open(pid: u32) -> Result<Process> {
    let host = rustix::param::page_size();
    if host != PAGE {
        return Err(format!("process {pid}: pages of this machine have {host} bytes, {PAGE} are expected"));
    }
    let target = Target::find(pid)?;
    let maps = fs::read(target.file("maps")).map_err(|error| target.refuses(&error))?;
    let mappings = maps::ram(&maps::parse(&String::from_utf8_lossy(&maps)));
    if mappings.is_empty() {
        return Err(format!(
            "{target}: no memory that could be a guest's RAM (a kernel thread, or it has ended)"
        ));
    }
    let content = Content::open(&target, &mappings).map_err(|error| target.refuses(&error))?;
    let extent = content.extent().map_err(|error| target.refuses(&error))?;
    if !content.alive() {
        return Err(target.ended());
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
        // What has ended holds no pages, which is no error to the kernel.
        if self.content.alive() {
            read.map_err(|error| self.target.refuses(&error))
        } else {
            Err(self.target.ended())
        }
    }

    fn rewrites(&mut self) -> Result<Option<Rewrites>> {
        let found = rewrites::watch(&self.content, &self.extent);
        if self.content.alive() {
            found.map(Some).map_err(|error| self.target.refuses(&error))
        } else {
            Err(self.target.ended())
        }
    }
}

/// Pages that are read between two looks at the clock, in some 60 us.
const PIECE: usize = 32;
