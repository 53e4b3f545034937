//! Memory that nothing has touched, found by one walk over all of a block.

use std::io;
use std::os::unix::fs::MetadataExt as _;

use vm_memory::FileOffset;

use super::{Absent, PageTable, State, scan};
use crate::guest::{DirtyBitmap, PAGE, RamBlock};

impl PageTable {
    /// One bit for each page of a block that may hold something else than zeros; all others are
    /// zero. `None`: the page table does not say.
    ///
    /// It costs a step for each page of 4 KiB that is there (1.2 ms a GiB), for each huge page, and
    /// for each 2 MiB or more that nothing has touched. hugetlbfs does not tell its holes
    /// otherwise: each would be read through its file.
    pub(crate) fn data_pages(&self, block: &RamBlock, absent: Absent) -> io::Result<Option<DirtyBitmap>> {
        let memory = block.memory();
        match (absent, memory.shared_file()) {
            (Absent::Zero, _) => Ok(self.held_pages(block)?.map(|(held, _)| held)),
            (Absent::InFile, Some(file)) if memory.is_huge() => {
                // Another mapping may have filled pages that this one does not have: then the file
                // has more than is present here. Asked before and behind the walk, so that nothing
                // which comes or goes meanwhile makes up for it.
                let before = allocated(file)?;
                let held = self.held_pages(block)?;
                let all_here =
                    |present: u64| present == before && allocated(file).is_ok_and(|now| now == before);
                Ok(held.and_then(|(held, present)| all_here(present).then_some(held)))
            }
            _ => Ok(None),
        }
    }

    /// What the page table has of a block, marks included, and bytes that are present.
    fn held_pages(&self, block: &RamBlock) -> io::Result<Option<(DirtyBitmap, u64)>> {
        let Some(files) = &self.files else { return Ok(None) };
        let (held, mut present) = (DirtyBitmap::new(block.pages()), 0);
        let base = block.memory().address();
        let page = |address: u64| usize::try_from((address - base) / PAGE as u64).map_err(io::Error::other);
        let walked = scan(&files.pagemap, base..base + block.used_len(), &mut |run, state| {
            if state == State::There {
                present += run.end - run.start;
            }
            let (first, end) = (page(run.start)?, page(run.end)?);
            held.set_range(first, end - first);
            Ok(())
        });
        match walked {
            Ok(()) => Ok(Some((held, present))),
            // A kernel without the request.
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOTTY | libc::EINVAL)) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// Bytes of pages that the file has.
fn allocated(file: &FileOffset) -> io::Result<u64> {
    Ok(file.file().metadata()?.blocks() * 512)
}
