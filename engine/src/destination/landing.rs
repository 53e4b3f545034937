//! Where arriving pages land: the announced blocks, and the rules by which a page is written or cleared.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

use multifd_codecs::xbzrle;
use multifd_wire::{BlockEntry, BlockName, Configuration};

use crate::error::{Error, ErrorKind, Phase, Result};
use crate::ram::{DirtyBitmap, PAGE, RamBlock};

/// Who provides the memory for the blocks that a source announces.
///
/// Called once, on the receiving thread, before any page arrives. Return exactly one block for each entry, in any order, with
/// the entry's name and length; refuse what does not fit your machine with an error of your own.
///
/// A `Vec<RamBlock>` is the provider of a VMM whose memory is there already.
pub trait IncomingRam: Send {
    /// Memory for `announced`. Lengths are whole pages; names are unique; the sum is bounded by the peer's word only, so
    /// map lazily.
    ///
    /// # Errors
    /// Whatever makes this machine unfit for these blocks.
    fn open(
        &mut self,
        configuration: &Configuration,
        announced: &[BlockEntry],
    ) -> Result<Vec<RamBlock>, Box<dyn std::error::Error + Send + Sync>>;
}

impl IncomingRam for Vec<RamBlock> {
    fn open(
        &mut self,
        _configuration: &Configuration,
        _announced: &[BlockEntry],
    ) -> Result<Self, Box<dyn std::error::Error + Send + Sync>> {
        Ok(self.clone())
    }
}

/// One block and what is known of its pages.
pub(crate) struct Landing {
    block: RamBlock,
    /// Pages that something was written to since the block was fresh. Unused for memory that was not.
    written: PageBits,
    /// Pages that the source has sent, or said to be zero.
    came: PageBits,
    way: Mutex<()>,
}

/// A block of which pages never came.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Gap {
    pub(super) block: String,
    /// Pages that never came, of how many, and the first of them.
    pub(super) pages: usize,
    pub(super) of: usize,
    pub(super) first: usize,
    /// Firmware, of which nothing is ever left out.
    pub(super) is_firmware: bool,
}

/// Whoever has it may write through the block's file.
pub(crate) struct Way<'l>(#[expect(dead_code, reason = "held, not read")] MutexGuard<'l, ()>);

/// One bit a page, made where pages arrive: a block is as long as the peer says, and that alone must cost nothing.
struct PageBits {
    pages: usize,
    parts: Box<[OnceLock<DirtyBitmap>]>,
}

/// Pages in a part of [`PageBits`]: 1 GiB of guest, whose bits are 32 KiB.
const PART_PAGES: usize = 1 << 18;

/// All blocks of the migration, by the name on the wire.
pub(crate) struct Landings(HashMap<BlockName, Arc<Landing>>);

const ZEROS: [u8; PAGE] = [0; PAGE];

impl Landings {
    /// Checks that `blocks` are what was announced: the same names, the same lengths.
    pub(crate) fn new(announced: &[BlockEntry], blocks: &[RamBlock]) -> Result<Self> {
        let mut by_name = HashMap::with_capacity(announced.len());
        for entry in announced {
            let Some(block) = blocks.iter().find(|block| *block.name() == entry.name) else {
                return Err(incompatible(format!("RAM block {} is unknown here", entry.name)));
            };
            let here = block.used_len();
            if here != entry.used_len {
                return Err(incompatible(format!(
                    "RAM block {} has {} bytes at the source, {here} here",
                    entry.name, entry.used_len
                )));
            }
            by_name.insert(entry.name.clone(), Arc::new(Landing::new(block)));
        }
        Ok(Self(by_name))
    }

    pub(crate) fn find(&self, name: &str) -> Result<&Arc<Landing>> {
        let unknown = || Error::misbehaved(Phase::Active, format!("page for unknown RAM block {name:?}"));
        self.0.get(name).ok_or_else(unknown)
    }

    /// Blocks of which pages never came, by name.
    pub(super) fn gaps(&self) -> Vec<Gap> {
        let mut gaps: Vec<Gap> = self.0.values().filter_map(|landing| landing.gap()).collect();
        gaps.sort_by(|one, other| one.block.cmp(&other.block));
        gaps
    }
}

impl PageBits {
    fn new(pages: usize) -> Self {
        Self { pages, parts: (0..pages.div_ceil(PART_PAGES)).map(|_| OnceLock::new()).collect() }
    }

    /// Pages without a bit, and the first of them.
    fn missing(&self) -> (usize, Option<usize>) {
        let (mut count, mut first) = (0, None);
        for (number, part) in self.parts.iter().enumerate() {
            let start = number * PART_PAGES;
            let here = PART_PAGES.min(self.pages - start);
            let missing = here - part.get().map_or(0, DirtyBitmap::count).min(here);
            if missing > 0 && first.is_none() {
                first = (start..start + here).find(|page| !self.test(*page));
            }
            count += missing;
        }
        (count, first)
    }

    fn set_range(&self, first: usize, count: usize) {
        let end = first.saturating_add(count);
        let mut page = first;
        while page < end {
            let in_part = (PART_PAGES - page % PART_PAGES).min(end - page);
            let Some(part) = self.parts.get(page / PART_PAGES) else { return };
            part.get_or_init(|| DirtyBitmap::new(PART_PAGES)).set_range(page % PART_PAGES, in_part);
            page += in_part;
        }
    }

    fn test(&self, page: usize) -> bool {
        let part = self.parts.get(page / PART_PAGES).and_then(OnceLock::get);
        part.is_some_and(|part| part.test(page % PART_PAGES))
    }
}

impl Landing {
    fn new(block: &RamBlock) -> Self {
        let bits = || PageBits::new(block.pages());
        Self { written: bits(), came: bits(), way: Mutex::default(), block: block.clone() }
    }

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

    /// The way through the block's file, if there is a file and nobody else is on the way.
    ///
    /// To make fresh pages by a write costs less than by page faults, a copy of the bytes included. But the kernel lets only one
    /// write at a time into a file, and has the others spin: who finds the way taken is better off with the mapping.
    pub(crate) fn way_through_file(&self) -> Option<Way<'_>> {
        self.block.memory().shared_file()?;
        self.way.try_lock().ok().map(Way)
    }

    /// True if nothing has been written to the page at `offset` since the block was fresh.
    pub(crate) fn is_untouched(&self, offset: u64) -> bool {
        self.block.page_at(offset).is_some_and(|page| !self.written.test(page))
    }

    /// The kernel is about to write these pages by itself.
    pub(crate) fn note_written(&self, first: usize, pages: usize) {
        self.written.set_range(first, pages);
        self.came.set_range(first, pages);
    }

    /// Writes whole pages from `first` on, through the file or through the mapping.
    pub(crate) fn write(&self, first: usize, content: &[u8], way: Option<&Way<'_>>) -> Result<()> {
        self.note_written(first, content.len() / PAGE);
        let (memory, offset) = (self.block.memory(), first * PAGE);
        let stored = match way {
            Some(_) => memory.store(offset, content),
            None => memory.store_mapped(offset, content),
        };
        stored.map_err(|error| self.failed("writing", first, error))
    }

    /// Makes the page zero. Memory that is zero already is left alone, so that holes stay holes.
    pub(crate) fn clear(&self, page: usize) -> Result<()> {
        self.came.set_range(page, 1);
        let untouched = self.block.is_fresh() && !self.written.test(page);
        if untouched || self.block.is_zero(page) {
            return Ok(());
        }
        self.block.memory().store(page * PAGE, &ZEROS).map_err(|error| self.failed("clearing", page, error))
    }

    /// Applies an xbzrle difference to what is there.
    pub(crate) fn apply(&self, page: usize, delta: &[u8]) -> Result<()> {
        let mut content = ZEROS;
        if !self.block.read_page(page, &mut content) {
            return Err(self.failed("reading", page, io::ErrorKind::InvalidInput.into()));
        }
        xbzrle::decode(delta, &mut content).map_err(|error| {
            let detail = format!("xbzrle record for page {page} of RAM block {}", self.block.name());
            Error::new(ErrorKind::Codec, Phase::Active, detail).because(error)
        })?;
        self.write(page, &content, self.way_through_file().as_ref())
    }

    fn failed(&self, doing: &str, page: usize, error: io::Error) -> Error {
        let detail = format!("{doing} page {page} of RAM block {}", self.block.name());
        Error::new(ErrorKind::GuestMemory, Phase::Active, detail).because(error)
    }
}

fn incompatible(detail: String) -> Error {
    Error::incompatible(Phase::Setup, detail)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn written_pages_are_known_over_the_parts_borders() {
        let written = PageBits::new(3 * PART_PAGES + 5);
        written.set_range(PART_PAGES - 2, PART_PAGES + 4);
        written.set_range(3 * PART_PAGES + 4, 1);
        let set =
            |page: usize| (PART_PAGES - 2..2 * PART_PAGES + 2).contains(&page) || page == 3 * PART_PAGES + 4;
        for page in (0..3 * PART_PAGES + 10).filter(|page| (page + 3) % PART_PAGES < 9 || page % 1009 == 0) {
            assert_eq!(written.test(page), set(page), "{page}");
        }
    }

    #[test]
    fn what_was_announced_but_never_came_has_no_bits() {
        let written = PageBits::new(usize::MAX >> 24);
        assert!(!written.test(12345) && written.parts.iter().all(|part| part.get().is_none()));
        assert_eq!(written.missing(), (usize::MAX >> 24, Some(0)));
    }

    #[test]
    fn a_page_that_is_missing_is_found_in_the_last_part() {
        let bits = PageBits::new(2 * PART_PAGES + 5);
        bits.set_range(0, 2 * PART_PAGES + 3);
        bits.set_range(2 * PART_PAGES + 4, 1);
        assert_eq!(bits.missing(), (1, Some(2 * PART_PAGES + 3)));
        bits.set_range(2 * PART_PAGES + 3, 1);
        assert_eq!(bits.missing(), (0, None));
    }
}
