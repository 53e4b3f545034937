//! A named, contiguous piece of guest memory.

use std::collections::HashSet;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use multifd_codecs::zero;
use multifd_wire::{BlockName, PageSize};
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap, VolatileSlice};

use super::mappings::Protection;
use super::{HostMemory, Mappings};
use crate::error::{Error, ErrorKind, Phase};

/// Bytes in a target page. x86 guests have no other; the wire allows more.
pub const PAGE: usize = 4096;

/// The same, as the wire wants it.
pub(crate) const PAGE_SIZE: PageSize = PageSize::K4;

/// How much of a page is looked at before the whole of it is copied to be scanned: most pages show
/// a set bit here.
const FIRST_LOOK: usize = 64;

/// A RAMBlock: a name that both ends know, and the memory behind it.
#[derive(Clone, Debug)]
pub struct RamBlock {
    name: BlockName,
    memory: HostMemory,
    /// Shared by clones: what one attempt has written to is fresh for none of them.
    fresh: Arc<AtomicBool>,
    host_page: Option<usize>,
}

impl RamBlock {
    /// A block over all of `memory`, which must begin at a page and be a whole number of pages, at
    /// least one: a migration refuses other blocks by name before it connects.
    pub fn new(name: BlockName, memory: HostMemory) -> Self {
        Self { name, memory, fresh: Arc::default(), host_page: None }
    }

    /// One block for each region of a VMM's guest memory, named by its guest physical address:
    /// `ram@0x100000000`.
    ///
    /// # Errors
    /// As [`HostMemory::from_region`]; `InvalidInput` for a region that is not a whole number of
    /// pages.
    pub fn of_guest_memory<B>(memory: &GuestMemoryMmap<B>) -> io::Result<Vec<Self>>
    where
        B: Bitmap + Send + Sync + 'static,
    {
        let block = |region: &GuestRegionMmap<B>| {
            let name = format!("ram@{:#x}", region.start_addr().0);
            let name = BlockName::try_from(name.as_str()).map_err(io::Error::other)?;
            let block = Self::new(name, HostMemory::from_region(region.get_mmap())?);
            block.check().map_err(|wrong| io::Error::new(io::ErrorKind::InvalidInput, wrong))?;
            Ok(block)
        };
        memory.iter().map(block).collect()
    }

    /// Says that the memory is known to be zero now (a new file, fresh anonymous memory), so that a
    /// destination need not look at pages that are announced as zero. It holds for one attempt: the
    /// first that receives into this block or a clone of it.
    #[must_use]
    pub fn fresh(mut self) -> Self {
        self.fresh = Arc::new(AtomicBool::new(true));
        self
    }

    /// Says how many bytes a page of the destination's kernel has behind this block, where that is
    /// not as it is here: a checkpoint that goes to memory of huge pages. For a post-copy, which
    /// moves such pages whole.
    #[must_use]
    pub fn with_host_page_size(mut self, bytes: usize) -> Self {
        self.host_page = Some(bytes);
        self
    }

    /// Bytes in a page of the kernel's: 4096, or more for huge pages.
    pub fn host_page_size(&self) -> usize {
        self.host_page.unwrap_or(self.memory.host_page_size())
    }

    /// The name on the wire (idstr).
    pub fn name(&self) -> &BlockName {
        &self.name
    }

    /// The memory behind it.
    pub fn memory(&self) -> &HostMemory {
        &self.memory
    }

    /// Says what keeps the block from migrating: all of it must be pages, since a destination has
    /// no others.
    pub(crate) fn check(&self) -> Result<(), String> {
        let (name, len, address) = (&self.name, self.memory.len(), self.memory.address());
        match len % PAGE {
            _ if len < PAGE => {
                Err(format!("RAM block {name} has {len} bytes, expected at least one page of {PAGE}"))
            }
            0 if address.is_multiple_of(PAGE as u64) => Ok(()),
            0 => Err(format!("RAM block {name} begins at {address:#x}, expected a multiple of {PAGE}")),
            over => Err(format!(
                "RAM block {name} has {len} bytes, expected whole pages of {PAGE}: the last {over} would be lost"
            )),
        }
    }

    /// The same for all blocks of a guest, of which no two may have one name.
    pub(crate) fn check_all(blocks: &[Self]) -> Result<(), String> {
        let mut names = HashSet::with_capacity(blocks.len());
        for block in blocks {
            block.check()?;
            if !names.insert(block.name()) {
                return Err(format!("two RAM blocks are called {}", block.name()));
            }
        }
        Ok(())
    }

    /// Whole pages.
    pub fn pages(&self) -> usize {
        self.memory.len() / PAGE
    }

    /// Bytes that migrate (used_length).
    pub fn used_len(&self) -> u64 {
        (self.pages() * PAGE) as u64
    }

    /// Whether the memory is fresh. It is not any more after the first call.
    pub(crate) fn take_fresh(&self) -> bool {
        self.fresh.swap(false, Ordering::Relaxed)
    }

    /// Firmware is in a destination's memory before anything arrives: its zero pages must be
    /// written, not assumed.
    ///
    /// QEMU's names for such blocks: `pc.bios`, `pc.rom`, `vga.rom`, `/rom@etc/acpi/tables`, ...
    pub(crate) fn is_firmware(&self) -> bool {
        let name = self.name.as_str();
        name.starts_with("/rom@")
            || name.ends_with(".rom")
            || name.ends_with(".bios")
            || name.contains("flash")
    }

    /// The page that starts at `offset`, if that is the start of a page of this block.
    pub(crate) fn page_at(&self, offset: u64) -> Option<usize> {
        let offset = usize::try_from(offset).ok()?;
        (offset.is_multiple_of(PAGE) && offset / PAGE < self.pages()).then_some(offset / PAGE)
    }

    /// A run of pages; `None` if it is not inside.
    pub(crate) fn run(&self, first: usize, pages: usize) -> Option<VolatileSlice<'_>> {
        self.memory.slice(first.checked_mul(PAGE)?, pages.checked_mul(PAGE)?)
    }

    /// Copies a page out as it is now. False if it is outside of the block, cannot be read, or
    /// `into` is not exactly one page.
    #[must_use]
    pub fn read_page(&self, page: usize, into: &mut [u8]) -> bool {
        page < self.pages() && into.len() == PAGE && self.memory.read(page * PAGE, into).is_ok()
    }

    /// True if the page can be read through its mapping.
    pub(crate) fn can_be_read(&self, page: usize) -> bool {
        self.memory.populate_to_read(page * PAGE, PAGE).is_ok()
    }

    /// True if the page can be written through its mapping.
    pub(crate) fn can_be_written(&self, page: usize) -> bool {
        self.memory.populate_to_write(page * PAGE, PAGE).is_ok()
    }

    /// The same as `read_page` by plain loads, which must be known not to fault.
    #[must_use]
    pub(crate) fn load_page(&self, page: usize, into: &mut [u8; PAGE]) -> bool {
        page < self.pages() && self.memory.load(page * PAGE, into)
    }

    /// True if every byte of the page is zero. Looks at private copies: the guest may write
    /// meanwhile. Loads must be known not to fault.
    pub(crate) fn is_zero(&self, page: usize) -> bool {
        let mut copy = [0_u8; PAGE];
        let (head, _) = copy.split_at_mut(FIRST_LOOK);
        self.memory.load(page * PAGE, head)
            && zero::is_zero(head)
            && self.memory.load(page * PAGE, &mut copy)
            && zero::is_zero(&copy)
    }

    /// Says why these pages could not be read or written.
    pub(crate) fn fault(&self, doing: &str, pages: Range<usize>, cause: io::Error) -> Error {
        let mappings = Mappings::read().ok();
        let around = mappings.as_ref().and_then(|mappings| mappings.around(self, pages.start));
        let is_fault = cause.raw_os_error() == Some(libc::EFAULT);
        let (pages, why) = match around {
            _ if cause.raw_os_error() == Some(libc::EHWPOISON) => {
                (pages, "the machine has lost them (poisoned)")
            }
            _ if !is_fault => (pages, "the kernel refused"),
            None if mappings.is_some() => (pages, "they are not mapped"),
            Some((part, Protection { read: false, .. })) => {
                (part, "they are mapped without access (PROT_NONE)")
            }
            Some((part, Protection { write: false, .. })) if doing != READING => {
                (part, "they are mapped for reading only")
            }
            _ => (pages, "no room behind them, or the end of their file is before them"),
        };
        let range = match pages.len() {
            1 => format!("page {}", pages.start),
            _ => format!("pages {}..{}", pages.start, pages.end),
        };
        Error::new(
            ErrorKind::GuestMemory,
            Phase::Active,
            format!("{doing} {range} of RAM block {}: {why}", self.name),
        )
        .because(cause)
    }
}

/// What the source does to guest memory, in an error's words.
pub(crate) const READING: &str = "reading";

#[cfg(test)]
mod tests {
    use vm_memory::{GuestAddress, MmapRegion};

    use super::*;

    fn block(name: &str, bytes: usize) -> RamBlock {
        let region = MmapRegion::<()>::new(bytes).unwrap();
        RamBlock::new(name.try_into().unwrap(), HostMemory::from_region(Arc::new(region)).unwrap())
    }

    #[test]
    fn a_block_that_is_not_whole_pages_is_refused_by_name() {
        block("ram", PAGE).check().unwrap();
        let wrong = block("small", PAGE - 1).check().unwrap_err();
        assert_eq!(wrong, "RAM block small has 4095 bytes, expected at least one page of 4096");
        let wrong = block("ram", 16 * PAGE + 100).check().unwrap_err();
        let text = "RAM block ram has 65636 bytes, expected whole pages of 4096: the last 100 would be lost";
        assert_eq!(wrong, text);
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 3 * PAGE + 1)]).unwrap();
        let error = RamBlock::of_guest_memory(&memory).unwrap_err();
        assert!(error.to_string().contains("ram@0x0 has 12289 bytes"), "{error}");
    }

    #[test]
    fn two_blocks_of_one_name_are_refused() {
        let wrong = RamBlock::check_all(&[block("a", PAGE), block("b", PAGE), block("a", PAGE)]).unwrap_err();
        assert_eq!(wrong, "two RAM blocks are called a");
    }
}
