//! Writes that vm-memory notes.

use std::sync::Arc;

use multifd_wire::BlockName;
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, MmapRegion};

use super::software::{bitmap_of, place_of};
use super::{Coverage, DirtyLog, DirtyLogError};
use crate::guest::{DirtyBitmap, PAGE, RamBlock};

/// The bitmaps of a VMM whose guest memory is `GuestMemoryMmap<AtomicBitmap>`: whatever is written
/// through vm-memory is noted there by vm-memory itself.
///
/// ```
/// # use multifd_engine::{HostMemory, RamBlock, RegionLog, PAGE};
/// # use multifd_engine::vm_memory::{GuestAddress, GuestRegionMmap, bitmap::AtomicBitmap};
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let region = GuestRegionMmap::<AtomicBitmap>::from_range(GuestAddress(0), 16 * PAGE, None)?;
/// let block = RamBlock::new("pc.ram".try_into()?, HostMemory::from_region(region.get_mmap())?);
/// let log = RegionLog::new().region(block.name().clone(), region.get_mmap());
/// # Ok(())
/// # }
/// ```
///
/// A migration takes the bits, and gives them back when it ends, those included that were set
/// before it began: a VMM that makes diff snapshots from the same bitmaps loses none by an attempt.
/// No other code may reset the bitmaps while a migration runs. Writes through raw pointers
/// (`ptr_guard_mut`, vCPUs, read(2) into an iovec) are noted only if their author marks them.
///
/// A clone serves the next attempt.
#[derive(Clone, Debug, Default)]
pub struct RegionLog {
    regions: Vec<Region>,
}

#[derive(Clone, Debug)]
struct Region {
    block: BlockName,
    mapping: Arc<MmapRegion<AtomicBitmap>>,
    place: usize,
    /// Bytes that one bit stands for.
    grain: usize,
    /// The bits that were taken since the start, and at it.
    taken: Vec<u64>,
}

impl RegionLog {
    /// A log of no region.
    pub fn new() -> Self {
        Self::default()
    }

    /// A log of all regions of a VMM's guest memory, for the blocks of
    /// [`RamBlock::of_guest_memory`].
    ///
    /// # Errors
    /// As [`RamBlock::of_guest_memory`].
    pub fn of_guest_memory(memory: &GuestMemoryMmap<AtomicBitmap>) -> std::io::Result<Self> {
        let blocks = RamBlock::of_guest_memory(memory)?;
        let regions = blocks.iter().zip(memory.iter());
        Ok(regions
            .fold(Self::new(), |log, (block, region)| log.region(block.name().clone(), region.get_mmap())))
    }

    /// Adds the region that is the memory of RAM block `block`.
    #[must_use]
    pub fn region(mut self, block: BlockName, mapping: Arc<MmapRegion<AtomicBitmap>>) -> Self {
        self.regions.push(Region { block, mapping, place: 0, grain: PAGE, taken: Vec::new() });
        self
    }
}

impl Region {
    fn start(&mut self, ram: &[RamBlock]) -> Result<(), DirtyLogError> {
        self.place = place_of(&self.block, self.mapping.size() / PAGE, ram)?;
        let bitmap = self.mapping.bitmap();
        if bitmap.byte_size() < self.mapping.size() {
            return Err(DirtyLogError::new(format!(
                "reading the bitmap of RAM block {}: it covers {} of {} bytes",
                self.block,
                bitmap.byte_size(),
                self.mapping.size()
            )));
        }
        self.grain = grain(bitmap);
        self.take();
        Ok(())
    }

    /// Takes the bits of the region, and keeps a copy of them.
    fn take(&mut self) -> Vec<u64> {
        // Not `reset`, whose plain store could take the bit of a write that this thread does not
        // see yet.
        let bits = self.mapping.bitmap().get_and_reset();
        self.taken.resize(bits.len(), 0);
        self.taken.iter_mut().zip(&bits).for_each(|(taken, bits)| *taken |= bits);
        bits
    }

    /// Sets every bit that was taken.
    fn give_back(&mut self) {
        for (word, mut bits) in self.taken.drain(..).enumerate() {
            while bits != 0 {
                self.mapping.bitmap().set_bit(word * 64 + bits.trailing_zeros() as usize);
                bits &= bits - 1;
            }
        }
    }

    fn sync(&mut self, into: &DirtyBitmap) {
        for (word, mut bits) in self.take().into_iter().enumerate() {
            let base = word * 64;
            if self.grain == PAGE {
                into.set_bits(base, bits);
                continue;
            }
            while bits != 0 {
                let start = (base + bits.trailing_zeros() as usize) * self.grain;
                let first = start / PAGE;
                into.set_range(first, (start + self.grain).div_ceil(PAGE) - first);
                bits &= bits - 1;
            }
        }
    }
}

/// Bytes a bit. vm-memory does not tell: it is where the second bit begins, looked for in a copy.
fn grain(bitmap: &AtomicBitmap) -> usize {
    let probe = bitmap.clone();
    probe.reset();
    probe.set_bit(0);
    let (mut set, mut clear) = (0, bitmap.byte_size());
    while clear - set > 1 {
        let middle = set + (clear - set) / 2;
        *(if probe.is_addr_set(middle) { &mut set } else { &mut clear }) = middle;
    }
    clear
}

impl DirtyLog for RegionLog {
    fn name(&self) -> &str {
        "vm-memory"
    }

    fn start(&mut self, ram: &[RamBlock]) -> Result<(), DirtyLogError> {
        self.regions.iter_mut().try_for_each(|region| region.start(ram))
    }

    fn covers(&self, block: &RamBlock) -> Coverage {
        match self.regions.iter().any(|region| region.block == *block.name()) {
            true => Coverage::Whole,
            false => Coverage::Nothing,
        }
    }

    fn sync(&mut self, bitmaps: &[Arc<DirtyBitmap>]) -> Result<(), DirtyLogError> {
        self.regions.iter_mut().try_for_each(|region| {
            region.sync(bitmap_of(bitmaps, region.place, &region.block)?);
            Ok(())
        })
    }

    fn stop(&mut self) {
        self.regions.iter_mut().for_each(Region::give_back);
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroUsize;

    use vm_memory::mmap::MmapRegionBuilder;
    use vm_memory::{Bytes, VolatileMemory};

    use super::*;
    use crate::guest::HostMemory;

    fn written(grain: usize, pages: usize, writes: &[(usize, usize)]) -> Vec<usize> {
        let bitmap = AtomicBitmap::new(pages * PAGE, NonZeroUsize::new(grain).unwrap());
        let builder = MmapRegionBuilder::new_with_bitmap(pages * PAGE, bitmap)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        let region = Arc::new(builder.build().unwrap());
        let name = BlockName::try_from("ram").unwrap();
        let ram = [RamBlock::new(name.clone(), HostMemory::from_region(Arc::clone(&region)).unwrap())];
        let mut log = RegionLog::new().region(name, Arc::clone(&region));
        region.as_volatile_slice().write_slice(&[1], 0).unwrap();
        log.start(&ram).unwrap();
        for (offset, len) in writes {
            region.as_volatile_slice().write_slice(&vec![7; *len], *offset).unwrap();
        }
        let bitmap = Arc::new(DirtyBitmap::new(pages));
        log.sync(&[Arc::clone(&bitmap)]).unwrap();
        let again = Arc::new(DirtyBitmap::new(pages));
        log.sync(&[Arc::clone(&again)]).unwrap();
        assert_eq!(again.count(), 0, "a write is reported once");
        (0..pages).filter(|page| bitmap.test(*page)).collect()
    }

    #[test]
    fn writes_through_vm_memory_are_reported_once() {
        assert_eq!(written(PAGE, 130, &[(PAGE - 1, 2), (129 * PAGE, 5)]), [0, 1, 129]);
    }

    #[test]
    fn bits_that_were_taken_are_given_back_at_the_end() {
        let region = Arc::new(MmapRegion::<AtomicBitmap>::new(200 * PAGE).unwrap());
        let name = BlockName::try_from("ram").unwrap();
        let ram = [RamBlock::new(name.clone(), HostMemory::from_region(Arc::clone(&region)).unwrap())];
        let mut log = RegionLog::new().region(name, Arc::clone(&region));
        let write = |page: usize| region.as_volatile_slice().write_slice(&[1], page * PAGE).unwrap();
        for _ in 0..2 {
            write(5);
            log.start(&ram).unwrap();
            write(70);
            log.sync(&[Arc::new(DirtyBitmap::new(200))]).unwrap();
            write(199);
            log.stop();
            let dirty: Vec<_> = (0..200).filter(|page| region.bitmap().is_bit_set(*page)).collect();
            assert_eq!(dirty, [5, 70, 199]);
        }
    }

    #[test]
    fn bits_of_other_granularity_cover_their_pages() {
        assert_eq!(written(4 * PAGE, 10, &[(5 * PAGE, 1), (9 * PAGE, 1)]), [4, 5, 6, 7, 8, 9]);
        assert_eq!(written(512, 10, &[(5 * PAGE + 1024, 1), (7 * PAGE - 1, 2)]), [5, 6, 7]);
        assert_eq!(written(5000, 10, &[(5000, 1), (19_999, 1)]), [1, 2, 3, 4]);
        assert_eq!(written(1 << 30, 3, &[(PAGE, 1)]), [0, 1, 2]);
    }

    #[test]
    fn any_granularity_is_found() {
        for (bytes, bytes_a_bit) in
            [(65536, 4096), (65537, 4096), (12288, 5000), (1 << 30, 1 << 21), (100, 1), (4096, 4096)]
        {
            assert_eq!(
                grain(&AtomicBitmap::new(bytes, NonZeroUsize::new(bytes_a_bit).unwrap())),
                bytes_a_bit
            );
        }
        // One bit for all: its share is all there is.
        assert_eq!(grain(&AtomicBitmap::new(8192, NonZeroUsize::new(1 << 20).unwrap())), 8192);
    }
}
