//! Which pages of a block are there, and which can be read, found without touching them.
//!
//! ```text
//!  what the page table says           what the page is                    what is done
//!   present, mapped for reading        there                               loads
//!   present, not mapped for reading    there, out of reach                 an error
//!   swapped, marked                    there, somewhere                    faulted in by the kernel: an error, not a signal
//!   nothing, private memory            never populated, or given back      zero, unread
//!   nothing, a file behind it          a hole of the file: the same        zero, unread
//!                                      data of the file                    faulted in by the kernel
//! ```
//!
//! What remains is a mapping that is protected, or a file that is cut, between this look and the
//! load: some microseconds.

use std::fs::File;
use std::io;
use std::mem::size_of;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};

use super::mappings::Absent;
use super::{PAGE, RamBlock};
use crate::os::pagemap::{PageQuery, PageRun};

/// The page table of this process.
#[derive(Debug)]
pub(crate) struct PageTable {
    /// `None`: without /proc, every page is faulted in before it is read.
    files: Option<Files>,
    /// The kernel knows no PAGEMAP_SCAN (before Linux 6.7).
    no_scan: AtomicBool,
    /// The kernel knows no PROCMAP_QUERY (before Linux 6.11): present pages are faulted in, too.
    no_query: AtomicBool,
}

#[derive(Debug)]
struct Files {
    pagemap: File,
    maps: File,
}

/// What was found of some pages, in their order. Kept from batch to batch.
#[derive(Debug, Default)]
pub(crate) struct Found(Vec<State>);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Zero, and not to be touched.
    Zero,
    /// Not in the page table.
    Absent,
    /// To be faulted in by the kernel.
    Fault,
    /// Loads are safe.
    There,
}

/// A page that cannot be read.
#[derive(Debug)]
pub(crate) struct Unreadable {
    pub(crate) page: usize,
    pub(crate) cause: io::Error,
}

/// Neighbouring pages in one state.
#[derive(Clone)]
struct Run {
    /// Where they are among the pages that were asked for.
    indices: Range<usize>,
    /// The first of them, in its block.
    first: usize,
}

/// Longest gap between two queried pages that is queried with them: cheaper than a second call.
const WIDEST_GAP: usize = 64;

impl Found {
    /// One for each page: true if it is known to be zero. It must not be touched then.
    pub(crate) fn zeros(&self) -> impl Iterator<Item = bool> {
        self.0.iter().map(|state| *state == State::Zero)
    }

    /// `count` pages that are known to be zero.
    pub(crate) fn all_zero(&mut self, count: usize) {
        self.0.clear();
        self.0.resize(count, State::Zero);
    }

    /// Among what was found, each page for which `zero` says so is zero: what was found is of the
    /// others.
    pub(crate) fn insert_zeros(&mut self, zero: impl Iterator<Item = bool>) {
        let mut others = std::mem::take(&mut self.0).into_iter();
        self.0.extend(zero.map_while(|zero| if zero { Some(State::Zero) } else { others.next() }));
    }

    fn runs(&self, pages: &[usize], wanted: State) -> Vec<Run> {
        let mut runs: Vec<Run> = Vec::new();
        for (index, (page, state)) in pages.iter().zip(&self.0).enumerate() {
            if *state != wanted {
                continue;
            }
            match runs.last_mut() {
                Some(run) if run.indices.end == index && run.pages().end == *page => run.indices.end += 1,
                _ => runs.push(Run { indices: index..index + 1, first: *page }),
            }
        }
        runs
    }

    fn set(&mut self, indices: Range<usize>, state: State) -> io::Result<()> {
        let count = self.0.len();
        let states = self.0.get_mut(indices.clone());
        let outside = || io::Error::other(format!("pages {indices:?} of {count} (a bug in multifd)"));
        states.ok_or_else(outside).map(|states| states.fill(state))
    }
}

impl Run {
    fn pages(&self) -> Range<usize> {
        self.first..self.first + self.indices.len()
    }
}

impl PageTable {
    pub(crate) fn of_this_process() -> Self {
        let files = || {
            io::Result::Ok(Files {
                pagemap: File::open("/proc/self/pagemap")?,
                maps: File::open("/proc/self/maps")?,
            })
        };
        let files = files().inspect_err(|error| {
            tracing::warn!(%error, "without /proc, every page of the guest is faulted in");
        });
        Self { files: files.ok(), no_scan: AtomicBool::default(), no_query: AtomicBool::default() }
    }

    /// Finds out what `pages` of a block are; they are in ascending order. Afterwards, those that
    /// are not known to be zero can be loaded from.
    pub(crate) fn look(
        &self,
        block: &RamBlock,
        absent: Absent,
        pages: &[usize],
        found: &mut Found,
    ) -> Result<(), Unreadable> {
        found.0.clear();
        found.0.resize(pages.len(), State::Absent);
        let Some(first) = pages.first() else { return Ok(()) };
        if let Some(files) = &self.files {
            self.find_held(files, block, pages, found)
                .and_then(|()| drop_marks(files, block, pages, found))
                .map_err(|cause| Unreadable { page: *first, cause })?;
            self.check_protection(files, block, pages, found)?;
        }
        let absent = if self.files.is_none() && absent == Absent::Zero { Absent::Unknown } else { absent };
        if absent == Absent::Zero {
            for state in found.0.iter_mut().filter(|state| **state == State::Absent) {
                *state = State::Zero;
            }
            return fault_in(block, pages, found);
        }
        for run in found.runs(pages, State::Absent) {
            let unreadable = |cause| Unreadable { page: run.first, cause };
            found.set(run.indices.clone(), State::Fault).map_err(unreadable)?;
            if absent == Absent::InFile {
                ask_file(block, run.pages(), |hole| {
                    let start = run.indices.start + (hole.start - run.first);
                    found.set(start..start + hole.len(), State::Zero)
                })
                .map_err(unreadable)?;
            }
        }
        fault_in(block, pages, found)
    }

    /// Marks what the page table has.
    fn find_held(
        &self,
        files: &Files,
        block: &RamBlock,
        pages: &[usize],
        found: &mut Found,
    ) -> io::Result<()> {
        let base = block.memory().address();
        let mut rest = pages;
        while let Some(first) = rest.first() {
            let near = |pair: &&[usize]| matches!(pair, [page, next] if next - page <= WIDEST_GAP);
            let (span, later) = rest.split_at(1 + rest.windows(2).take_while(near).count());
            let last = span.last().unwrap_or(first);
            let within = base + (first * PAGE) as u64..base + ((last + 1) * PAGE) as u64;
            self.held(files, within, |addresses, state| {
                let index =
                    |address: u64| pages.partition_point(|page| address > base + (page * PAGE) as u64);
                found.set(index(addresses.start)..index(addresses.end), state)
            })?;
            rest = later;
        }
        Ok(())
    }

    fn held(
        &self,
        files: &Files,
        within: Range<u64>,
        mut each: impl FnMut(Range<u64>, State) -> io::Result<()>,
    ) -> io::Result<()> {
        if !self.no_scan.load(Ordering::Relaxed) {
            match scan(&files.pagemap, within.clone(), &mut each) {
                // The former from a kernel without the request, the latter from one that knows it
                // otherwise.
                Err(error) if matches!(error.raw_os_error(), Some(libc::ENOTTY | libc::EINVAL)) => {
                    self.no_scan.store(true, Ordering::Relaxed);
                }
                done => return done,
            }
        }
        read_entries(&files.pagemap, within, each)
    }

    /// Present pages are there if they are mapped for reading.
    fn check_protection(
        &self,
        files: &Files,
        block: &RamBlock,
        pages: &[usize],
        found: &mut Found,
    ) -> Result<(), Unreadable> {
        let base = block.memory().address();
        let mut readable = 0..0;
        for (page, state) in pages.iter().zip(&mut found.0) {
            let address = base + (page * PAGE) as u64;
            if *state != State::There || readable.contains(&address) {
                continue;
            }
            if self.no_query.load(Ordering::Relaxed) {
                *state = State::Fault;
                continue;
            }
            match readable_mapping(&files.maps, address) {
                Ok(range) => readable = range,
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {
                    let cause = io::Error::from_raw_os_error(libc::EFAULT);
                    return Err(Unreadable { page: *page, cause });
                }
                Err(_) => {
                    self.no_query.store(true, Ordering::Relaxed);
                    *state = State::Fault;
                }
            }
        }
        Ok(())
    }
}

/// In memory or in swap, and not the kernel's page of zeros.
const HELD: PageQuery = PageQuery {
    all: PageQuery::ZERO,
    any: PageQuery::PRESENT | PageQuery::SWAPPED,
    inverted: PageQuery::ZERO,
    told: PageQuery::PRESENT,
};

fn scan(
    pagemap: &File,
    within: Range<u64>,
    each: &mut impl FnMut(Range<u64>, State) -> io::Result<()>,
) -> io::Result<()> {
    let mut runs = [PageRun::default(); 32];
    let mut start = within.start;
    while start < within.end {
        let (filled, walked) = HELD.scan(pagemap, start..within.end, &mut runs)?;
        for run in runs.iter().take(filled) {
            each(run.start..run.end, if run.is_present() { State::There } else { State::Fault })?;
        }
        if walked <= start {
            return Err(io::ErrorKind::WriteZero.into());
        }
        start = walked;
    }
    Ok(())
}

/// An entry of 64 bits for each page: Documentation/admin-guide/mm/pagemap.rst. It does not tell
/// zero pages apart.
fn read_entries(
    pagemap: &File,
    within: Range<u64>,
    mut each: impl FnMut(Range<u64>, State) -> io::Result<()>,
) -> io::Result<()> {
    const PRESENT: u64 = 1 << 63;
    const SWAPPED: u64 = 1 << 62;
    const ENTRY: usize = size_of::<u64>();
    let mut bytes = [0; 64 * ENTRY];
    let mut address = within.start;
    while address < within.end {
        let left = usize::try_from((within.end - address) / PAGE as u64).map_or(64, |left| left.min(64));
        let (part, _) = bytes.split_at_mut(left * ENTRY);
        pagemap.read_exact_at(part, address / PAGE as u64 * ENTRY as u64)?;
        for entry in part.as_chunks::<ENTRY>().0 {
            let entry = u64::from_ne_bytes(*entry);
            let end = address + PAGE as u64;
            if entry & (PRESENT | SWAPPED) != 0 {
                each(address..end, if entry & PRESENT != 0 { State::There } else { State::Fault })?;
            }
            address = end;
        }
    }
    Ok(())
}

/// A huge page is never swapped: what looks so is the mark of a userfaultfd on a page that is not
/// there, a page that was poisoned, or one on its way to another place. To fault in the mark of a
/// write-protected page would take a huge page from the pool.
fn drop_marks(files: &Files, block: &RamBlock, pages: &[usize], found: &mut Found) -> io::Result<()> {
    if !block.memory().is_huge() {
        return Ok(());
    }
    for run in found.runs(pages, State::Fault) {
        let resident = block.memory().resident(run.first * PAGE, run.indices.len())?;
        let pages = run.indices.clone().zip(run.pages()).zip(resident);
        for (index, page) in pages.filter_map(|(at, there)| (!there).then_some(at)) {
            if is_protected(&files.pagemap, block.memory().address() + (page * PAGE) as u64)? {
                found.set(index..index + 1, State::Absent)?;
            }
        }
    }
    Ok(())
}

/// Whether a userfaultfd has write-protected the page (bit 57 of its entry).
fn is_protected(pagemap: &File, address: u64) -> io::Result<bool> {
    let mut entry = [0; size_of::<u64>()];
    pagemap.read_exact_at(&mut entry, address / PAGE as u64 * size_of::<u64>() as u64)?;
    Ok(u64::from_ne_bytes(entry) >> 57 & 1 == 1)
}

/// Has the kernel make the pages that loads would fault on.
fn fault_in(block: &RamBlock, pages: &[usize], found: &mut Found) -> Result<(), Unreadable> {
    for run in found.runs(pages, State::Fault) {
        let pages = run.pages();
        if block.memory().populate_to_read(pages.start * PAGE, pages.len() * PAGE).is_err() {
            // Again one by one, to name the first that fails.
            for page in pages {
                block
                    .memory()
                    .populate_to_read(page * PAGE, PAGE)
                    .map_err(|cause| Unreadable { page, cause })?;
            }
        }
        let first = run.first;
        found.set(run.indices, State::There).map_err(|cause| Unreadable { page: first, cause })?;
    }
    Ok(())
}

/// Tells `hole` of those `pages` that are zero in the file behind the block.
fn ask_file(
    block: &RamBlock,
    pages: Range<usize>,
    mut hole: impl FnMut(Range<usize>) -> io::Result<()>,
) -> io::Result<()> {
    if block.memory().is_huge() {
        // hugetlbfs does not tell its holes, but reads them without filling them.
        let mut content = [0; PAGE];
        for page in pages {
            block.memory().read_file(page * PAGE, &mut content)?;
            if multifd_codecs::zero::is_zero(&content) {
                hole(page..page + 1)?;
            }
        }
        return Ok(());
    }
    // What is in the page cache is asked by mincore, which looks at these pages only: SEEK_HOLE
    // walks to the end of the data, however far that is behind them.
    let Ok(resident) = block.memory().resident(pages.start * PAGE, pages.len()) else {
        return Ok(()); // Not mapped, at least in part: faulting it in tells which page.
    };
    let mut holes_end = pages.start;
    for (page, resident) in pages.clone().zip(resident) {
        if resident || page < holes_end {
            continue;
        }
        holes_end = block.next_data(page, pages.end)?;
        if holes_end > page {
            hole(page..holes_end)?;
        }
    }
    Ok(())
}

/// The mapping around an address that can be read. ENOENT: there is none; ENOTTY: the kernel does
/// not know the request.
#[expect(unsafe_code, reason = "the request has no safe wrapper")]
fn readable_mapping(maps: &File, address: u64) -> io::Result<Range<u64>> {
    let mut query = MappingQuery {
        size: size_of::<MappingQuery>() as u64,
        flags: PROCMAP_QUERY_VMA_READABLE,
        address,
        ..MappingQuery::default()
    };
    // SAFETY: the descriptor is open; the request reads and writes a MappingQuery, of the size
    // given.
    match unsafe { libc::ioctl(maps.as_raw_fd(), PROCMAP_QUERY, &raw mut query) } {
        0 => Ok(query.start..query.end),
        _ => Err(io::Error::last_os_error()),
    }
}

const PROCMAP_QUERY_VMA_READABLE: u64 = 1;

/// `_IOWR('f', 17, struct procmap_query)`
const PROCMAP_QUERY: libc::Ioctl = 0xc068_6611;

/// struct procmap_query of linux/fs.h.
#[repr(C)]
#[derive(Default)]
struct MappingQuery {
    size: u64,
    flags: u64,
    address: u64,
    start: u64,
    end: u64,
    mapping_flags: u64,
    page_size: u64,
    offset: u64,
    inode: u64,
    device: [u32; 2],
    name_size: u32,
    build_id_size: u32,
    name: u64,
    build_id: u64,
}

// The size is part of the request's number.
const _: () = assert!(size_of::<MappingQuery>() == 0x68);

#[cfg(test)]
mod tests;
mod walk;
