//! Userfaultfds that fill guest memory on demand: under one, what is not there is not zero but has
//! not been fetched yet.

use std::fs::File;
use std::sync::atomic::{AtomicBool, Ordering};

use super::outgoing::OutgoingBlock;
use crate::error::{Error, ErrorKind, Phase, Result};
use crate::guest::{Absent, Mappings, RamBlock};

/// The look for userfaultfds when the migration begins, and again behind each pass in which holes
/// were taken for zero that had not been there at the beginning.
///
/// The kernel tells them in /proc/self/smaps only, and walks the page tables for it: 15 ms a GiB in
/// pages of 4 KiB, next to nothing in huge ones. So it is not read behind a pass without such a
/// hole. Holes of a block whose VMM tells what it gives back (`RamChanges`) count in the first pass
/// only, since those of later ones are what it told.
#[derive(Debug)]
pub(super) struct PagerWatch {
    /// Open since the beginning: a jail without /proc may follow. `None`: userfaultfds cannot be
    /// seen.
    smaps: Option<File>,
    /// Holes were taken for zero since the last look.
    holes_taken: AtomicBool,
}

impl PagerWatch {
    pub(super) fn begin() -> Self {
        let smaps = File::open("/proc/self/smaps")
            .inspect_err(|error| tracing::warn!(%error, "userfaultfds of guest memory cannot be seen"))
            .ok();
        Self { smaps, holes_taken: AtomicBool::default() }
    }

    /// How memory is mapped now. `None`: it cannot be told.
    pub(super) fn mappings(&self) -> Result<Option<Mappings>> {
        let read = self.smaps.as_ref().map(Mappings::with_pagers).transpose();
        read.map_err(|error| {
            let detail = "reading which userfaultfds guest memory has";
            Error::new(ErrorKind::GuestMemory, Phase::Setup, detail).because(error)
        })
    }

    /// Pages that are not there any more go as zero.
    pub(super) fn note_holes(&self) {
        // A load where it is set already: all workers come by here.
        if !self.holes_taken.load(Ordering::Relaxed) {
            self.holes_taken.store(true, Ordering::Relaxed);
        }
    }

    /// Behind a pass, before the guest is handed over.
    ///
    /// # Errors
    /// A userfaultfd was registered meanwhile: what went as zero may not be zero.
    pub(super) fn check<'b>(&self, blocks: impl IntoIterator<Item = &'b OutgoingBlock>) -> Result<()> {
        // The end of the round orders it.
        if !self.holes_taken.swap(false, Ordering::Relaxed) {
            return Ok(());
        }
        let Some(mappings) = self.mappings()? else { return Ok(()) };
        // What is not there is read in other blocks, which asks the handler.
        let with_holes = blocks.into_iter().filter(|outgoing| outgoing.absent != Absent::Unknown);
        with_holes
            .map(|outgoing| &outgoing.block)
            .try_for_each(|block| refuse(&mappings, block, Phase::Active))
    }
}

/// An error if pages of the block are filled on demand.
pub(super) fn refuse(mappings: &Mappings, block: &RamBlock, phase: Phase) -> Result<()> {
    let Some(pages) = mappings.paged(block) else { return Ok(()) };
    let detail = format!(
        "pages {}..{} of RAM block {} are filled on demand through a userfaultfd; wait until all of them are there and \
         unregister it before the guest moves, or have them read through its handler (SourceBuilder::paged_block)",
        pages.start,
        pages.end,
        block.name()
    );
    Err(Error::new(ErrorKind::GuestMemory, phase, detail))
}
