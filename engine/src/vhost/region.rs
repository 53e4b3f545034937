//! Where the guest's physical addresses are in its RAM blocks.

use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;

use vhost::VhostUserMemoryRegionInfo;
use vm_memory::bitmap::Bitmap;
use vm_memory::{Address, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::guest::{PAGE, RamBlock};

/// The highest guest address that there can be, and one: x86 has 52 bits. A log for all of it is a
/// file of 128 GiB, of which only what stands for memory is ever touched.
const GUEST_END: u64 = 1 << 52;

/// Guest memory that back-ends may reach: a piece of a RAM block, and where the guest sees it.
#[derive(Clone, Debug)]
pub struct VhostRegion {
    guest_address: GuestAddress,
    block: RamBlock,
    /// Bytes of the block.
    range: Range<u64>,
}

impl VhostRegion {
    /// All of `block`, from `guest_address` on. A vhost-user back-end needs memory that it can
    /// share ([`HostMemory::map_file`](crate::HostMemory::map_file)).
    pub fn new(guest_address: GuestAddress, block: &RamBlock) -> Self {
        Self { guest_address, block: block.clone(), range: 0..block.used_len() }
    }

    /// These bytes of the block only: whole pages.
    #[must_use]
    pub fn part(mut self, range: Range<u64>) -> Self {
        self.range = range;
        self
    }

    /// Every region of a VMM's guest memory, for the blocks of [`RamBlock::of_guest_memory`].
    ///
    /// # Errors
    /// As there.
    pub fn of_guest_memory<B>(memory: &GuestMemoryMmap<B>) -> io::Result<Vec<Self>>
    where
        B: Bitmap + Send + Sync + 'static,
    {
        let blocks = RamBlock::of_guest_memory(memory)?;
        Ok(blocks
            .iter()
            .zip(memory.iter())
            .map(|(block, region)| Self::new(region.start_addr(), block))
            .collect())
    }

    /// The block that it is a part of.
    pub fn block(&self) -> &RamBlock {
        &self.block
    }

    pub(super) fn len(&self) -> u64 {
        self.range.end.saturating_sub(self.range.start)
    }

    /// The guest address behind the last byte.
    pub(super) fn guest_end(&self) -> u64 {
        self.guest_address.raw_value().saturating_add(self.len())
    }

    pub(super) fn first_guest_page(&self) -> u64 {
        self.guest_address.raw_value() / PAGE as u64
    }

    /// The block's page that is the region's first.
    pub(super) fn first_page(&self) -> usize {
        pages(self.range.start)
    }

    pub(super) fn pages(&self) -> usize {
        pages(self.len())
    }

    /// Where the byte at a guest address is in this process, if `len` bytes from there are in this
    /// region.
    pub(super) fn host_address(&self, at: GuestAddress, len: u64) -> Option<u64> {
        let offset = at.raw_value().checked_sub(self.guest_address.raw_value())?;
        offset.checked_add(len).filter(|end| *end <= self.len())?;
        Some(self.userspace_address()? + offset)
    }

    /// The region as a back-end gets it. The descriptor is -1 for memory that it cannot share:
    /// without a file, or private.
    pub(super) fn info(&self) -> VhostUserMemoryRegionInfo {
        let file = self.block.memory().shared_file();
        VhostUserMemoryRegionInfo {
            guest_phys_addr: self.guest_address.raw_value(),
            memory_size: self.len(),
            userspace_addr: self.userspace_address().unwrap_or(0),
            mmap_offset: file.map_or(0, |file| file.start()) + self.range.start,
            mmap_handle: file.map_or(-1, |file| file.file().as_raw_fd()),
        }
    }

    fn userspace_address(&self) -> Option<u64> {
        let (offset, len) = (usize::try_from(self.range.start).ok()?, usize::try_from(self.len()).ok()?);
        Some(self.block.memory().slice(offset, len)?.ptr_guard().as_ptr() as u64)
    }

    /// Why it cannot be, if so.
    fn wrong(&self) -> Option<String> {
        let page = PAGE as u64;
        let Range { start, end } = self.range;
        let len = self.block.used_len();
        if start >= end || end > len || !start.is_multiple_of(page) || !end.is_multiple_of(page) {
            return Some(format!("{self}: bytes {start}..{end} of {len}, expected whole pages of it"));
        }
        let address = self.guest_address.raw_value();
        if !address.is_multiple_of(page) || self.guest_end() > GUEST_END {
            return Some(format!("{self}: expected the start of a page, and an end up to {GUEST_END:#x}"));
        }
        None
    }
}

impl std::fmt::Display for VhostRegion {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "guest memory at {:#x}, RAM block {}", self.guest_address.raw_value(), self.block.name())
    }
}

/// Refuses a region outside of its block, and two that overlap.
pub(super) fn check(regions: &[VhostRegion]) -> Result<(), String> {
    if let Some(wrong) = regions.iter().find_map(VhostRegion::wrong) {
        return Err(wrong);
    }
    let mut sorted: Vec<_> = regions.iter().collect();
    sorted.sort_by_key(|region| region.first_guest_page());
    let overlap = sorted.windows(2).find_map(|pair| match pair {
        [low, high] if low.guest_end() > high.guest_address.raw_value() => Some((*low, *high)),
        _ => None,
    });
    overlap.map_or(Ok(()), |(low, high)| Err(format!("{low} overlaps {high}")))
}

/// Where in this process a back-end finds `len` bytes at a guest address.
pub(super) fn host_address(regions: &[VhostRegion], at: GuestAddress, len: u64) -> Option<u64> {
    regions.iter().find_map(|region| region.host_address(at, len))
}

/// Reads a number of the guest's, in the byte order of virtio.
pub(super) fn read_u16(regions: &[VhostRegion], at: GuestAddress) -> Option<u16> {
    let region = regions.iter().find(|region| region.host_address(at, 2).is_some())?;
    let offset = region.range.start + (at.raw_value() - region.guest_address.raw_value());
    let mut bytes = [0; 2];
    region.block.memory().read(usize::try_from(offset).ok()?, &mut bytes).ok()?;
    Some(u16::from_le_bytes(bytes))
}

fn pages(bytes: u64) -> usize {
    usize::try_from(bytes / PAGE as u64).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use vm_memory::{FileOffset, MmapRegion};

    use super::*;
    use crate::guest::HostMemory;

    fn block(name: &str, pages: usize) -> RamBlock {
        RamBlock::new(name.try_into().unwrap(), HostMemory::anonymous(pages * PAGE).unwrap())
    }

    #[test]
    fn regions_that_are_no_part_of_their_block_or_overlap_are_named() {
        let ram = block("ram", 16);
        let at = |address, range| VhostRegion::new(GuestAddress(address), &ram).part(range);
        let error = |regions: &[VhostRegion]| check(regions).unwrap_err();
        check(&[at(0x4000, 0x4000..0x8000), at(0, 0..0x4000)]).unwrap();
        assert_eq!(
            error(&[at(0, 0..0x11000)]),
            "guest memory at 0x0, RAM block ram: bytes 0..69632 of 65536, expected whole pages of it"
        );
        error(&[at(0, 0x2000..0x2000)]);
        error(&[at(0, 1..0x2000)]);
        error(&[at(0x800, 0..0x2000)]);
        error(&[at(GUEST_END - 0x1000, 0..0x2000)]);
        error(&[at(u64::MAX - 0xfff, 0..0x2000)]);
        check(&[at(GUEST_END - 0x2000, 0..0x2000)]).unwrap();
        assert_eq!(
            error(&[at(0x3000, 0..0x1000), at(0, 0..0x4000)]),
            "guest memory at 0x0, RAM block ram overlaps guest memory at 0x3000, RAM block ram"
        );
    }

    #[test]
    fn the_file_of_a_private_mapping_is_not_the_guests_memory() {
        let info = |flags| {
            let file = tempfile::tempfile().unwrap();
            file.set_len(PAGE as u64).unwrap();
            let (file, rights) = (FileOffset::new(file, 0), libc::PROT_READ | libc::PROT_WRITE);
            let mapped = MmapRegion::<()>::build(Some(file), PAGE, rights, flags).unwrap();
            let memory = HostMemory::from_region(Arc::new(mapped)).unwrap();
            assert!(memory.file().is_some());
            VhostRegion::new(GuestAddress(0), &RamBlock::new("ram".try_into().unwrap(), memory)).info()
        };
        assert_eq!(info(libc::MAP_PRIVATE).mmap_handle, -1);
        assert!(info(libc::MAP_SHARED).mmap_handle >= 0);
    }

    #[test]
    fn a_guest_address_is_found_where_all_of_its_bytes_are() {
        let ram = block("ram", 4);
        let regions = [VhostRegion::new(GuestAddress(1 << 32), &ram).part(0x1000..0x3000)];
        let start = ram.memory().slice(0, 1).unwrap().ptr_guard().as_ptr() as u64;
        let find = |at, len| host_address(&regions, GuestAddress(at), len);
        assert_eq!(find(1 << 32, 0x2000), Some(start + 0x1000));
        assert_eq!(find((1 << 32) + 0x1ff0, 16), Some(start + 0x2ff0));
        assert_eq!(find((1 << 32) + 0x1ff0, 17), None);
        assert_eq!(find((1 << 32) - 1, 1), None);
        assert_eq!(find(1 << 32, u64::MAX), None);
    }
}
