//! The records of the RAM section on main: pages into guest memory, up to what the machine decides
//! about.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use multifd_wire::{BlockListFormat, BlockRef, Configuration, RamRecord};

use super::mapped::PageReaders;
use super::place::{BlockSink, BlockSinks, IncomingRam, Pager};
use super::postcopy::serving::Serving;
use super::shared::DestinationShared;
use crate::error::{Error, ErrorKind, Phase, Remedy, Result};
use crate::guest::{PAGE, PAGE_SIZE};
use crate::run::counters::{ChannelCounters, Counters};
use crate::stream::{MainReader, block_list};

/// Reads pages on main.
pub(super) struct RamReader {
    sinks: Arc<BlockSinks>,
    /// The guest may run: no difference to an older page can come.
    switched: bool,
    /// What places pages of a guest that runs.
    pager: Option<Arc<Pager>>,
    /// A page has come.
    placed: bool,
    /// The block that CONTINUE refers to; kept over sections.
    last_block: Option<Arc<BlockSink>>,
}

/// Most pages that are written at once: as many as the reader's buffer has room for.
const LONGEST_RUN: usize = 64;

/// A record that is no page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mark {
    EndOfRecords,
    Flush,
}

impl RamReader {
    /// Reads the list of blocks, the first thing in START, and opens memory for them. With
    /// `mapped`, their pages have come, too, when this returns. `advised`: a source that may switch
    /// to post-copy says the page size of blocks with huge pages.
    pub(super) fn open(
        reader: &mut MainReader,
        shared: &DestinationShared,
        configuration: &Configuration,
        ram: &mut dyn IncomingRam,
        readers: &PageReaders,
        (mapped, advised): (bool, bool),
    ) -> Result<Self> {
        let file = readers.check(reader, mapped)?;
        let format =
            BlockListFormat { mapped_ram: mapped, page_sizes: advised, ..BlockListFormat::default() };
        let announced = block_list::read(reader, PAGE_SIZE, format)?;
        let total: u64 = announced.iter().map(|entry| entry.used_len).sum();
        if let Some(limit) = shared.limits.ram.filter(|limit| total > *limit) {
            let detail = format!(
                "the source's guest has {total} bytes of RAM in {} blocks, limit is {limit}",
                announced.len()
            );
            return Err(Error::new(ErrorKind::GuestMemory, Phase::Setup, detail)
                .remedied_by(Some(Remedy::RaiseMaxRam)));
        }
        if let Some(sinks) = shared.kept_sinks(&announced)? {
            Counters::add(&shared.session.counters.resumptions, 1);
            shared.publish(Arc::clone(&sinks));
            return Ok(Self::of(sinks));
        }
        let blocks = ram.open(configuration, &announced).map_err(|error| {
            Error::new(ErrorKind::GuestMemory, Phase::Setup, "no memory for the source's RAM blocks")
                .because(error)
        })?;
        shared.session.counters.ram_bytes.store(total, Ordering::Relaxed);
        let sinks = Arc::new(BlockSinks::new(&announced, &blocks)?);
        if mapped && shared.verifies {
            let detail = "pages at fixed places of a file go straight to memory: nothing is known of them to verify it by";
            return Err(Error::incompatible(Phase::Setup, detail));
        }
        if shared.wishes().digest || shared.verifies {
            sinks.keep_digests();
        }
        shared.resumption.iter().for_each(|kept| kept.keep(&sinks));
        shared.publish(Arc::clone(&sinks));
        if let Some(file) = file {
            readers.load(file, &announced, &sinks, shared)?;
        }
        Ok(Self::of(sinks))
    }

    fn of(sinks: Arc<BlockSinks>) -> Self {
        Self { sinks, switched: false, pager: None, placed: false, last_block: None }
    }

    /// Reads a channel of urgent pages, which has a last block of its own.
    pub(super) fn of_urgent(serving: &Serving) -> Self {
        let mut reader = Self::of(Arc::clone(serving.sinks()));
        reader.switch(serving);
        reader
    }

    /// Where the pages are.
    pub(super) fn sinks(&self) -> &Arc<BlockSinks> {
        &self.sinks
    }

    /// The guest may run from now on.
    pub(super) fn switch(&mut self, serving: &Serving) {
        self.switched = true;
        self.pager = serving.pager().map(Arc::clone);
    }

    /// True once a page has come.
    pub(super) fn has_placed(&self) -> bool {
        self.placed
    }

    /// Over a new link, the first page names its block.
    pub(super) fn forget_last_block(&mut self) {
        self.last_block = None;
    }

    /// Reads page records up to one that is none. `mapped`: there may be no page records.
    pub(super) fn read(
        &mut self,
        reader: &mut MainReader,
        counters: &ChannelCounters,
        mapped: bool,
    ) -> Result<Mark> {
        let mut pages = Pages::default();
        let result = self.records(reader, mapped, &mut pages);
        pages.count(counters);
        result
    }

    /// Reads one record. `None`: it was a page.
    pub(super) fn read_one(
        &mut self,
        reader: &mut MainReader,
        counters: &ChannelCounters,
    ) -> Result<Option<Mark>> {
        let mut pages = Pages::default();
        let mark = self.record(reader, false, &mut pages);
        pages.count(counters);
        mark
    }

    fn records(&mut self, reader: &mut MainReader, mapped: bool, pages: &mut Pages) -> Result<Mark> {
        loop {
            if let Some(mark) = self.record(reader, mapped, pages)? {
                return Ok(mark);
            }
        }
    }

    fn record(&mut self, reader: &mut MainReader, mapped: bool, pages: &mut Pages) -> Result<Option<Mark>> {
        let record =
            reader.next(Phase::Active, "a RAM record", |bytes| RamRecord::parse(bytes, PAGE_SIZE))?;
        match record {
            RamRecord::EndOfSection => return Ok(Some(Mark::EndOfRecords)),
            record if mapped => {
                let detail = format!("{record:?} in a mapped-ram stream, where pages have fixed places");
                return Err(Error::misbehaved(Phase::Active, detail));
            }
            RamRecord::Flush => return Ok(Some(Mark::Flush)),
            RamRecord::Page { offset, block } => {
                let pager = self.pager.clone();
                let sink = self.sink(block)?;
                let page = sink.page_at(offset)?;
                pages.normal += match pager {
                    Some(pager) => {
                        pager.put(sink, page, Some(reader.take(Phase::Active, "a page", PAGE)?))?;
                        1
                    }
                    None => write_run(reader, sink, page)?,
                };
            }
            RamRecord::Zero { offset, block } => {
                let pager = self.pager.clone();
                let sink = self.sink(block)?;
                let page = sink.page_at(offset)?;
                match pager {
                    Some(pager) => pager.put(sink, page, None)?,
                    None => sink.clear([page])?,
                }
                pages.zero += 1;
            }
            RamRecord::Xbzrle { .. } | RamRecord::Compressed { .. } if self.switched => {
                let seen = match record {
                    RamRecord::Compressed { .. } => "a compressed page",
                    _ => "a difference",
                };
                let detail = format!("{seen} after the switch to post-copy, expected a whole page");
                return Err(Error::misbehaved(Phase::Active, detail));
            }
            RamRecord::Compressed { offset, block, len } => {
                let sink = self.sink(block)?;
                let page = sink.page_at(offset)?;
                let len =
                    usize::try_from(len).map_err(|_| Error::bug(Phase::Active, "a length below 2^13"))?;
                sink.inflate(page, reader.take(Phase::Active, "a compressed page", len)?)?;
                pages.normal += 1;
            }
            RamRecord::Xbzrle { offset, block, len } => {
                let sink = self.sink(block)?;
                let page = sink.page_at(offset)?;
                sink.apply(page, reader.take(Phase::Active, "an xbzrle record", len.into())?)?;
                pages.xbzrle += 1;
            }
            RamRecord::MemSize { .. } => {
                return Err(Error::misbehaved(Phase::Active, "a second list of RAM blocks"));
            }
        }
        self.placed = true;
        Ok(None)
    }

    /// The block of a page record. Most refer to the last one: that costs no look-up.
    fn sink(&mut self, block: BlockRef) -> Result<&BlockSink> {
        if let BlockRef::Named(name) = block {
            self.last_block = Some(Arc::clone(self.sinks.find(name.as_str())?));
        }
        self.last_block.as_deref().ok_or_else(|| {
            Error::misbehaved(Phase::Active, "a page with CONTINUE, but no RAM block was named before it")
        })
    }
}

/// Writes `page`, whose record was read, and the pages behind it whose records have arrived, too:
/// one write costs less than one for each. Gives their number.
fn write_run(reader: &mut MainReader, sink: &BlockSink, page: usize) -> Result<usize> {
    while reader.buffered().len() < PAGE {
        reader.more(Phase::Active, "a page")?;
    }
    let (pages, len) = arrived(reader.buffered(), |offset, after| {
        sink.block().page_at(offset).is_some_and(|other| other == page + after)
    });
    sink.write_parts(page, &pages)?;
    let count = pages.len();
    reader.consume(len);
    Ok(count)
}

/// The content of a page, which `bytes` begins with, and of those that `follows` says come so many
/// pages after it in the block, for as long as one follows the other; and how many bytes all of
/// them take, with their records.
fn arrived(bytes: &[u8], follows: impl Fn(u64, usize) -> bool) -> (Vec<&[u8]>, usize) {
    let (mut pages, mut end) = (Vec::with_capacity(LONGEST_RUN), 0);
    let mut content = Some(0..PAGE);
    while let Some((page, range)) = content.and_then(|range| Some((bytes.get(range.clone())?, range))) {
        pages.push(page);
        end = range.end;
        let next = bytes.get(end..).map(|next| RamRecord::parse(next, PAGE_SIZE));
        content = match next {
            Some(Ok(Some((RamRecord::Page { offset, block: BlockRef::Same }, head))))
                if pages.len() < LONGEST_RUN && follows(offset, pages.len()) =>
            {
                Some(end + head..end + head + PAGE)
            }
            _ => None,
        };
    }
    (pages, end)
}

/// Counted for a whole run of records at a time.
#[derive(Default)]
struct Pages {
    normal: usize,
    zero: usize,
    xbzrle: usize,
}

impl Pages {
    fn count(&self, counters: &ChannelCounters) {
        Counters::add(&counters.pages_normal, self.normal);
        Counters::add(&counters.pages_zero, self.zero);
        Counters::add(&counters.pages_xbzrle, self.xbzrle);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(offset: usize, block: BlockRef) -> Vec<u8> {
        let mut bytes = Vec::new();
        RamRecord::Page { offset: (offset * PAGE) as u64, block }.encode(PAGE_SIZE, &mut bytes);
        bytes.extend([u8::try_from(offset).unwrap(); PAGE]);
        bytes
    }

    /// Pages that belong together when this follows page 7, of a block of 100.
    fn run(next: &[Vec<u8>]) -> (Vec<u8>, usize) {
        let bytes = [vec![7; PAGE], next.concat()].concat();
        let place = |offset: u64| usize::try_from(offset).unwrap() / PAGE;
        let (pages, len) = arrived(&bytes, |offset, after| place(offset) < 100 && place(offset) == 7 + after);
        assert!(pages.iter().all(|page| page.len() == PAGE && page.iter().all(|byte| *byte == page[0])));
        (pages.iter().map(|page| page[0]).collect(), len)
    }

    #[test]
    fn neighbours_that_have_arrived_are_one_run() {
        let record = PAGE + 8;
        let same = |offset| page(offset, BlockRef::Same);
        assert_eq!(run(&[]), (vec![7], PAGE));
        assert_eq!(run(&[same(8), same(9)]), (vec![7, 8, 9], PAGE + 2 * record));
        assert_eq!(run(&[same(8), same(10)]), (vec![7, 8], PAGE + record), "a gap");
        assert_eq!(run(&[same(7)]), (vec![7], PAGE), "the same page again");
        let named = BlockRef::Named("pc.rom".try_into().unwrap());
        assert_eq!(run(&[page(8, named)]), (vec![7], PAGE), "another block");
        assert_eq!(run(&[same(8)[..record - 1].to_vec()]), (vec![7], PAGE), "a page that is not whole");
        assert_eq!(run(&[same(8)[..5].to_vec()]), (vec![7], PAGE), "a record that is not whole");
        let mut zero = Vec::new();
        RamRecord::Zero { offset: 8 * PAGE as u64, block: BlockRef::Same }.encode(PAGE_SIZE, &mut zero);
        assert_eq!(run(&[zero, same(9)]), (vec![7], PAGE), "another kind of record");
    }

    #[test]
    fn a_run_ends_with_its_block_and_at_a_length() {
        let to_the_end: Vec<_> = (8..103).map(|offset| page(offset, BlockRef::Same)).collect();
        assert_eq!(run(&to_the_end).0.len(), LONGEST_RUN);
        let bytes = [vec![98; PAGE], page(99, BlockRef::Same), page(100, BlockRef::Same)].concat();
        let place = |offset: u64| usize::try_from(offset).unwrap() / PAGE;
        let (pages, len) =
            arrived(&bytes, |offset, after| place(offset) < 100 && place(offset) == 98 + after);
        assert_eq!((pages.len(), len), (2, 2 * PAGE + 8));
    }
}
