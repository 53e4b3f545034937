use super::*;
use crate::guest::HostMemory;

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
        // A file system may report more as data than was written, but what was written is never a hole.
        assert!([3, 4, 100, 255].iter().all(|page| data.contains(page)), "{data:?}");
    }
}
