//! Pages that go into a file: as a plain stream, or at fixed places (`mapped-ram`), where any number of workers write, a page
//! again in the same place. Spec: docs/wire.md §17.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use multifd_transports::{Channel, FileStream};
use multifd_wire::MappedRamHeader;

use crate::error::{Error, Phase, Result};
use crate::mapped;
use crate::ram::{Batch, Claim, PAGE, PAGE_SIZE, Round};
use crate::session::Counters;
use crate::source::main_writer::MainWriter;
use crate::source::outgoing::{OutgoingBlock, OutgoingRam};
use crate::source::rounds::{RoundContext, Rounds, Work};
use crate::source::shared::SourceShared;
use crate::workers::Crew;

/// A file that a guest goes to.
pub(in crate::source) struct File {
    stream: Arc<FileStream>,
    channel: Arc<Channel>,
    /// `None`: pages are records of the stream.
    places: Option<Places>,
}

/// Pages at fixed places, and who writes them.
struct Places {
    file: Arc<MappedFile>,
    rounds: Rounds,
}

/// A file with pages at fixed places, and what is in it by now.
struct MappedFile {
    stream: Arc<FileStream>,
    /// Counts the bytes, and names the file.
    channel: Arc<Channel>,
    /// The same file for the pages: past the page cache, if that was asked for.
    pages: std::fs::File,
    blocks: Vec<StoredBlock>,
}

struct StoredBlock {
    /// Known when the list of blocks is written.
    place: OnceLock<MappedRamHeader>,
    /// The bitmap: which pages are not zero. Each word is one worker's at a time: the round's chunks are whole words.
    stored: Box<[AtomicU64]>,
}

impl File {
    /// A plain stream into the file `stream`, which is behind `channel`.
    pub(in crate::source) fn plain(stream: Arc<FileStream>, channel: Arc<Channel>) -> Self {
        Self { stream, channel, places: None }
    }

    /// Pages at fixed places, written by `workers` threads. `direct`: past the page cache.
    pub(in crate::source) fn mapped(
        stream: Arc<FileStream>,
        channel: Arc<Channel>,
        direct: bool,
        workers: usize,
        shared: &Arc<SourceShared>,
        crew: &Crew,
    ) -> Result<Self> {
        let file = MappedFile::new(Arc::clone(&stream), Arc::clone(&channel), &shared.ram, direct)?;
        let places = Places { file: Arc::new(file), rounds: Rounds::new(crew.stop(), workers) };
        for id in 0..workers {
            places.start_worker(id, shared, crew)?;
            Counters::add(&shared.session.counters.channels, 1);
        }
        Ok(Self { stream, channel, places: Some(places) })
    }

    pub(super) fn workers(&self) -> usize {
        self.places.as_ref().map_or(0, |places| places.rounds.workers())
    }

    pub(super) fn announce(&self, main: &mut MainWriter, shared: &SourceShared) -> Result<()> {
        match &self.places {
            Some(places) => places.file.announce(main, &shared.ram),
            None => {
                main.ram_start(&shared.ram);
                Ok(())
            }
        }
    }

    /// With fixed places, the section that is open on `main` stays empty.
    pub(super) fn send_round(
        &self,
        round: Round,
        context: RoundContext,
        main: &mut MainWriter,
        shared: &SourceShared,
    ) -> Result<()> {
        let Some(places) = &self.places else {
            return super::main::send_round(&round, context, main, shared);
        };
        if places.rounds.workers() == 0 {
            places.file.write_round(&round, shared)?;
        } else {
            // A page is written again only when all workers are through: the newest stays.
            places.rounds.run(round, context, |_| Ok(()))?;
        }
        if context.last { places.file.write_bitmaps() } else { Ok(()) }
    }

    /// Waits for the disk: what is left to be synced when the guest is paused is little.
    pub(super) fn sync(&self, main: &MainWriter) -> Result<()> {
        self.stream.sync().map_err(|error| main.error(error))
    }

    /// A file runs no guest: it is thrown away unless it is whole on the disk, and up to then the source may run on.
    pub(super) fn finish(&self, end: &[u8], main: &mut MainWriter) -> Result<Instant> {
        main.raw(end)?;
        let sent = Instant::now();
        self.channel.finish_sending().map_err(|error| main.error(error))?;
        Ok(sent)
    }

    pub(super) fn dismiss_workers(&self) {
        self.places.iter().for_each(|places| places.rounds.close());
    }

    /// Again, as the switch has done before the workers ended: what they have written meanwhile goes, too.
    pub(super) fn abort(&self) {
        self.channel.closer().close();
    }
}

impl Places {
    fn start_worker(&self, id: usize, shared: &Arc<SourceShared>, crew: &Crew) -> Result<()> {
        let (file, rounds, shared) = (Arc::clone(&self.file), self.rounds.clone(), Arc::clone(shared));
        crew.spawn(&format!("mig-send-{id}"), Phase::Active, move || {
            let mut last = 0;
            while let Work::Round { number, round, .. } = rounds.next(last)? {
                last = number;
                file.write_round(&round, &shared)?;
                rounds.done();
            }
            Ok(())
        })
    }
}

impl MappedFile {
    fn new(stream: Arc<FileStream>, channel: Arc<Channel>, ram: &OutgoingRam, direct: bool) -> Result<Self> {
        let pages = stream.for_pages(direct).map_err(|error| {
            Error::storage(Phase::Setup, "opening the file for pages", error).on(name(&channel))
        })?;
        let block = |outgoing: &OutgoingBlock| StoredBlock {
            place: OnceLock::new(),
            stored: (0..outgoing.block.pages().div_ceil(64)).map(|_| AtomicU64::new(0)).collect(),
        };
        Ok(Self { stream, channel, pages, blocks: ram.blocks.iter().map(block).collect() })
    }

    /// Writes the list of blocks, each with its place, and leaves the room for bitmap and pages behind it.
    fn announce(&self, main: &mut MainWriter, ram: &OutgoingRam) -> Result<()> {
        main.ram_head(ram);
        for (entry, block) in ram.list().zip(&self.blocks) {
            entry.encode(main.unsent());
            main.flush()?;
            let place = mapped::place(self.stream.position(), entry.used_len, PAGE_SIZE);
            place.encode(main.unsent());
            main.flush()?;
            self.stream.seek(place.pages_offset + entry.used_len);
            block.place.get_or_init(|| place);
        }
        Ok(())
    }

    /// Writes the bitmaps, when no more page comes.
    fn write_bitmaps(&self) -> Result<()> {
        for block in &self.blocks {
            let Some(place) = block.place.get() else { continue };
            let bitmap: Vec<u8> =
                block.stored.iter().flat_map(|word| word.load(Ordering::Relaxed).to_le_bytes()).collect();
            self.stream.write_all_at(&bitmap, place.bitmap_offset).map_err(|error| {
                Error::storage(Phase::Device, "writing a bitmap", error).on(name(&self.channel))
            })?;
            self.channel.note_direct_sent(bitmap.len() as u64);
        }
        Ok(())
    }

    /// Writes the pages of a round that no other worker has claimed.
    fn write_round(&self, round: &Round, shared: &SourceShared) -> Result<()> {
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

    fn write_batch(&self, batch: &Batch, shared: &SourceShared) -> Result<()> {
        let found = shared.ram.blocks.get(batch.block).zip(self.blocks.get(batch.block));
        let Some((outgoing, block)) = found else { return Ok(()) };
        let (mut run, mut zero) = (0..0, 0);
        for page in &batch.pages {
            let is_zero = shared.ram.goes_as_zero(outgoing, *page);
            block.note(*page, !is_zero);
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
        shared: &SourceShared,
    ) -> Result<()> {
        let Some(place) = block.place.get().filter(|_| !run.is_empty()) else { return Ok(()) };
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
}

impl StoredBlock {
    fn note(&self, page: usize, stored: bool) {
        let Some(word) = self.stored.get(page / 64) else { return };
        let bit = 1 << (page % 64);
        // Relaxed: the end of the round orders them before they are written.
        if stored {
            word.fetch_or(bit, Ordering::Relaxed)
        } else {
            word.fetch_and(!bit, Ordering::Relaxed)
        };
    }
}

fn name(channel: &Channel) -> String {
    format!("main ({})", channel.peer())
}
