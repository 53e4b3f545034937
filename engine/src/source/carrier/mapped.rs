//! Pages at fixed places of a file (`mapped-ram`): written by any number of workers, a page again
//! in the same place. Spec: docs/wire.md §17.

use std::fs::File;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use multifd_wire::MappedRamHeader;

use crate::error::{Error, Phase, Result};
use crate::guest::{Found, PAGE, PAGE_SIZE};
use crate::io::MainFile;
use crate::run::counters::{ChannelCounters, Counters};
use crate::run::workers::Crew;
use crate::source::main_writer::MainWriter;
use crate::source::outgoing::{OutgoingBlock, OutgoingRam, ZeroRoute};
use crate::source::rounds::{Rounds, Work};
use crate::source::shared::SourceShared;
use crate::stream::mapped_layout;
use crate::work::{Batch, PerBlock, Place, Round};

/// The file, and what is in it by now.
pub(super) struct MappedFile {
    file: MainFile,
    /// The same file for the pages: past the page cache, if that was asked for.
    pages: File,
    blocks: PerBlock<StoredBlock>,
}

struct StoredBlock {
    /// Known when the list of blocks is written.
    place: OnceLock<MappedRamHeader>,
    /// The bitmap: which pages are not zero.
    stored: Box<[AtomicU64]>,
}

impl MappedFile {
    pub(super) fn new(file: MainFile, ram: &OutgoingRam, direct: bool) -> Result<Self> {
        let pages = file.for_pages(direct).map_err(|error| {
            Error::storage(Phase::Setup, "opening the file for pages", error).on(file.name())
        })?;
        let blocks = ram.blocks.map(|outgoing| StoredBlock {
            place: OnceLock::new(),
            stored: (0..outgoing.block.pages().div_ceil(64)).map(|_| AtomicU64::new(0)).collect(),
        });
        Ok(Self { file, pages, blocks })
    }

    /// Writes the list of blocks, each with its place, and leaves the room for bitmap and pages
    /// behind it.
    pub(super) fn announce(&self, main: &mut MainWriter, ram: &OutgoingRam) -> Result<()> {
        main.ram_head(ram);
        for (entry, block) in ram.list().zip(self.blocks.iter()) {
            entry.encode(main.unsent());
            main.flush()?;
            let place = mapped_layout::place(self.file.position(), entry.used_len, PAGE_SIZE);
            place.encode(main.unsent());
            main.flush()?;
            self.file.seek(place.pages_offset + entry.used_len);
            block.place.get_or_init(|| place);
        }
        Ok(())
    }

    /// Writes the bitmaps, when no more page comes.
    pub(super) fn write_bitmaps(&self) -> Result<()> {
        for block in self.blocks.iter() {
            let place = block.place(Phase::Device)?;
            let bitmap: Vec<u8> =
                block.stored.iter().flat_map(|word| word.load(Ordering::Relaxed).to_le_bytes()).collect();
            self.file.write_all_at(&bitmap, place.bitmap_offset).map_err(|error| {
                Error::storage(Phase::Device, "writing a bitmap", error).on(self.file.name())
            })?;
        }
        Ok(())
    }

    /// Writes the pages of a round that no other worker has claimed.
    pub(super) fn write_round(
        &self,
        round: &Round,
        shared: &SourceShared,
        counters: &ChannelCounters,
    ) -> Result<()> {
        let (next, mut place) = (shared.next(round), Place::default());
        while let Some(batch) = next.claim(&mut place, shared.batch_pages()) {
            let written = self.write_batch(&batch, shared, counters);
            if written.is_err() {
                next.put_back(&mut place);
                return written.map_err(|error| error.on(self.file.name()));
            }
        }
        Ok(())
    }

    fn write_batch(
        &self,
        batch: &Batch<'_>,
        shared: &SourceShared,
        counters: &ChannelCounters,
    ) -> Result<()> {
        let (outgoing, block) = (&shared.ram.hold(batch.block), self.blocks.at(batch.block));
        let (mut run, mut zero) = (0..0, 0_usize);
        let mut found = Found::default();
        shared.ram.look(outgoing, batch.pages, &mut found)?;
        for (page, absent) in batch.pages.iter().zip(found.zeros()) {
            // A page that has no content in the file is zero, whatever was asked for: one that is
            // absent must not be read.
            let seek_zero = outgoing.zero_route != ZeroRoute::Content;
            let is_zero = absent || seek_zero && outgoing.block.is_zero(*page);
            block.note(*page, !is_zero)?;
            if is_zero {
                zero += 1;
            } else if run.end == *page && !run.is_empty() {
                run.end += 1;
            } else {
                self.write_run(std::mem::replace(&mut run, *page..page + 1), outgoing, block, shared)?;
            }
        }
        self.write_run(run, outgoing, block, shared)?;
        Counters::add(&counters.pages_zero, zero);
        Counters::add(&counters.pages_normal, batch.pages.len() - zero);
        Ok(())
    }

    /// Adjacent pages, in one call, straight from where the guest has them.
    fn write_run(
        &self,
        run: Range<usize>,
        outgoing: &OutgoingBlock,
        block: &StoredBlock,
        shared: &SourceShared,
    ) -> Result<()> {
        if run.is_empty() {
            return Ok(());
        }
        let place = block.place(Phase::Active)?;
        let (start, len) = (run.start * PAGE, run.len() * PAGE);
        shared.pace(len)?;
        let memory = outgoing.block.memory();
        memory.write_to(start..start + len, &self.pages, place.pages_offset + start as u64).map_err(
            |error| {
                if error.raw_os_error() == Some(libc::EFAULT) {
                    return outgoing.kernel_fault(run.clone(), error);
                }
                let what = format!("writing {} pages of RAM block {}", run.len(), outgoing.block.name());
                Error::storage(Phase::Active, what, error)
            },
        )?;
        self.file.count_written(len);
        Ok(())
    }

    /// Starts a thread that writes pages.
    pub(super) fn start_worker(
        self: &Arc<Self>,
        id: usize,
        rounds: &Rounds,
        shared: &Arc<SourceShared>,
        crew: &Crew,
    ) -> Result<()> {
        let (file, rounds, shared) = (Arc::clone(self), rounds.clone(), Arc::clone(shared));
        let counters = shared.session.counters.thread(id);
        crew.spawn(&format!("mig-send-{id}"), Phase::Active, move || {
            let mut last = 0;
            while let Work::Round { number, round, .. } = rounds.next(last)? {
                last = number;
                file.write_round(&round, &shared, &counters)?;
                rounds.done();
            }
            Ok(())
        })
    }
}

impl StoredBlock {
    fn place(&self, phase: Phase) -> Result<&MappedRamHeader> {
        self.place
            .get()
            .ok_or_else(|| Error::bug(phase, "a RAM block that was not announced has no place in the file"))
    }

    fn note(&self, page: usize, stored: bool) -> Result<()> {
        let word = self.stored.get(page / 64);
        let word = word.ok_or_else(|| {
            Error::bug(Phase::Active, format_args!("page {page} past the end of its block"))
        })?;
        let bit = 1 << (page % 64);
        // Relaxed: the end of the round orders them before they are written.
        if stored {
            word.fetch_or(bit, Ordering::Relaxed)
        } else {
            word.fetch_and(!bit, Ordering::Relaxed)
        };
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    #[test]
    fn a_page_without_a_place_in_the_file_is_a_bug_and_not_dropped() {
        let block = StoredBlock { place: OnceLock::new(), stored: Box::new([AtomicU64::new(0)]) };
        block.note(63, true).unwrap();
        assert_eq!(block.note(64, true).unwrap_err().kind(), ErrorKind::Bug);
        let error = block.place(Phase::Active).unwrap_err();
        assert_eq!((error.kind(), error.phase()), (ErrorKind::Bug, Phase::Active));
    }
}
