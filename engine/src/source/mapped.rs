//! Pages at fixed places of a file (`mapped-ram`): written by any number of workers, a page again in the same place. Spec:
//! docs/wire.md §17.

use std::fs::File;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use multifd_transports::Channel;
use multifd_wire::MappedRamHeader;

use super::main_stream::MainStream;
use super::outgoing::{OutgoingBlock, OutgoingRam};
use super::rounds::Work;
use super::shared::Shared;
use crate::error::{Error, ErrorKind, Phase, Result};
use crate::mapped::{self, file};
use crate::ram::{Batch, Claim, PAGE, PAGE_SIZE, Round};
use crate::session::Counters;
use crate::workers::Crew;

/// The file, and what is in it by now.
pub(super) struct MappedFile {
    channel: Arc<Channel>,
    /// The same file for the pages: past the page cache, if that was asked for.
    pages: File,
    blocks: Vec<StoredBlock>,
}

struct StoredBlock {
    /// Known when the list of blocks is written.
    place: OnceLock<MappedRamHeader>,
    /// The bitmap: which pages are not zero. Each word is one worker's at a time: the round's chunks are whole words.
    stored: Box<[AtomicU64]>,
}

impl MappedFile {
    /// `channel` is a file's. `direct`: past the page cache.
    pub(super) fn new(channel: &Arc<Channel>, ram: &OutgoingRam, direct: bool) -> Result<Self> {
        let failed =
            |error| Error::storage(Phase::Setup, "opening the file for pages", error).on(name(channel));
        let pages = file(channel).and_then(|file| file.for_pages(direct)).map_err(failed)?;
        let block = |outgoing: &OutgoingBlock| StoredBlock {
            place: OnceLock::new(),
            stored: (0..outgoing.block.pages().div_ceil(64)).map(|_| AtomicU64::new(0)).collect(),
        };
        Ok(Self { channel: Arc::clone(channel), pages, blocks: ram.blocks.iter().map(block).collect() })
    }

    /// Writes the list of blocks, each with its place, and leaves the room for bitmap and pages behind it.
    pub(super) fn announce(&self, main: &mut MainStream, ram: &OutgoingRam) -> Result<()> {
        main.ram_head(ram);
        for (entry, block) in ram.list().zip(&self.blocks) {
            entry.encode(main.unsent());
            main.flush()?;
            let stream = file(&self.channel).map_err(|error| main.error(error))?;
            let place = mapped::place(stream.position(), entry.used_len, PAGE_SIZE);
            place.encode(main.unsent());
            main.flush()?;
            stream.seek(place.pages_offset + entry.used_len);
            block.place.get_or_init(|| place);
        }
        Ok(())
    }

    /// Writes the bitmaps, when no more page comes.
    pub(super) fn write_bitmaps(&self) -> Result<()> {
        for block in &self.blocks {
            let place = block.place(Phase::Device)?;
            let bitmap: Vec<u8> =
                block.stored.iter().flat_map(|word| word.load(Ordering::Relaxed).to_le_bytes()).collect();
            file(&self.channel).and_then(|file| file.write_all_at(&bitmap, place.bitmap_offset)).map_err(
                |error| Error::storage(Phase::Device, "writing a bitmap", error).on(name(&self.channel)),
            )?;
            self.channel.note_direct_sent(bitmap.len() as u64);
        }
        Ok(())
    }

    /// Writes the pages of a round that nobody else has claimed.
    pub(super) fn write_round(&self, round: &Round, shared: &Shared) -> Result<()> {
        let (mut claim, mut batch) = (Claim::default(), Batch::default());
        while round.claim(&mut claim, shared.batch_pages(), &mut batch) {
            let written = self.write_batch(&batch, shared);
            if written.is_err() {
                round.put_back(&mut claim, &batch);
                return written.map_err(|error| error.on(name(&self.channel)));
            }
        }
        Ok(())
    }

    fn write_batch(&self, batch: &Batch, shared: &Shared) -> Result<()> {
        let outgoing = shared.ram.block(batch.block)?;
        let block = self.blocks.get(batch.block).ok_or_else(|| {
            Error::bug(
                Phase::Active,
                format_args!("RAM block {} has no place in the file", outgoing.block.name()),
            )
        })?;
        let (mut run, mut zero) = (0..0, 0);
        for page in &batch.pages {
            let is_zero = shared.ram.goes_as_zero(outgoing, *page);
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
        Counters::add(&shared.session.counters.pages_zero, zero);
        Ok(())
    }

    /// Adjacent pages, in one call, straight from where the guest has them.
    fn write_run(
        &self,
        run: Range<usize>,
        outgoing: &OutgoingBlock,
        block: &StoredBlock,
        shared: &Shared,
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
                let what = format!("writing {} pages of RAM block {}", run.len(), outgoing.block.name());
                Error::storage(Phase::Active, what, error)
            },
        )?;
        self.channel.note_direct_sent(len as u64);
        Counters::add(&shared.session.counters.pages_normal, run.len());
        Ok(())
    }

    /// Starts a thread that writes pages.
    pub(super) fn start_worker(id: usize, shared: &Arc<Shared>, crew: &Crew) -> Result<()> {
        let shared = Arc::clone(shared);
        crew.spawn(&format!("mig-send-{id}"), Phase::Active, move || {
            let mapped = shared.mapped.as_ref();
            let mapped =
                mapped.ok_or_else(|| Error::bug(Phase::Active, "a writer of pages without a file"))?;
            let mut last = 0;
            while let Work::Round { number, round, .. } = shared.rounds.next(last)? {
                last = number;
                mapped.write_round(&round, &shared)?;
                shared.rounds.done();
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

fn name(channel: &Channel) -> String {
    format!("main ({})", channel.peer())
}

/// The rules of QEMU for what may go to a file, and how. `file`: the endpoint is one.
pub(super) fn check_settings(mapped: bool, file: bool, channels: usize) -> Result<()> {
    let problem = match (mapped, file) {
        (true, false) => "mapped-ram goes to file: only, where pages have fixed places",
        (false, true) if channels > 0 => {
            "parallel channels to a file need mapped-ram, where pages have fixed places"
        }
        _ => return Ok(()),
    };
    Err(Error::new(ErrorKind::ApiMisuse, Phase::Setup, problem))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_without_a_place_in_the_file_is_a_bug_and_not_dropped() {
        let block = StoredBlock { place: OnceLock::new(), stored: Box::new([AtomicU64::new(0)]) };
        block.note(63, true).unwrap();
        assert_eq!(block.note(64, true).unwrap_err().kind(), ErrorKind::Bug);
        let error = block.place(Phase::Active).unwrap_err();
        assert_eq!((error.kind(), error.phase()), (ErrorKind::Bug, Phase::Active));
    }
}
