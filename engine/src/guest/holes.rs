//! Which pages of a block hold data, found without reading them.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use super::{DirtyBitmap, PAGE, RamBlock};

impl RamBlock {
    /// One bit for each page that may hold something else than zeros. `None`: not known, every page
    /// has to be looked at.
    ///
    /// Asks the file behind the block for its holes (SEEK_DATA, SEEK_HOLE). Memory without a file
    /// of its own, and file systems that do not know their holes, give `None` or report everything
    /// as data: slower, never wrong. What was written to a private mapping is not in its file,
    /// which says nothing then.
    ///
    /// # Errors
    /// When the file system refuses to answer.
    pub fn data_pages(&self) -> io::Result<Option<DirtyBitmap>> {
        if self.memory().shared_file().is_none() {
            return Ok(None);
        }
        let (bitmap, pages) = (DirtyBitmap::new(self.pages()), self.pages());
        let mut first = self.next_data(0, pages)?;
        while first < pages {
            let end = self.next_hole(first, pages)?;
            bitmap.set_range(first, end - first);
            first = self.next_data(end, pages)?;
        }
        Ok(Some(bitmap))
    }

    /// The first page from `page` on that the file behind the block holds data of, at most `end`.
    /// Without a file, every page does.
    pub(super) fn next_data(&self, page: usize, end: usize) -> io::Result<usize> {
        let Some(file) = self.memory().file() else { return Ok(page) };
        let place = |page: usize| file.start() + (page * PAGE) as u64;
        match seek(file.file(), place(page), libc::SEEK_DATA)? {
            Some(data) => Ok(page_of(data - file.start()).clamp(page, end)),
            None => check_length(file.file(), place(end)).map(|()| end),
        }
    }

    /// The first page behind `page`, which holds data, that holds none, at most `end`. A page that
    /// is data in part counts as data. The kernel walks all the way to it.
    fn next_hole(&self, page: usize, end: usize) -> io::Result<usize> {
        let Some(file) = self.memory().file() else { return Ok(end) };
        let hole = seek(file.file(), file.start() + (page * PAGE) as u64, libc::SEEK_HOLE)?;
        let hole = hole.map_or(end, |hole| page_of((hole - file.start()).saturating_add(PAGE as u64 - 1)));
        Ok(hole.clamp(page + 1, end))
    }
}

/// Past the last data there is a hole up to the end of the file, and nothing behind that.
fn check_length(file: &File, needed: u64) -> io::Result<()> {
    let metadata = file.metadata()?;
    if metadata.is_file() && metadata.len() < needed {
        let text = format!("the file behind it ends at byte {}, expected {needed} or more", metadata.len());
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, text));
    }
    Ok(())
}

fn page_of(offset: u64) -> usize {
    usize::try_from(offset / PAGE as u64).unwrap_or(usize::MAX)
}

/// `None`: there is nothing of that kind from `from` on.
fn seek(file: &File, from: u64, whence: i32) -> io::Result<Option<u64>> {
    let from = i64::try_from(from).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    match lseek(file, from, whence) {
        Ok(found) => Ok(u64::try_from(found).ok()),
        Err(error) if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
        Err(error) => Err(error),
    }
}

#[expect(unsafe_code, reason = "std knows no SEEK_DATA")]
fn lseek(file: &File, from: i64, whence: i32) -> io::Result<i64> {
    // SAFETY: the descriptor is open; the call touches no memory. No code reads this file by
    // position.
    match unsafe { libc::lseek(file.as_raw_fd(), from, whence) } {
        -1 => Err(io::Error::last_os_error()),
        found => Ok(found),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::guest::HostMemory;

    #[test]
    fn holes_of_a_sparse_file_are_found() {
        let file = tempfile::tempfile().unwrap();
        let pages = 4096;
        file.set_len((pages * PAGE) as u64).unwrap();
        let touched = [0, 700, 701, 4095];
        for page in touched {
            file.write_all_at(&[1], (page * PAGE + 5) as u64).unwrap();
        }
        let memory = HostMemory::map_file(file, pages * PAGE).unwrap();
        let data = RamBlock::new("ram".try_into().unwrap(), memory).data_pages().unwrap().unwrap();
        assert!(touched.iter().all(|page| data.test(*page)));
        // A file system may report more as data than was written, but not a hole of many megabytes.
        assert!(data.count() < 64, "{} pages", data.count());
    }

    /// The guest's pages are copies then, of which the file knows nothing.
    #[test]
    fn a_private_mapping_of_a_file_is_not_known() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(PAGE as u64).unwrap();
        let region = vm_memory::mmap::MmapRegionBuilder::<()>::new(PAGE)
            .with_file_offset(vm_memory::FileOffset::new(file, 0))
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_PRIVATE)
            .build()
            .unwrap();
        let memory = HostMemory::from_region(std::sync::Arc::new(region)).unwrap();
        memory.slice(0, 4).unwrap().copy_from(&[1_u8; 4]);
        assert!(RamBlock::new("ram".try_into().unwrap(), memory).data_pages().unwrap().is_none());
    }

    #[test]
    fn anonymous_memory_is_not_known() {
        let block = RamBlock::new("ram".try_into().unwrap(), HostMemory::anonymous(PAGE).unwrap());
        assert!(block.data_pages().unwrap().is_none());
    }
}
