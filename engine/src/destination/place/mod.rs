//! Guest memory that pages arrive in: the announced blocks, and the ways to put a page in its
//! place.

mod digest;
mod file;
mod fresh;
mod mapping;
mod page_bits;
mod sinks;
mod userfault;

use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, OnceLock};

use multifd_codecs::xbzrle;
use multifd_wire::DiscardRange;

use crate::error::{Error, ErrorKind, Phase, Result};
use crate::guest::{Absent, Found, PAGE, PageTable, READING, RamBlock, hash, zero_hash};
use crate::stream::compressed;
use digest::KeptDigests;
use page_bits::PageBits;

pub use digest::DigestsDiffer;
pub(crate) use file::FileWriter;
pub use fresh::FreshRam;
pub(crate) use mapping::Mapping;
pub(crate) use sinks::BlockSinks;
pub(super) use sinks::Gap;
pub use sinks::IncomingRam;
use userfault::PagedBlock;
pub(crate) use userfault::{Pager, Wanted};

/// A way to put whole pages in their place. To the guest a page is there when the call returns, and
/// not before.
pub(crate) trait PlacePages {
    /// Stores `content` at byte `offset` of the block. `present`: whether all of these pages have
    /// been written before.
    fn place(
        &self,
        block: &RamBlock,
        offset: usize,
        content: &[u8],
        present: impl FnOnce() -> bool,
    ) -> io::Result<()>;
}

/// The better way to place pages in a block at this moment.
pub(crate) enum Place<'s> {
    Mapping(Mapping),
    File(FileWriter<'s>),
}

/// One block and what is known of its pages.
pub(crate) struct BlockSink {
    block: RamBlock,
    /// What nothing was written to is zero.
    fresh: bool,
    /// Pages that the source has sent, or said to be zero.
    came: PageBits,
    /// Pages that have come since the last round that was told of as arrived, if the link may be
    /// replaced.
    recent: OnceLock<PageBits>,
    /// Pages that something was written to since the block was opened, so that they are there.
    written: PageBits,
    /// Locked by the one thread that writes through the block's file.
    file_turn: Mutex<()>,
    /// Mapped for reading only: written through its file.
    read_only: bool,
    /// What its pages are that the page table does not have.
    absent: Absent,
    page_table: Arc<PageTable>,
    /// From LISTEN on, if a guest waits for pages.
    paged: OnceLock<PagedBlock>,
    /// Of the pages that were placed, if they are kept.
    digests: OnceLock<KeptDigests>,
}

const ZEROS: [u8; PAGE] = [0; PAGE];

impl PlacePages for Place<'_> {
    fn place(
        &self,
        block: &RamBlock,
        offset: usize,
        content: &[u8],
        present: impl FnOnce() -> bool,
    ) -> io::Result<()> {
        self.place_parts(block, offset, &[content], present)
    }
}

impl Place<'_> {
    /// As [`PlacePages::place`], for content that lies in several places.
    fn place_parts(
        &self,
        block: &RamBlock,
        offset: usize,
        parts: &[&[u8]],
        present: impl FnOnce() -> bool,
    ) -> io::Result<()> {
        match self {
            Self::Mapping(mapping) => mapping.place_parts(block, offset, parts, present),
            Self::File(file) => file.place_parts(block, offset, parts),
        }
    }
}

impl BlockSink {
    /// The block, and how it is mapped here.
    fn new(block: &RamBlock, read_only: bool, absent: Absent, page_table: &Arc<PageTable>) -> Self {
        Self {
            block: block.clone(),
            fresh: block.take_fresh(),
            written: PageBits::new(block.pages()),
            came: PageBits::new(block.pages()),
            recent: OnceLock::new(),
            file_turn: Mutex::default(),
            read_only,
            absent,
            page_table: Arc::clone(page_table),
            paged: OnceLock::new(),
            digests: OnceLock::new(),
        }
    }

    /// `None` if every page has come.
    fn gap(&self) -> Option<Gap> {
        let (pages, first) = self.came.missing();
        let name = self.block.name().as_str();
        Some(Gap {
            block: name.to_owned(),
            pages,
            of: self.block.pages(),
            first: first?,
            is_firmware: self.block.is_firmware(),
        })
    }

    pub(crate) fn block(&self) -> &RamBlock {
        &self.block
    }

    /// The page at `offset` of the block.
    pub(crate) fn page_at(&self, offset: u64) -> Result<usize> {
        self.block.page_at(offset).ok_or_else(|| {
            let (name, len) = (self.block.name(), self.block.used_len());
            Error::misbehaved(
                Phase::Active,
                format!(
                    "offset {offset:#x} in RAM block {name}: pages of {PAGE} bytes below {len:#x} are there"
                ),
            )
        })
    }

    /// Tries to become the one thread that writes through the block's file. `None` if the block has
    /// no shared file, or another thread is that already.
    ///
    /// To make fresh pages by a write costs less than by page faults, a copy of the bytes included.
    /// But the kernel lets only one write at a time into a file, and has the others spin: they are
    /// better off with the mapping.
    pub(crate) fn try_file_writer(&self) -> Option<FileWriter<'_>> {
        self.block.memory().shared_file()?;
        self.file_turn.try_lock().ok().map(FileWriter::alone)
    }

    /// How pages that are in a buffer are placed with the least work.
    pub(crate) fn best_place(&self) -> Place<'_> {
        match self.try_file_writer() {
            Some(writer) => Place::File(writer),
            None if self.read_only => Place::File(FileWriter::beside_others()),
            None => Place::Mapping(Mapping),
        }
    }

    /// True if nothing has been written to the page at `offset` since the block was fresh.
    pub(crate) fn is_untouched(&self, offset: u64) -> bool {
        self.block.page_at(offset).is_some_and(|page| !self.written.test(page))
    }

    /// True if no store, neither ours nor the kernel's, may go to the mapping.
    pub(crate) fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// The kernel has written these pages by itself.
    ///
    /// Never before it has: a thread that sees a page marked takes it for present, and a store to
    /// one that is not may be the end of the process.
    pub(crate) fn note_written(&self, first: usize, pages: usize) {
        self.written.set_range(first, pages);
        self.note_come(first, pages);
    }

    fn note_come(&self, first: usize, pages: usize) {
        self.came.set_range(first, pages);
        if let Some(recent) = self.recent.get() {
            recent.set_range(first, pages);
        }
    }

    /// Writes pages that lie apart in memory, from `first` on.
    pub(crate) fn write_parts(&self, first: usize, parts: &[&[u8]]) -> Result<()> {
        let pages = first..first + parts.len();
        let present = || self.written.all(pages.clone());
        self.best_place()
            .place_parts(&self.block, first * PAGE, parts, present)
            .map_err(|error| self.fault("writing", pages.clone(), error))?;
        self.note_written(first, parts.len());
        if !self.keeps_digests() {
            return Ok(());
        }
        self.note(first, parts.len(), parts.iter().map(|part| hash(part)))
    }

    /// Writes whole pages from `first` on.
    pub(crate) fn write(&self, first: usize, content: &[u8], place: &impl PlacePages) -> Result<()> {
        if !self.keeps_digests() {
            return self.store(first, content, place);
        }
        let hashes: Vec<u64> = content.chunks_exact(PAGE).map(hash).collect();
        self.write_hashed(first, content, &hashes, place)
    }

    /// Writes whole pages from `first` on, whose hashes are known.
    pub(crate) fn write_hashed(
        &self,
        first: usize,
        content: &[u8],
        hashes: &[u64],
        place: &impl PlacePages,
    ) -> Result<()> {
        self.store(first, content, place)?;
        self.note(first, content.len() / PAGE, hashes.iter().copied())
    }

    fn store(&self, first: usize, content: &[u8], place: &impl PlacePages) -> Result<()> {
        let pages = first..first + content.len() / PAGE;
        let present = || self.written.all(pages.clone());
        place
            .place(&self.block, first * PAGE, content, present)
            .map_err(|error| self.fault("writing", pages.clone(), error))?;
        self.note_written(pages.start, pages.len());
        Ok(())
    }

    /// Pages that have come are as if they had not: they are stale, or were never sent.
    pub(crate) fn discard(&self, range: DiscardRange) -> Result<()> {
        let DiscardRange { offset, len } = range;
        let pages = || {
            let first = self.block.page_at(offset)?;
            let last = self.block.page_at(offset.checked_add(len)?.checked_sub(PAGE as u64)?)?;
            (first <= last).then_some(first..last + 1)
        };
        let pages = pages().ok_or_else(|| {
            let (name, end) = (self.block.name(), self.block.used_len());
            let detail = format!(
                "a discard of {len:#x} bytes at {offset:#x} in RAM block {name}: expected pages of {PAGE} bytes below {end:#x}"
            );
            Error::misbehaved(Phase::Device, detail)
        })?;
        self.came.clear_range(pages.start, pages.len());
        Ok(())
    }

    /// True if the page has come.
    pub(crate) fn has_come(&self, page: usize) -> bool {
        self.came.test(page)
    }

    /// Runs of pages that have not come, each of whole groups of `group` pages.
    fn missing(&self, group: usize) -> Result<Vec<Range<usize>>> {
        let gaps = self.came.gaps(group);
        let first = |pages: &Range<usize>| pages.clone().find(|page| self.came.test(*page));
        let partial = gaps.iter().filter(|_| group > 1).find_map(first);
        let after = |page: &usize| !self.came.all(*page..(*page + group).min(self.block.pages()));
        let hosts = (0..self.block.pages()).step_by(group).filter(|page| group > 1 && self.came.test(*page));
        let Some(page) = partial.or_else(|| hosts.into_iter().find(after)) else { return Ok(gaps) };
        let detail = format!(
            "only a part of the {group} pages around page {page} of RAM block {} is here, and not discarded",
            self.block.name()
        );
        Err(Error::misbehaved(Phase::Device, detail))
    }

    /// From now on a pager fills the block.
    fn page_by(&self, paged: PagedBlock) -> Result<()> {
        self.paged.set(paged).map_err(|_| Error::bug(Phase::Device, "a block that is paged twice"))
    }

    fn paged(&self) -> Result<&PagedBlock> {
        self.paged.get().ok_or_else(|| Error::bug(Phase::Active, "a block that no pager fills"))
    }

    /// Which pages have come: a bit a page, from the lowest of each byte on, in words of 8 bytes.
    pub(crate) fn received(&self) -> Vec<u8> {
        self.came.to_bytes()
    }

    /// The same of those that have come since the last round that was told of as arrived.
    pub(crate) fn recent(&self) -> Vec<u8> {
        let none = || PageBits::new(self.block.pages()).to_bytes();
        self.recent.get().map_or_else(none, PageBits::to_bytes)
    }

    /// Makes pages zero. Memory that is zero already is left alone, so that holes stay holes.
    pub(crate) fn clear(&self, pages: impl IntoIterator<Item = usize>) -> Result<()> {
        let untouched = |page: &usize| self.fresh && !self.written.test(*page);
        let all: Vec<usize> = pages.into_iter().collect();
        all.iter().try_for_each(|page| self.note(*page, 1, [zero_hash()]))?;
        // A peer announces them in any order.
        let (blank, mut pages): (Vec<usize>, Vec<usize>) = all.into_iter().partition(untouched);
        pages.sort_unstable();
        let mut found = Found::default();
        self.page_table
            .look(&self.block, self.absent, &pages, &mut found)
            .map_err(|bad| self.fault(READING, bad.page..bad.page + 1, bad.cause))?;
        for (page, zero) in pages.iter().zip(found.zeros()) {
            if !zero && !self.block.is_zero(*page) {
                self.store(*page, &ZEROS, &self.best_place())?;
            }
        }
        // Not before: another thread may wait for the last page to have come.
        blank.iter().chain(&pages).for_each(|page| self.note_come(*page, 1));
        Ok(())
    }

    /// Applies an xbzrle difference to what is there.
    pub(crate) fn apply(&self, page: usize, delta: &[u8]) -> Result<()> {
        let mut content = ZEROS;
        if !self.fresh || self.written.test(page) {
            let read = self.block.memory().read(page * PAGE, &mut content);
            read.map_err(|error| self.fault(READING, page..page + 1, error))?;
        }
        xbzrle::decode(delta, &mut content).map_err(|error| {
            let detail = format!("xbzrle record for page {page} of RAM block {}", self.block.name());
            Error::new(ErrorKind::Codec, Phase::Active, detail).because(error)
        })?;
        self.write(page, &content, &self.best_place())
    }

    /// Writes a page that is a zlib stream of its own.
    pub(crate) fn inflate(&self, page: usize, stream: &[u8]) -> Result<()> {
        let mut content = ZEROS;
        let name = || format!("page {page} of RAM block {}", self.block.name());
        compressed::inflate(stream, &mut content, name)?;
        self.write(page, &content, &self.best_place())
    }

    /// Says why the pages could not be read or written.
    pub(crate) fn fault(&self, doing: &str, pages: Range<usize>, error: io::Error) -> Error {
        self.block.fault(doing, pages, error)
    }
}
