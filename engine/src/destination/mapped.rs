//! Pages at fixed places of a file (`mapped-ram`): any number of threads read them straight to
//! where they belong. Spec: docs/wire.md §17.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use multifd_wire::{BlockEntry, MappedRamHeader};

use super::place::{BlockSink, BlockSinks};
use super::shared::DestinationShared;
use crate::error::{Error, ErrorKind, Phase, Result};
use crate::guest::PAGE;
use crate::io::MainFile;
use crate::run::counters::{ChannelCounters, Counters};
use crate::run::session::Session;
use crate::run::stop::Monitor;
use crate::run::workers::Crew;
use crate::stream::MainReader;
use crate::stream::mapped_layout::StoredBits;

/// Who reads the pages of a `mapped-ram` file, and how.
pub(crate) struct PageReaders {
    pub(crate) crew: Arc<Crew>,
    /// Threads; `None`: a sensible number.
    pub(crate) count: Option<usize>,
    /// Past the page cache.
    pub(crate) direct: bool,
}

/// More readers than this ask one disk for nothing new.
const MOST_BY_DEFAULT: usize = 4;

/// As many as there can be channels.
const MOST: usize = 255;

/// Words of a bitmap that a reader claims in one go: 4096 pages, 16 MiB of neighbouring guest
/// memory.
const CHUNK_WORDS: usize = 64;
const CHUNK_PAGES: u64 = 64 * CHUNK_WORDS as u64;

impl PageReaders {
    fn count(&self) -> usize {
        let cores = || std::thread::available_parallelism().map_or(1, usize::from).min(MOST_BY_DEFAULT);
        self.count.unwrap_or_else(cores).clamp(1, MOST)
    }

    /// What was asked for must fit the stream that came. Gives the file that its pages are in, if
    /// they have fixed places.
    pub(super) fn check(&self, main: &MainReader, mapped: bool) -> Result<Option<MainFile>> {
        let problem = match (mapped.then(|| main.file()), main.channel().is_two_way()) {
            (Some(None), _) => {
                "capability mapped-ram is on at the source, only a file can hold such a stream".to_owned()
            }
            (Some(file), _) => return Ok(file.cloned()),
            (None, _) if self.direct => {
                "a plain stream, direct I/O was asked for and needs mapped-ram".to_owned()
            }
            (None, false) if self.count.is_some_and(|count| count > 0) => {
                format!("a plain stream in one direction, {} channels were asked for", self.count())
            }
            (None, _) => return Ok(None),
        };
        Err(Error::incompatible(Phase::Setup, problem))
    }

    /// Reads the pages of all `announced` blocks from `file`. They are in memory when this returns.
    pub(super) fn load(
        &self,
        file: MainFile,
        announced: &[BlockEntry],
        sinks: &BlockSinks,
        shared: &DestinationShared,
    ) -> Result<()> {
        let pages = file
            .for_pages(self.direct)
            .map_err(|error| Error::storage(Phase::Setup, "opening the file for pages", error))?;
        let plan = Arc::new(Plan {
            file,
            pages,
            session: Arc::clone(&shared.session),
            blocks: plan(announced, sinks)?,
            cursor: AtomicUsize::new(0),
        });
        let stop = &shared.session.stop;
        let (count, finished) = (self.count(), Monitor::new(0, stop));
        for id in 0..count {
            let (plan, finished) = (Arc::clone(&plan), finished.clone());
            let counters = shared.session.counters.thread(id);
            self.crew.spawn(&format!("mig-recv-{id}"), Phase::Active, move || {
                plan.run(&counters).map_err(|error| error.on(plan.file.name()))?;
                finished.modify_and_notify(|finished| *finished += 1);
                Ok(())
            })?;
        }
        finished
            .wait(stop, None, |finished| (*finished == count).then_some(()))
            .ok_or_else(|| Error::stopped(Phase::Active))
    }
}

/// All blocks, and a cursor over the chunks of their bitmaps.
struct Plan {
    file: MainFile,
    pages: File,
    session: Arc<Session>,
    blocks: Vec<PlannedBlock>,
    cursor: AtomicUsize,
}

struct PlannedBlock {
    sink: Arc<BlockSink>,
    place: MappedRamHeader,
    pages: u64,
    /// Chunks of the blocks before this one.
    first_chunk: u64,
}

fn plan(announced: &[BlockEntry], sinks: &BlockSinks) -> Result<Vec<PlannedBlock>> {
    let mut first_chunk = 0;
    let mut blocks = Vec::with_capacity(announced.len());
    for entry in announced {
        let Some(place) = entry.mapped_ram else { continue };
        let sink = Arc::clone(sinks.find(entry.name.as_str())?);
        let pages = sink.block().pages() as u64;
        blocks.push(PlannedBlock { sink, place, pages, first_chunk });
        first_chunk += pages.div_ceil(CHUNK_PAGES);
    }
    Ok(blocks)
}

impl Plan {
    /// One reader: claims chunks until there are no more.
    fn run(&self, counters: &ChannelCounters) -> Result<()> {
        loop {
            let chunk = self.cursor.fetch_add(1, Ordering::Relaxed) as u64;
            let block = self.blocks.partition_point(|block| block.first_chunk <= chunk);
            let Some(block) = block.checked_sub(1).and_then(|block| self.blocks.get(block)) else {
                return Ok(());
            };
            let first = (chunk - block.first_chunk) * CHUNK_PAGES;
            if first >= block.pages {
                return Ok(());
            }
            if self.session.stop.tripped() {
                return Err(Error::stopped(Phase::Active));
            }
            self.chunk(block, first, counters)?;
        }
    }

    fn chunk(&self, block: &PlannedBlock, first: u64, counters: &ChannelCounters) -> Result<()> {
        let last = block.pages.min(first + CHUNK_PAGES);
        let bits = self.bits(block, first, last)?;
        let mut page = first;
        while page < last {
            let (stored, run) = bits.run(page);
            // A run of clear bits goes on in those that belong to no page.
            let count = run.clamp(1, last - page);
            if stored {
                self.read(block, page, count)?;
                Counters::add(&counters.pages_normal, size(count));
            } else {
                block.sink.clear(size(page)..size(page + count))?;
                Counters::add(&counters.pages_zero, size(count));
            }
            page += count;
        }
        Ok(())
    }

    /// The bits of pages `first..last`.
    fn bits(&self, block: &PlannedBlock, first: u64, last: u64) -> Result<StoredBits> {
        let mut bytes = [0; 8 * CHUNK_WORDS];
        let bytes = bytes.get_mut(..size((last - first).div_ceil(64) * 8)).ok_or_else(|| {
            Error::bug(Phase::Active, format_args!("a bitmap of pages {first}..{last} in one piece"))
        })?;
        let position = block.place.bitmap_offset + first / 8;
        self.file.read_exact_at(bytes, position).map_err(|error| {
            let what =
                format!("reading the bitmap of RAM block {} at byte {position}", block.sink.block().name());
            failed(what, error)
        })?;
        let bits = StoredBits::decode(first, bytes);
        let (stray, clear) = bits.run(last);
        if stray || last + clear < bits.end() {
            let detail =
                format!("a page past the {} pages of RAM block {}", block.pages, block.sink.block().name());
            return Err(Error::new(ErrorKind::InvalidStream, Phase::Active, detail));
        }
        Ok(bits)
    }

    fn read(&self, block: &PlannedBlock, page: u64, count: u64) -> Result<()> {
        let (first, count, start) = (size(page), size(count), page * PAGE as u64);
        let (memory, position) = (block.sink.block().memory(), block.place.pages_offset + start);
        let what =
            || format!("reading {count} pages of RAM block {} at byte {position}", block.sink.block().name());
        if block.sink.is_read_only() {
            let mut content = vec![0; count * PAGE];
            self.file.read_exact_at(&mut content, position).map_err(|error| failed(what(), error))?;
            block.sink.write(first, &content, &block.sink.best_place())?;
        } else {
            memory.fill_from(first * PAGE..(first + count) * PAGE, &self.pages, position).map_err(
                |error| match error.raw_os_error() {
                    Some(libc::EFAULT) => block.sink.fault("writing", first..first + count, error),
                    _ => failed(what(), error),
                },
            )?;
            self.file.count_read(count * PAGE);
            block.sink.note_written(first, count);
        }
        Ok(())
    }
}

/// Pages of a block that is mapped here: they fit.
fn size(pages: u64) -> usize {
    usize::try_from(pages).unwrap_or(usize::MAX)
}

fn failed(what: String, error: io::Error) -> Error {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => Error::new(ErrorKind::InvalidStream, Phase::Active, what)
            .because(io::Error::new(error.kind(), "the file ends before")),
        _ => Error::storage(Phase::Active, what, error),
    }
}
