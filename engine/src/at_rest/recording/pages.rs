//! The pages of a recording, one record at a time.

use std::collections::HashMap;

use multifd_wire::{BlockName, BlockRef, RamRecord};

use super::devices::Devices;
use super::items::{Items, Next};
use super::mapped::MappedPages;
use super::{Recording, invalid};
use crate::error::{Phase, Result};
use crate::stream::compressed;

/// What a recording or a checkpoint says of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageRecord<'a> {
    /// The block, by its place in the list.
    pub block: usize,
    /// The page, counted from the block's start.
    pub page: u64,
    /// What is in it.
    pub content: PageContent<'a>,
}

/// The content of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageContent<'a> {
    /// The page's bytes. They may be zeros all the same.
    Data(&'a [u8]),
    /// The difference to what the page was before.
    Xbzrle(&'a [u8]),
    /// Zeros, for so many pages from this one on.
    Zero {
        /// At least 1.
        pages: u64,
    },
}

/// Reads a recording page by page.
///
/// Pages come in the order of the stream, and one that was sent more than once comes more than
/// once: the last time counts. With `mapped-ram` they come in the order of the blocks, each once.
pub struct RecordedPages<'r> {
    recording: &'r Recording,
    by_name: HashMap<&'r BlockName, usize>,
    mapped: Option<MappedPages<'r>>,
    items: Items<'r>,
    place: Place,
    /// The block that CONTINUE refers to; kept over sections.
    last_block: Option<usize>,
    /// A page that was compressed.
    inflated: Vec<u8>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    /// Within a piece of RAM: records follow.
    Ram,
    /// Behind it.
    Items,
    /// Behind everything.
    End,
}

/// A record without its bytes, which come next.
struct Found {
    block: usize,
    page: u64,
    kind: Kind,
}

enum Kind {
    Data,
    Xbzrle(u16),
    Compressed(u32),
    Zero,
}

impl<'r> RecordedPages<'r> {
    pub(super) fn new(recording: &'r Recording) -> Self {
        let start = &recording.ram;
        let reader = recording.file.reader(start.position);
        let items = Items::new(reader, recording.described.clone(), Some(start.section), start.early.clone());
        Self {
            recording,
            by_name: recording.blocks.iter().enumerate().map(|(index, block)| (&block.name, index)).collect(),
            mapped: recording.is_mapped().then(|| MappedPages::new(recording)),
            items,
            place: Place::Ram,
            last_block: None,
            inflated: vec![0; recording.page_size.bytes()],
        }
    }

    /// The next record; `None` when the stream is over, which has then been read to its last byte.
    ///
    /// # Errors
    /// `InvalidStream` where the stream is broken or ends too early, naming the byte; `Storage` if
    /// the file cannot be read.
    pub fn next_page(&mut self) -> Result<Option<PageRecord<'_>>> {
        let name = self.recording.file.name();
        self.read_next().map_err(|error| error.on(name))
    }

    /// Where in the file reading has got to: from 0 to [`Recording::file_len`].
    pub fn position(&self) -> u64 {
        self.mapped.as_ref().map_or(self.items.reader.position(), MappedPages::position)
    }

    /// Reads on to the end, passing over pages, and gives what the stream holds beside RAM.
    ///
    /// # Errors
    /// As [`RecordedPages::next_page`].
    pub fn devices(mut self) -> Result<Devices> {
        self.mapped = None;
        while self.next_page()?.is_some() {}
        Ok(self.items.into_devices())
    }

    fn read_next(&mut self) -> Result<Option<PageRecord<'_>>> {
        let mapped = self.mapped.as_mut().map(MappedPages::seek_next).transpose()?.unwrap_or(false);
        if mapped {
            return self.mapped.as_mut().map(MappedPages::read).transpose();
        }
        self.mapped = None;
        let Some(Found { block, page, kind }) = self.find()? else { return Ok(None) };
        let reader = &mut self.items.reader;
        let content = match kind {
            Kind::Data => {
                PageContent::Data(reader.take(Phase::Active, "a page", self.recording.page_size.bytes())?)
            }
            Kind::Xbzrle(len) => {
                PageContent::Xbzrle(reader.take(Phase::Active, "an xbzrle record", len.into())?)
            }
            Kind::Compressed(len) => {
                let len = usize::try_from(len).map_err(|_| invalid(Phase::Active, format!("{len} bytes")))?;
                let stream = reader.take(Phase::Active, "a compressed page", len)?;
                compressed::inflate(stream, &mut self.inflated, || format!("page {page} of block {block}"))?;
                PageContent::Data(&self.inflated)
            }
            Kind::Zero => PageContent::Zero { pages: 1 },
        };
        Ok(Some(PageRecord { block, page, content }))
    }

    /// Reads up to the next record that is of a page.
    fn find(&mut self) -> Result<Option<Found>> {
        loop {
            match self.place {
                Place::Ram => match self.record()? {
                    Some(found) => return Ok(Some(found)),
                    None => {
                        self.items.ram_footer()?;
                        self.place = Place::Items;
                    }
                },
                Place::Items => match self.items.next()? {
                    Next::RamPiece => self.place = Place::Ram,
                    Next::RamStart(_) | Next::End => self.place = Place::End,
                },
                Place::End => return Ok(None),
            }
        }
    }

    /// The next record of this piece of RAM; `None` at its end.
    fn record(&mut self) -> Result<Option<Found>> {
        loop {
            let page = self.recording.page_size;
            let position = self.items.reader.position();
            let parse = |bytes: &[u8]| RamRecord::parse(bytes, page);
            let (offset, block, kind) = match self.items.reader.next(Phase::Active, "a RAM record", parse)? {
                RamRecord::EndOfSection => return Ok(None),
                // A sync point of channels that this stream does not have.
                RamRecord::Flush => continue,
                RamRecord::Page { offset, block } => (offset, block, Kind::Data),
                RamRecord::Xbzrle { offset, block, len } => (offset, block, Kind::Xbzrle(len)),
                RamRecord::Compressed { offset, block, len } => (offset, block, Kind::Compressed(len)),
                RamRecord::Zero { offset, block } => (offset, block, Kind::Zero),
                RamRecord::MemSize { .. } => {
                    return Err(invalid(
                        Phase::Active,
                        format!("a second list of RAM blocks at byte {position}"),
                    ));
                }
            };
            let block = self.block(block, offset, position)?;
            return Ok(Some(Found { block, page: offset / page.bytes_u64(), kind }));
        }
    }

    /// The block of a record, which must have a page at `offset`.
    fn block(&mut self, block: BlockRef, offset: u64, position: u64) -> Result<usize> {
        let at =
            |what: &str| invalid(Phase::Active, format!("the RAM record at byte {position} is of {what}"));
        if self.recording.is_mapped() {
            return Err(at("a page, in a stream with mapped-ram"));
        }
        let index = match &block {
            BlockRef::Named(name) => *self
                .by_name
                .get(name)
                .ok_or_else(|| at(&format!("block {name}, which is not in the list")))?,
            BlockRef::Same => {
                self.last_block.ok_or_else(|| at("the same block as before, but it is the first"))?
            }
        };
        self.last_block = Some(index);
        match self.recording.blocks.get(index) {
            Some(entry) if offset < entry.used_len => Ok(index),
            Some(entry) => Err(at(&format!(
                "offset {offset:#x} in block {}, which has {:#x} bytes",
                entry.name, entry.used_len
            ))),
            None => Err(at("no block")),
        }
    }
}
