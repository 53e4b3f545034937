//! The memory in which back-ends note what they write.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use multifd_wire::BlockName;
use vm_memory::GuestAddress;

use super::region::VhostRegion;
use super::sys;
use crate::dirty::{DirtyLogError, bitmap_of, place_of};
use crate::guest::{DirtyBitmap, HostMemory, PAGE, RamBlock};

/// Pages in a word of the log.
const PAGES: u64 = 64;

/// One bit a page of guest physical memory, from address 0 on, in memory that back-ends share: bit
/// `page % 8` of byte `page / 8`. They set bits, [`SharedLog::move_run`] takes them.
///
/// 32 KiB for a GiB of guest addresses; holes between regions cost addresses, no memory.
#[derive(Debug)]
pub struct SharedLog {
    file: File,
    memory: HostMemory,
}

impl SharedLog {
    /// A log for guest addresses up to `guest_end`, all clear.
    ///
    /// # Errors
    /// What memfd_create and mmap say.
    pub fn new(guest_end: u64) -> io::Result<Self> {
        let bytes = guest_end.div_ceil(PAGE as u64).div_ceil(8).max(1).next_multiple_of(8);
        let len = usize::try_from(bytes).map_err(io::Error::other)?;
        let file = sys::sealed_memfd(c"multifd-vhost-log", bytes)?;
        let memory = HostMemory::map_file(file.try_clone()?, len)?;
        Ok(Self { file, memory })
    }

    /// What a vhost-user back-end maps.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Bytes: a multiple of 8.
    pub fn len(&self) -> u64 {
        self.memory.len() as u64
    }

    /// False: it has a bit, always.
    pub fn is_empty(&self) -> bool {
        self.memory.is_empty()
    }

    /// Where it is mapped in this process: what the kernel's vhost gets.
    pub fn address(&self) -> u64 {
        self.memory.slice(0, 0).map_or(0, |slice| slice.ptr_guard().as_ptr() as u64)
    }

    /// Sets the bits of `len` bytes from a guest address on, as a back-end does; as far as there
    /// are any.
    pub fn mark(&self, at: GuestAddress, len: u64) {
        let (first, end) = (at.0 / PAGE as u64, at.0.saturating_add(len).div_ceil(PAGE as u64));
        let words = sys::words(&self.memory).unwrap_or_default();
        for page in first..end.min(words.len() as u64 * PAGES) {
            let word = usize::try_from(page / PAGES).ok().and_then(|word| words.get(word));
            // Release: a thread that takes the bit sees what was written before.
            _ = word.map(|word| word.fetch_or((1_u64 << (page % PAGES)).to_le(), Ordering::Release));
        }
    }

    /// Takes the bits of `pages` pages from guest page `first` on, and sets those of the pages from
    /// `into_first` on in `into`. Bits of other pages stay, also those that share a word with them.
    ///
    /// # Errors
    /// The log is not as long as that: bits that a back-end may have set are out of reach.
    pub fn move_run(
        &self,
        first: u64,
        pages: usize,
        into: &DirtyBitmap,
        into_first: usize,
    ) -> Result<(), DirtyLogError> {
        let end = first.saturating_add(pages as u64);
        let index = |word: u64| usize::try_from(word).unwrap_or(usize::MAX);
        let (low, high) = (index(first / PAGES), index(end.div_ceil(PAGES)));
        let words = sys::words(&self.memory).and_then(|words| words.get(low..high)).ok_or_else(|| {
            let len = self.len();
            DirtyLogError::new(format!(
                "guest pages {first:#x}..{end:#x} in a vhost log of {len} bytes (a bug)"
            ))
        })?;
        for (word, base) in words.iter().zip((first / PAGES * PAGES..).step_by(64)) {
            let skip = first.saturating_sub(base);
            let mask = u64::MAX >> (PAGES - (end - base).min(PAGES)) & u64::MAX << skip;
            let bits = take(word, mask);
            if bits != 0 {
                into.set_bits(into_first + index(base + skip - first), bits >> skip);
            }
        }
        Ok(())
    }
}

/// Takes the bits of `mask` out of a word.
fn take(word: &AtomicU64, mask: u64) -> u64 {
    // A clean word costs a load: most words are clean in a late round. The log's order is that of
    // its bytes.
    if u64::from_le(word.load(Ordering::Relaxed)) & mask == 0 {
        return 0;
    }
    // Acquire: what was written before a bit was set is read after it was taken.
    let bits = match mask {
        u64::MAX => word.swap(0, Ordering::Acquire),
        _ => word.fetch_and(!mask.to_le(), Ordering::Acquire),
    };
    u64::from_le(bits) & mask
}

/// A log, and the guest physical runs that it was made for.
#[derive(Debug)]
pub(super) struct RunLog {
    pub(super) log: Arc<SharedLog>,
    runs: Vec<Run>,
}

/// Neighbouring guest pages that are neighbours in a block.
#[derive(Debug)]
struct Run {
    guest_page: u64,
    pages: usize,
    block: BlockName,
    /// Where its block stands in the migration's list.
    place: usize,
    /// The block's page that is the run's first.
    page: usize,
}

impl RunLog {
    /// A log for all of `regions`, whose blocks must be among those that migrate, and long enough
    /// for `sized_for`.
    pub(super) fn new(
        regions: &[VhostRegion],
        sized_for: &[VhostRegion],
        ram: &[RamBlock],
    ) -> Result<Self, DirtyLogError> {
        let run = |region: &VhostRegion| {
            let block = region.block().name().clone();
            let place = place_of(&block, region.block().pages(), ram)?;
            let (guest_page, pages) = (region.first_guest_page(), region.pages());
            Ok::<_, DirtyLogError>(Run { guest_page, pages, block, place, page: region.first_page() })
        };
        let runs = regions.iter().map(run).collect::<Result<_, _>>()?;
        let end = sized_for.iter().map(VhostRegion::guest_end).max().unwrap_or(0);
        let log = SharedLog::new(end).map_err(|cause| {
            DirtyLogError::new(format!("making a vhost log for guest memory up to {end:#x}")).because(cause)
        })?;
        Ok(Self { log: Arc::new(log), runs })
    }

    /// Sets the bits of all its pages.
    pub(super) fn mark_all(&self, bitmaps: &[Arc<DirtyBitmap>]) -> Result<(), DirtyLogError> {
        self.runs.iter().try_for_each(|run| {
            let bitmap = bitmap_of(bitmaps, run.place, &run.block)?;
            bitmap.set_range(run.page, run.pages);
            Ok(())
        })
    }

    /// Takes all bits into the bitmaps of their blocks.
    pub(super) fn drain(&self, bitmaps: &[Arc<DirtyBitmap>]) -> Result<(), DirtyLogError> {
        self.runs.iter().try_for_each(|run| {
            let bitmap = bitmap_of(bitmaps, run.place, &run.block)?;
            self.log.move_run(run.guest_page, run.pages, bitmap, run.page)
        })
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    /// As a back-end does it, through the file.
    fn mark(log: &SharedLog, page: u64) {
        let mut byte = [0];
        log.file.read_exact_at(&mut byte, page / 8).unwrap();
        log.file.write_all_at(&[byte[0] | 1 << (page % 8)], page / 8).unwrap();
    }

    fn set(bitmap: &DirtyBitmap) -> Vec<usize> {
        (0..bitmap.pages()).filter(|page| bitmap.test(*page)).collect()
    }

    #[test]
    fn its_size_covers_the_last_page() {
        for (end, len) in
            [(0, 8), (1, 8), (0x40_000, 8), (0x40_001, 16), (1 << 32, 128 << 10), (1 << 40, 32 << 20)]
        {
            assert_eq!(SharedLog::new(end).unwrap().len(), len, "{end:#x}");
        }
    }

    #[test]
    fn its_length_is_sealed() {
        let log = SharedLog::new(1 << 30).unwrap();
        assert!(log.file.set_len(0).is_err() && log.file.set_len(1 << 20).is_err());
    }

    #[test]
    fn a_run_takes_its_own_bits_and_no_others() {
        let log = SharedLog::new(400 * PAGE as u64).unwrap();
        let all = [0, 1, 63, 64, 69, 70, 71, 127, 128, 199, 200, 300, 399];
        for (first, pages) in [(0, 400), (70, 130), (64, 64), (1, 1), (65, 3), (0, 64), (199, 2), (128, 272)]
        {
            all.iter().for_each(|page| mark(&log, *page));
            let bitmap = DirtyBitmap::new(1000);
            log.move_run(first, pages, &bitmap, 500).unwrap();
            let mine = |page: &&u64| (first..first + pages as u64).contains(page);
            let expected: Vec<_> =
                all.iter().filter(mine).map(|page| usize::try_from(*page - first).unwrap() + 500).collect();
            assert_eq!(set(&bitmap), expected, "{pages} from {first}");
            let rest = DirtyBitmap::new(400);
            log.move_run(0, 400, &rest, 0).unwrap();
            assert_eq!(set(&rest).len(), all.len() - expected.len(), "the others stay");
        }
    }

    #[test]
    fn marks_are_as_a_back_end_makes_them() {
        let (ours, theirs) = (SharedLog::new(1 << 20).unwrap(), SharedLog::new(1 << 20).unwrap());
        ours.mark(GuestAddress(0x41fff), 2);
        ours.mark(GuestAddress(0x1000), 0);
        ours.mark(GuestAddress(0xff000), u64::MAX);
        ours.mark(GuestAddress(1 << 20), u64::MAX);
        [0x41, 0x42, 0xff].into_iter().for_each(|page| mark(&theirs, page));
        let (mut a, mut b) = ([0; 32], [0; 32]);
        ours.file.read_exact_at(&mut a, 0).unwrap();
        theirs.file.read_exact_at(&mut b, 0).unwrap();
        assert_eq!(a, b);
    }

    #[test]
    fn a_run_past_the_end_of_the_log_is_an_error() {
        let log = SharedLog::new(64 * PAGE as u64).unwrap();
        mark(&log, 63);
        let bitmap = DirtyBitmap::new(200);
        for (first, pages) in [(60, 140), (u64::MAX - 3, 200), (640, 1), (64, 1)] {
            let error = log.move_run(first, pages, &bitmap, 0).unwrap_err();
            assert!(error.to_string().contains("in a vhost log of 8 bytes"), "{error}");
        }
        assert_eq!(bitmap.count(), 0);
        log.move_run(60, 4, &bitmap, 0).unwrap();
        assert_eq!(set(&bitmap), [3]);
    }

    #[test]
    fn regions_report_to_their_part_of_their_block() {
        let block = |name: &str, pages| {
            RamBlock::new(name.try_into().unwrap(), HostMemory::anonymous(pages * PAGE).unwrap())
        };
        let ram = [block("rom", 4), block("ram", 100)];
        let regions = [
            VhostRegion::new(GuestAddress(0), &ram[1]).part(0..0xa000),
            VhostRegion::new(GuestAddress(1 << 32), &ram[1]).part(0xa000..100 * PAGE as u64),
        ];
        let log = RunLog::new(&regions, &regions, &ram).unwrap();
        let high = (1 << 32) / PAGE as u64;
        for page in [0, 9, 10, high - 1, high, high + 89] {
            mark(&log.log, page);
        }
        let bitmaps = [Arc::new(DirtyBitmap::new(4)), Arc::new(DirtyBitmap::new(100))];
        log.drain(&bitmaps).unwrap();
        assert_eq!(bitmaps[0].count(), 0);
        assert_eq!(set(&bitmaps[1]), [0, 9, 10, 99]);

        let error = RunLog::new(&regions, &regions, &ram[..1]).unwrap_err();
        assert_eq!(error.to_string(), "noting writes to RAM block ram: it does not migrate");
    }
}
