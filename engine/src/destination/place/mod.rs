//! Where arriving pages land: the announced blocks, and the rules by which a page is written or cleared.

use std::collections::HashMap;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

use multifd_codecs::xbzrle;
use multifd_wire::{BlockEntry, BlockName, Configuration};

use crate::error::{Error, ErrorKind, Phase, Result};
use crate::guest::{Absent, DirtyBitmap, Found, Mappings, PAGE, PageTable, READING, RamBlock};

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
    /// Pages that the source has sent, or said to be zero.
    came: PageBits,
    /// Pages that something was written to since the block was opened, so that they are there.
    written: PageBits,
    way: Mutex<()>,
    /// Mapped for reading only: written through its file.
    read_only: bool,
    /// What its pages are that the page table does not have.
    absent: Absent,
    page_table: Arc<PageTable>,
}

/// A block of which pages never came.
#[derive(Debug, PartialEq, Eq)]
pub(in crate::destination) struct Gap {
    pub(in crate::destination) block: String,
    /// Pages that never came, of how many, and the first of them.
    pub(in crate::destination) pages: usize,
    pub(in crate::destination) of: usize,
    pub(in crate::destination) first: usize,
    /// Firmware, of which nothing is ever left out.
    pub(in crate::destination) is_firmware: bool,
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
    /// Checks that `blocks` are what was announced: the same names, the same lengths, and can be written.
    pub(crate) fn new(announced: &[BlockEntry], blocks: &[RamBlock]) -> Result<Self> {
        let mut by_name = HashMap::with_capacity(announced.len());
        let mappings = Mappings::read()
            .inspect_err(|error| tracing::warn!(%error, "how guest memory is mapped cannot be seen"))
            .ok();
        let page_table = Arc::new(PageTable::of_this_process());
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
            let landing = Landing {
                block: block.clone(),
                written: PageBits::new(block.pages()),
                came: PageBits::new(block.pages()),
                way: Mutex::default(),
                read_only: is_read_only(mappings.as_ref(), block)?,
                absent: mappings.as_ref().map_or(Absent::Unknown, |mappings| mappings.absent(block)),
                page_table: Arc::clone(&page_table),
            };
            by_name.insert(entry.name.clone(), Arc::new(landing));
        }
        Ok(Self(by_name))
    }

    pub(crate) fn find(&self, name: &str) -> Result<&Arc<Landing>> {
        let unknown = || Error::misbehaved(Phase::Active, format!("page for unknown RAM block {name:?}"));
        self.0.get(name).ok_or_else(unknown)
    }

    /// Blocks of which pages never came, by name.
    pub(in crate::destination) fn gaps(&self) -> Vec<Gap> {
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

    fn all(&self, mut pages: Range<usize>) -> bool {
        pages.all(|page| self.test(page))
    }

    fn test(&self, page: usize) -> bool {
        let part = self.parts.get(page / PART_PAGES).and_then(OnceLock::get);
        part.is_some_and(|part| part.test(page % PART_PAGES))
    }
}

impl Landing {
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

    /// True if no store, neither ours nor the kernel's, may go to the mapping.
    pub(crate) fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// The kernel has written these pages by itself.
    ///
    /// Never before it has: who sees a page marked takes it for present, and a store to one that is not may be the end of the
    /// process.
    pub(crate) fn note_written(&self, first: usize, pages: usize) {
        self.written.set_range(first, pages);
        self.came.set_range(first, pages);
    }

    /// Writes whole pages from `first` on, through the file or through the mapping.
    pub(crate) fn write(&self, first: usize, content: &[u8], way: Option<&Way<'_>>) -> Result<()> {
        let pages = first..first + content.len() / PAGE;
        let (memory, offset) = (self.block.memory(), first * PAGE);
        let stored = match way {
            _ if self.read_only => memory.store(offset, content),
            Some(_) => memory.store(offset, content),
            None if self.written.all(pages.clone()) => memory.store_present(offset, content),
            None => memory.store_mapped(offset, content),
        };
        stored.map_err(|error| self.fault("writing", pages.clone(), error))?;
        self.note_written(pages.start, pages.len());
        Ok(())
    }

    /// Makes pages zero. Memory that is zero already is left alone, so that holes stay holes.
    pub(crate) fn clear(&self, pages: impl IntoIterator<Item = usize>) -> Result<()> {
        let untouched = |page: usize| self.block.is_fresh() && !self.written.test(page);
        let came = pages.into_iter().inspect(|page| self.came.set_range(*page, 1));
        let mut pages: Vec<usize> = came.filter(|page| !untouched(*page)).collect();
        // A peer announces them in any order.
        pages.sort_unstable();
        let mut found = Found::default();
        self.page_table
            .look(&self.block, self.absent, &pages, &mut found)
            .map_err(|bad| self.fault(READING, bad.page..bad.page + 1, bad.cause))?;
        for (page, zero) in pages.iter().zip(found.zeros()) {
            if !zero && !self.block.is_zero(*page) {
                self.write(*page, &ZEROS, self.way_through_file().as_ref())?;
            }
        }
        Ok(())
    }

    /// Applies an xbzrle difference to what is there.
    pub(crate) fn apply(&self, page: usize, delta: &[u8]) -> Result<()> {
        let mut content = ZEROS;
        if !self.block.is_fresh() || self.written.test(page) {
            let read = self.block.memory().read(page * PAGE, &mut content);
            read.map_err(|error| self.fault(READING, page..page + 1, error))?;
        }
        xbzrle::decode(delta, &mut content).map_err(|error| {
            let detail = format!("xbzrle record for page {page} of RAM block {}", self.block.name());
            Error::new(ErrorKind::Codec, Phase::Active, detail).because(error)
        })?;
        self.write(page, &content, self.way_through_file().as_ref())
    }

    /// Says why the pages could not be read or written.
    pub(crate) fn fault(&self, doing: &str, pages: Range<usize>, error: io::Error) -> Error {
        self.block.fault(doing, pages, error)
    }
}

/// A block that is mapped for reading only is written through its file, if that is the same memory.
fn is_read_only(mappings: Option<&Mappings>, block: &RamBlock) -> Result<bool> {
    let Some(pages) = mappings.and_then(|mappings| mappings.read_only(block)) else { return Ok(false) };
    if block.memory().file_is_writable() {
        return Ok(true);
    }
    let detail = format!(
        "pages {}..{} of RAM block {} are mapped for reading only, and no file open for writing is shared with them; map \
         them for writing until the guest has arrived",
        pages.start,
        pages.end,
        block.name()
    );
    Err(Error::new(ErrorKind::GuestMemory, Phase::Setup, detail))
}

fn incompatible(detail: String) -> Error {
    Error::incompatible(Phase::Setup, detail)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::HostMemory;

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
    /// Shared memory on a file system of that many bytes, which no other thread sees. `None`: this process may not mount.
    #[expect(unsafe_code, reason = "mounting has no safe wrapper")]
    fn on_small_file_system(bytes: usize, pages: usize) -> Option<RamBlock> {
        let directory = tempfile::tempdir().unwrap();
        let path = std::ffi::CString::new(directory.path().to_str().unwrap()).unwrap();
        let size = std::ffi::CString::new(format!("size={bytes}")).unwrap();
        let none = std::ptr::null();
        // SAFETY: takes no pointer; it is this thread that gets mounts of its own.
        let apart = unsafe { libc::unshare(libc::CLONE_NEWNS) } == 0;
        // SAFETY: all pointers are C strings or null.
        let private = apart
            && unsafe {
                libc::mount(none, c"/".as_ptr(), none, libc::MS_REC | libc::MS_PRIVATE, none.cast())
            } == 0;
        // SAFETY: as above.
        let mounted = private
            && unsafe {
                libc::mount(c"tmpfs".as_ptr(), path.as_ptr(), c"tmpfs".as_ptr(), 0, size.as_ptr().cast())
            } == 0;
        if !mounted {
            return None;
        }
        let path = directory.path().join("ram");
        let file = std::fs::File::options().read(true).write(true).create_new(true).open(path).unwrap();
        file.set_len((pages * PAGE) as u64).unwrap();
        Some(RamBlock::new("ram".try_into().unwrap(), HostMemory::map_file(file, pages * PAGE).unwrap()))
    }

    fn landing(block: &RamBlock) -> Arc<Landing> {
        let entry = BlockEntry {
            name: block.name().clone(),
            used_len: block.used_len(),
            page_size: None,
            guest_address: None,
            mapped_ram: None,
        };
        let landings = Landings::new(&[entry], std::slice::from_ref(block)).unwrap();
        Arc::clone(landings.find("ram").unwrap())
    }

    /// A difference that makes the first byte of a zero page 7.
    const DELTA: [u8; 3] = [0, 1, 7];

    /// A read of a hole through the mapping would have to fill it.
    #[test]
    fn a_hole_of_a_full_file_system_is_read_and_its_difference_refused() {
        let Some(block) = on_small_file_system(16 * PAGE, 64) else {
            eprintln!("skipped: this process may not mount");
            return;
        };
        for block in [block.clone(), block.fresh()] {
            let landing = landing(&block);
            let mut first = 0;
            while landing.write(first, &[1; PAGE], None).is_ok() {
                first += 1;
            }
            assert!((1..64).contains(&first));
            landing.clear([63, 62]).unwrap();
            let error = landing.apply(63, &DELTA).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::GuestMemory, "{}", error.chain());
            landing.apply(0, &DELTA).unwrap();
            landing.clear([first - 1]).unwrap();
            assert!(block.is_zero(first - 1));
        }
    }
}
