//! The RAM section of the main channel: the list of blocks, page records, sync points.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use multifd_wire::{BlockListFormat, BlockRef, Configuration, RamRecord};

use super::mapped::PageReaders;
use super::place::{BlockSink, BlockSinks, IncomingRam};
use super::shared::DestinationShared;
use crate::error::{Error, ErrorKind, Phase, Result};
use crate::guest::{PAGE, PAGE_SIZE};
use crate::run::session::Counters;
use crate::stream::mapped_layout::CAPABILITY;
use crate::stream::{MainReader, block_list};

/// Which item of the section is being read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SectionKind {
    Start,
    Part,
    End,
}

/// Where the sync points of the parallel channels are on main. Not negotiated: START shows it, which always has one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum SyncPoints {
    /// START is not over.
    Unknown,
    /// A FLUSH record at each (machine types from 8.1 on).
    AtFlush,
    /// Every end of a section (machine types up to 8.0). Also right for a stream without channels: nothing is waited for.
    AtSectionEnd,
}

pub(crate) struct RamSection<'a> {
    shared: &'a DestinationShared,
    sinks: Arc<BlockSinks>,
    /// Pages lie elsewhere, and there is no parallel channel to wait for.
    mapped: bool,
    sync_points: SyncPoints,
    /// The block that CONTINUE refers to; kept over sections.
    last_block: Option<Arc<BlockSink>>,
    /// END was read.
    ended: bool,
    /// Sync points passed, and whether the last one was in END.
    syncs: u64,
    ended_in_sync: bool,
}

impl<'a> RamSection<'a> {
    /// Reads the list of blocks, the first thing in START, and opens memory for them.
    pub(crate) fn start(
        reader: &mut MainReader,
        shared: &'a DestinationShared,
        configuration: &Configuration,
        ram: &mut dyn IncomingRam,
        readers: &PageReaders,
    ) -> Result<Self> {
        let mapped = is_mapped(configuration)?;
        readers.check(reader.channel(), mapped)?;
        let format = BlockListFormat { mapped_ram: mapped, ..BlockListFormat::default() };
        let announced = block_list::read(reader, PAGE_SIZE, format)?;
        let blocks = ram.open(configuration, &announced).map_err(|error| {
            Error::new(ErrorKind::GuestMemory, Phase::Setup, "no memory for the source's RAM blocks")
                .because(error)
        })?;
        let total: u64 = announced.iter().map(|entry| entry.used_len).sum();
        shared.session.counters.ram_bytes.store(total, Ordering::Relaxed);
        let sinks = Arc::new(BlockSinks::new(&announced, &blocks)?);
        shared.publish(Arc::clone(&sinks));
        if mapped {
            readers.load(reader.channel(), &announced, &sinks, shared)?;
        }
        Ok(Self {
            shared,
            sinks,
            mapped,
            sync_points: SyncPoints::Unknown,
            last_block: None,
            ended: false,
            syncs: 0,
            ended_in_sync: false,
        })
    }

    /// True once END was read, and a sync point in it.
    pub(crate) fn ended_in_sync(&self) -> bool {
        self.ended_in_sync
    }

    /// True once END was read.
    pub(crate) fn ended(&self) -> bool {
        self.ended
    }

    /// Sync points that were passed.
    pub(crate) fn syncs(&self) -> u64 {
        self.syncs
    }

    /// Where the pages are.
    pub(crate) fn sinks(&self) -> &BlockSinks {
        &self.sinks
    }

    /// Reads records up to the end of this item of the section; the footer is left.
    pub(crate) fn read(&mut self, reader: &mut MainReader, kind: SectionKind) -> Result<()> {
        if self.ended {
            return Err(Error::misbehaved(Phase::Active, "more of ram after its END"));
        }
        let mut pages = Pages::default();
        let result = self.records(reader, kind, &mut pages);
        pages.count(self.shared);
        self.ended = kind == SectionKind::End;
        result
    }

    fn records(&mut self, reader: &mut MainReader, kind: SectionKind, pages: &mut Pages) -> Result<()> {
        loop {
            let record =
                reader.next(Phase::Active, "a RAM record", |bytes| RamRecord::parse(bytes, PAGE_SIZE))?;
            match record {
                RamRecord::EndOfSection if self.mapped => return Ok(()),
                record if self.mapped => {
                    let detail = format!("{record:?} in a mapped-ram stream, where pages have fixed places");
                    return Err(Error::misbehaved(Phase::Active, detail));
                }
                RamRecord::EndOfSection => return self.end_of_section(kind),
                RamRecord::Flush => self.flush(kind)?,
                RamRecord::Page { offset, block } => {
                    let sink = find(&self.sinks, &mut self.last_block, block)?;
                    let page = sink.page_at(offset)?;
                    sink.write(page, reader.take(Phase::Active, "a page", PAGE)?, &sink.best_place())?;
                    pages.normal += 1;
                }
                RamRecord::Zero { offset, block } => {
                    let sink = find(&self.sinks, &mut self.last_block, block)?;
                    sink.clear([sink.page_at(offset)?])?;
                    pages.zero += 1;
                }
                RamRecord::Xbzrle { offset, block, len } => {
                    let sink = find(&self.sinks, &mut self.last_block, block)?;
                    let page = sink.page_at(offset)?;
                    sink.apply(page, reader.take(Phase::Active, "an xbzrle record", len.into())?)?;
                    pages.xbzrle += 1;
                }
                RamRecord::MemSize { .. } => {
                    return Err(Error::misbehaved(Phase::Active, "a second list of RAM blocks"));
                }
            }
        }
    }

    fn flush(&mut self, kind: SectionKind) -> Result<()> {
        match (self.sync_points, kind) {
            (SyncPoints::Unknown, _) => self.sync_points = SyncPoints::AtFlush,
            // Per-round sources say so in START; a stray FLUSH of a stream without channels (QEMU 8.1.0) means nothing.
            (SyncPoints::AtSectionEnd, _) => return Ok(()),
            (SyncPoints::AtFlush, _) => Counters::add(&self.shared.session.counters.rounds, 1),
        }
        self.sync(kind)
    }

    fn end_of_section(&mut self, kind: SectionKind) -> Result<()> {
        if kind == SectionKind::Start && self.sync_points == SyncPoints::Unknown {
            self.sync_points = SyncPoints::AtSectionEnd;
        }
        if self.sync_points == SyncPoints::AtSectionEnd { self.sync(kind) } else { Ok(()) }
    }

    fn sync(&mut self, kind: SectionKind) -> Result<()> {
        self.ended_in_sync = kind == SectionKind::End;
        self.syncs += 1;
        self.shared.sync_point()
    }
}

/// Counted for a whole item of the section at a time.
#[derive(Default)]
struct Pages {
    normal: usize,
    zero: usize,
    xbzrle: usize,
}

impl Pages {
    fn count(&self, shared: &DestinationShared) {
        let counters = &shared.session.counters;
        Counters::add(&counters.pages_normal, self.normal);
        Counters::add(&counters.pages_zero, self.zero);
        Counters::add(&counters.pages_xbzrle, self.xbzrle);
    }
}

/// The block of a page record. Most refer to the last one: that costs no look-up.
fn find<'l>(
    sinks: &BlockSinks,
    last: &'l mut Option<Arc<BlockSink>>,
    block: BlockRef,
) -> Result<&'l BlockSink> {
    if let BlockRef::Named(name) = block {
        *last = Some(Arc::clone(sinks.find(name.as_str())?));
    }
    last.as_deref().ok_or_else(|| {
        Error::misbehaved(Phase::Active, "a page with CONTINUE, but no RAM block was named before it")
    })
}

/// Of all capabilities that change the stream, mapped-ram is the one that can be read.
fn is_mapped(configuration: &Configuration) -> Result<bool> {
    let capabilities = &configuration.capabilities;
    if let Some(capability) = capabilities.iter().find(|capability| *capability != CAPABILITY) {
        let detail = format!("capability {capability} is on at the source, it is not supported here");
        return Err(Error::incompatible(Phase::Setup, detail));
    }
    Ok(!capabilities.is_empty())
}
