//! Writes that the embedder's own code notes.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use multifd_wire::BlockName;

use super::{Coverage, DirtyLog, DirtyLogError};
use crate::guest::{DirtyBitmap, PAGE, RamBlock};

/// Bitmaps that the embedder marks: for device back-ends that write to guest memory from threads of
/// the VMM, for interpreters, or for any memory that nothing else watches.
///
/// ```
/// # use multifd_engine::{HostMemory, RamBlock, SoftwareLog, PAGE};
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let ram = [RamBlock::new("pc.ram".try_into()?, HostMemory::anonymous(16 * PAGE)?)];
/// let log = SoftwareLog::new(&ram);
/// let disk = log.marker(); // Clone + Send + Sync, for the disk's thread
///
/// // after each write by the disk: to which block, where, how many bytes
/// disk.mark(0, 0x5000, 512);
/// # Ok(())
/// # }
/// ```
///
/// One bit a page: 32 KiB for a GiB of guest, from [`SoftwareLog::new`] on.
///
/// It serves any number of attempts, one at a time: a migration gets a clone of it, which the same
/// markers mark. A new log, made for a second attempt, would hear nothing of markers that threads
/// got from the first.
#[derive(Debug)]
pub struct SoftwareLog {
    noted: Arc<Noted>,
    /// Where each block stands in the migration's list.
    places: Vec<usize>,
    /// Started, and not stopped.
    serving: bool,
}

/// Notes writes. Cheap to clone; any number of threads may mark at once, while a migration reads.
#[derive(Clone, Debug)]
pub struct DirtyMarker(Arc<Noted>);

#[derive(Debug)]
struct Noted {
    blocks: Vec<(BlockName, DirtyBitmap)>,
    /// A mark named an unknown block: a write that is in no log.
    stray: AtomicBool,
    /// A log of these bitmaps serves a migration.
    in_use: AtomicBool,
}

impl SoftwareLog {
    /// A log for the blocks of `ram`. They may be some of those that migrate: the rest is left to
    /// other logs.
    pub fn new(ram: &[RamBlock]) -> Self {
        let blocks =
            ram.iter().map(|block| (block.name().clone(), DirtyBitmap::new(block.pages()))).collect();
        let noted = Noted { blocks, stray: AtomicBool::new(false), in_use: AtomicBool::new(false) };
        Self::of(Arc::new(noted))
    }

    fn of(noted: Arc<Noted>) -> Self {
        let places = (0..noted.blocks.len()).collect();
        Self { noted, places, serving: false }
    }

    /// The handle that notes writes.
    pub fn marker(&self) -> DirtyMarker {
        DirtyMarker(Arc::clone(&self.noted))
    }
}

impl DirtyMarker {
    /// A log of what this marker and its clones mark, for a migration.
    pub fn log(&self) -> SoftwareLog {
        SoftwareLog::of(Arc::clone(&self.0))
    }

    /// Notes that `len` bytes from `offset` of a block have been written: call it **after** the
    /// write. `block` counts the blocks that [`SoftwareLog::new`] was given; a mark of another
    /// makes the migration fail at its next sync. What lies past the end of the block is ignored.
    ///
    /// A locked instruction for each 64 pages, whether or not a migration runs.
    pub fn mark(&self, block: usize, offset: u64, len: u64) {
        let page = |offset: u64| usize::try_from(offset / PAGE as u64).unwrap_or(usize::MAX);
        match self.0.blocks.get(block) {
            Some((_, written)) if len > 0 => {
                let (first, last) = (page(offset), page(offset.saturating_add(len - 1)));
                written.set_range(first, last - first + 1);
            }
            Some(_) => {}
            None => self.0.stray.store(true, Ordering::Relaxed),
        }
    }
}

impl DirtyLog for SoftwareLog {
    fn name(&self) -> &str {
        "software"
    }

    fn start(&mut self, ram: &[RamBlock]) -> Result<(), DirtyLogError> {
        if self.noted.in_use.swap(true, Ordering::Relaxed) {
            return Err(DirtyLogError::new("the log serves another migration"));
        }
        self.serving = true;
        self.noted.stray.store(false, Ordering::Relaxed);
        for ((name, written), place) in self.noted.blocks.iter().zip(&mut self.places) {
            *place = place_of(name, written.pages(), ram)?;
            // Old marks. Those of a write that goes on now are taken with what they mark (see
            // `DirtyBitmap`).
            written.move_to(&DirtyBitmap::new(0));
        }
        Ok(())
    }

    fn covers(&self, block: &RamBlock) -> Coverage {
        match self.noted.blocks.iter().any(|(name, _)| name == block.name()) {
            true => Coverage::Whole,
            false => Coverage::Nothing,
        }
    }

    fn sync(&mut self, bitmaps: &[Arc<DirtyBitmap>]) -> Result<(), DirtyLogError> {
        for ((name, written), place) in self.noted.blocks.iter().zip(&self.places) {
            written.move_to(bitmap_of(bitmaps, *place, name)?);
        }
        if self.noted.stray.load(Ordering::Relaxed) {
            let blocks = self.noted.blocks.len();
            let text = format!("a write to a RAM block past the last was marked: the log has {blocks}");
            return Err(DirtyLogError::new(text));
        }
        Ok(())
    }

    fn stop(&mut self) {
        if std::mem::take(&mut self.serving) {
            self.noted.in_use.store(false, Ordering::Relaxed);
        }
    }
}

impl Clone for SoftwareLog {
    /// Another log of the same marks.
    fn clone(&self) -> Self {
        Self::of(Arc::clone(&self.noted))
    }
}

/// Where in `ram` the block `name` is, which a log was made for when it had `pages` pages.
pub(crate) fn place_of(name: &BlockName, pages: usize, ram: &[RamBlock]) -> Result<usize, DirtyLogError> {
    match ram.iter().enumerate().find(|(_, block)| block.name() == name) {
        Some((place, block)) if block.pages() == pages => Ok(place),
        Some((_, block)) => Err(DirtyLogError::new(format!(
            "noting writes to RAM block {name}: {} pages migrate, the log is for {pages}",
            block.pages()
        ))),
        None => Err(DirtyLogError::new(format!("noting writes to RAM block {name}: it does not migrate"))),
    }
}

/// The bitmap of block `name`, which is number `place` of the migration's.
pub(crate) fn bitmap_of<'a>(
    bitmaps: &'a [Arc<DirtyBitmap>],
    place: usize,
    name: &BlockName,
) -> Result<&'a DirtyBitmap, DirtyLogError> {
    bitmaps.get(place).map(|bitmap| &**bitmap).ok_or_else(|| {
        let count = bitmaps.len();
        DirtyLogError::new(format!(
            "noting writes to RAM block {name}: it is number {place} of {count} bitmaps (a bug)"
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::HostMemory;

    fn ram(blocks: &[(&str, usize)]) -> Vec<RamBlock> {
        let block = |(name, pages): &(&str, usize)| {
            RamBlock::new((*name).try_into().unwrap(), HostMemory::anonymous(pages * PAGE).unwrap())
        };
        blocks.iter().map(block).collect()
    }

    fn bitmaps(ram: &[RamBlock]) -> Vec<Arc<DirtyBitmap>> {
        ram.iter().map(|block| Arc::new(DirtyBitmap::new(block.pages()))).collect()
    }

    #[test]
    fn a_mark_covers_the_pages_of_its_bytes_once() {
        let page = PAGE as u64;
        let ram = ram(&[("a", 8), ("b", 70)]);
        let mut log = SoftwareLog::new(&ram);
        let marker = log.marker();
        marker.mark(1, 0, 1);
        log.start(&ram).unwrap();
        marker.mark(1, page - 1, 2);
        marker.mark(1, 5 * page, page);
        marker.mark(1, 7 * page, 0);
        marker.mark(1, 69 * page, 100 * page);
        marker.mark(1, u64::MAX, u64::MAX);
        let bitmaps = bitmaps(&ram);
        log.sync(&bitmaps).unwrap();
        let set: Vec<_> = (0..70).filter(|page| bitmaps[1].test(*page)).collect();
        assert_eq!(set, [0, 1, 5, 69]);
        assert_eq!(bitmaps[0].count(), 0);
        assert!(bitmaps[1].take_word(0) > 0 && bitmaps[1].take_word(1) > 0);
        log.sync(&bitmaps).unwrap();
        assert_eq!(bitmaps[1].count(), 0, "a mark is reported once");
    }

    #[test]
    fn blocks_are_found_by_name_among_those_that_migrate() {
        let all = ram(&[("a", 8), ("b", 9), ("c", 10)]);
        let mut log = SoftwareLog::new(&all[2..]);
        log.start(&all).unwrap();
        log.marker().mark(0, 0x9000, 1);
        let bitmaps = bitmaps(&all);
        log.sync(&bitmaps).unwrap();
        assert_eq!((bitmaps[0].count(), bitmaps[1].count(), bitmaps[2].count()), (0, 0, 1));
    }

    #[test]
    fn a_mark_that_fits_no_block_is_told() {
        let ram = ram(&[("a", 8)]);
        let mut log = SoftwareLog::new(&ram);
        log.start(&ram).unwrap();
        log.marker().mark(1, 0, 1);
        let error = log.sync(&bitmaps(&ram)).unwrap_err();
        assert_eq!(error.to_string(), "a write to a RAM block past the last was marked: the log has 1");
        log.stop();
        log.start(&ram).unwrap();
        log.sync(&bitmaps(&ram)).unwrap();
    }

    #[test]
    fn a_clone_hears_the_same_markers_when_its_turn_comes() {
        let ram = ram(&[("a", 8)]);
        let mut log = SoftwareLog::new(&ram);
        let marker = log.marker();
        let mut again = marker.log();
        log.start(&ram).unwrap();
        assert_eq!(again.start(&ram).unwrap_err().to_string(), "the log serves another migration");
        again.stop();
        assert!(again.start(&ram).is_err(), "what did not start does not end the other's turn");
        log.stop();
        again.start(&ram).unwrap();
        marker.mark(0, 0x3000, 1);
        let bitmaps = bitmaps(&ram);
        again.sync(&bitmaps).unwrap();
        assert!(bitmaps[0].test(3) && bitmaps[0].count() == 1);
    }

    #[test]
    fn a_block_that_changed_or_stays_here_is_refused() {
        let made_for = ram(&[("a", 8)]);
        let error = SoftwareLog::new(&made_for).start(&ram(&[("a", 9)])).unwrap_err();
        assert_eq!(error.to_string(), "noting writes to RAM block a: 9 pages migrate, the log is for 8");
        let error = SoftwareLog::new(&made_for).start(&ram(&[("b", 8)])).unwrap_err();
        assert_eq!(error.to_string(), "noting writes to RAM block a: it does not migrate");
    }
}
