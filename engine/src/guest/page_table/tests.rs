use std::sync::Arc;

use vm_memory::{FileOffset, MmapRegion};

use super::*;
use crate::guest::HostMemory;

#[path = "../../../tests/dirty/huge_pages.rs"]
mod huge_pages;
#[path = "../../../tests/dirty/skip.rs"]
mod skip;

const PAGES: usize = 256;

/// With pages 0, 5..8 and 200 written.
fn block() -> RamBlock {
    let block = RamBlock::new("ram".try_into().unwrap(), HostMemory::anonymous(PAGES * PAGE).unwrap());
    for page in [0, 5, 6, 7, 200] {
        block.memory().slice(page * PAGE, 1).unwrap().copy_from(&[1_u8]);
    }
    block
}

fn kernels() -> [PageTable; 3] {
    let [new, without_query, old] = std::array::from_fn(|_| PageTable::of_this_process());
    without_query.no_query.store(true, Ordering::Relaxed);
    old.no_query.store(true, Ordering::Relaxed);
    old.no_scan.store(true, Ordering::Relaxed);
    [new, without_query, old]
}

#[test]
fn every_kernel_tells_what_was_never_populated() {
    for (kernel, table) in kernels().iter().enumerate() {
        let block = block();
        let mut found = Found::default();
        // Neighbours, gaps that are walked over, one that is not, and the last page.
        let pages = [0, 1, 2, 5, 7, 8, 40, 199, 200, 255];
        table.look(&block, Absent::Zero, &pages, &mut found).unwrap();
        let held: Vec<_> =
            pages.iter().zip(found.zeros()).filter(|(_, zero)| !zero).map(|(page, _)| *page).collect();
        assert_eq!(held, [0, 5, 7, 200], "{kernel}");
    }
}

#[test]
fn every_kernel_refuses_pages_without_access() {
    for (kernel, table) in kernels().iter().enumerate() {
        let block = block();
        let slice = block.memory().slice(6 * PAGE, 4 * PAGE).unwrap();
        #[expect(unsafe_code, reason = "protection has no safe wrapper")]
        // SAFETY: the range is mapped, and only read where that is known to be safe.
        let done =
            unsafe { libc::mprotect(slice.ptr_guard_mut().as_ptr().cast(), slice.len(), libc::PROT_NONE) };
        assert_eq!(done, 0);
        let mut found = Found::default();
        let bad = table.look(&block, Absent::Zero, &[0, 5, 7, 8, 9], &mut found).unwrap_err();
        assert_eq!((bad.page, bad.cause.raw_os_error()), (7, Some(libc::EFAULT)), "{kernel}");
        table.look(&block, Absent::Zero, &[0, 5, 8, 9], &mut found).unwrap();
        assert_eq!(found.zeros().collect::<Vec<_>>(), [false, false, true, true], "{kernel}");
        let error = block.fault("reading", 7..8, bad.cause).to_string();
        assert!(error.contains("pages 6..10 of RAM block ram") && error.contains("PROT_NONE"), "{error}");
    }
}

#[test]
fn without_proc_everything_is_faulted_in() {
    let table = PageTable { files: None, no_scan: AtomicBool::default(), no_query: AtomicBool::default() };
    let mut found = Found::default();
    table.look(&block(), Absent::Zero, &[0, 1, 5], &mut found).unwrap();
    assert!(found.zeros().all(|zero| !zero));
}

/// Pages of the file that this process has not mapped yet: data, and holes between them.
#[test]
fn holes_of_a_file_are_told_from_data_that_is_not_mapped() {
    use std::os::unix::fs::FileExt;

    let file = tempfile::tempfile().unwrap();
    file.set_len((PAGES * PAGE) as u64).unwrap();
    for page in [3, 4, 100, 255] {
        file.write_all_at(&[1], (page * PAGE + 5) as u64).unwrap();
    }
    let block = RamBlock::new("ram".try_into().unwrap(), HostMemory::map_file(file, PAGES * PAGE).unwrap());
    let mut found = Found::default();
    for table in kernels() {
        let pages = [2, 3, 4, 5, 6, 99, 100, 101, 254, 255];
        table.look(&block, Absent::InFile, &pages, &mut found).unwrap();
        let data: Vec<_> =
            pages.iter().zip(found.zeros()).filter(|(_, zero)| !zero).map(|(page, _)| *page).collect();
        // A file system may report more as data than was written, but what was written is never a
        // hole.
        assert!([3, 4, 100, 255].iter().all(|page| data.contains(page)), "{data:?}");
    }
}

const HUGE: usize = (2 << 20) / PAGE;

fn huge_block(file: Option<&File>, flags: i32) -> RamBlock {
    let file = file.map(|file| FileOffset::new(file.try_clone().unwrap(), 0));
    let (access, flags) = (libc::PROT_READ | libc::PROT_WRITE, flags | libc::MAP_NORESERVE);
    let region = MmapRegion::<()>::build(file, 3 * HUGE * PAGE, access, flags).unwrap();
    RamBlock::new("ram".try_into().unwrap(), HostMemory::from_region(Arc::new(region)).unwrap())
}

fn huge_file() -> Option<File> {
    use std::os::fd::FromRawFd as _;
    #[expect(unsafe_code, reason = "std knows no memfd")]
    // SAFETY: the name is a C string.
    let fd = unsafe { libc::memfd_create(c"guest".as_ptr(), libc::MFD_HUGETLB | libc::MFD_CLOEXEC) };
    #[expect(unsafe_code, reason = "a descriptor from the kernel")]
    // SAFETY: a new descriptor that nothing else owns.
    let file = (fd >= 0).then(|| unsafe { File::from_raw_fd(fd) })?;
    file.set_len((3 * HUGE * PAGE) as u64).unwrap();
    Some(file)
}

/// Pages that may hold data: the first of each run, and the one behind it.
fn data(block: &RamBlock, absent: Absent) -> Option<Vec<(usize, usize)>> {
    let data = PageTable::of_this_process().data_pages(block, absent).unwrap()?;
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for page in (0..block.pages()).filter(|page| data.test(*page)) {
        match runs.last_mut().filter(|(_, end)| *end == page) {
            Some((_, end)) => *end += 1,
            None => runs.push((page, page + 1)),
        }
    }
    Some(runs)
}

#[test]
fn untouched_memory_is_known_from_one_walk() {
    assert_eq!(data(&block(), Absent::Zero), Some(vec![(0, 1), (5, 8), (200, 201)]));
    assert_eq!(data(&block(), Absent::InFile), None, "its file is asked for its holes");
    let [_, _, old] = kernels();
    assert!(old.data_pages(&block(), Absent::Unknown).unwrap().is_none());
}

#[test]
fn untouched_huge_pages_are_known_from_one_walk() {
    let private = huge_block(None, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB);
    assert_eq!(data(&private, Absent::Zero), Some(Vec::new()));
    let Some(file) = huge_file() else { return skip::skipped("no hugetlbfs here") };
    let shared = huge_block(Some(&file), libc::MAP_SHARED);
    assert_eq!(data(&shared, Absent::InFile), Some(Vec::new()));

    let _pool = match huge_pages::HugePages::reserve(4) {
        Ok(pool) => pool,
        Err(why) => return skip::skipped(&why),
    };
    for block in [&private, &shared] {
        let touched = block.memory().populate_to_write(HUGE * PAGE + 5 * PAGE, PAGE);
        if touched.is_err() {
            return skip::skipped("other programs use up the pool of huge pages");
        }
    }
    let middle = Some(vec![(HUGE, 2 * HUGE)]);
    assert_eq!((data(&private, Absent::Zero), data(&shared, Absent::InFile)), (middle.clone(), middle));
    // Another process has written what this one has not mapped yet.
    let theirs = huge_block(Some(&file), libc::MAP_SHARED);
    if theirs.memory().populate_to_write(0, PAGE).is_err() {
        return skip::skipped("other programs use up the pool of huge pages");
    }
    assert_eq!(data(&shared, Absent::InFile), None);
}
