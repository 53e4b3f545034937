//! The content of pages, from /proc/PID/mem and from the files behind shared mappings.
//!
//! /proc/PID/mem rather than process_vm_readv: it takes the lock of the address space for one page
//! at a time, stays with the process when its number is reused, and leaves merged pages merged
//! (process_vm_readv pins pages, and the kernel unmerges every KSM page that is pinned).

use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::ops::Range;
use std::os::unix::fs::FileExt;

use rustix::fs::SeekFrom;
use rustix::io::Errno;

use super::super::{BATCH_PAGES, Batch, Extent, PAGE};
use super::held::{Mask, PageTable, STEP};
use super::maps::Mapping;
use super::pace::Pace;
use super::refusal::Target;

/// The blocks of a process, and the files that give access to their pages.
#[derive(Debug)]
pub(super) struct Content {
    table: PageTable,
    memory: File,
    blocks: Vec<Block>,
}

#[derive(Debug)]
struct Block {
    /// Addresses in the process.
    addresses: Range<u64>,
    /// The file behind a shared mapping, where it can be opened.
    file: Option<Backing>,
}

#[derive(Debug)]
struct Backing {
    file: File,
    /// Offset of the block's first byte in the file.
    offset: u64,
    /// Pages of the block that are not holes, in order.
    data: Vec<Range<u64>>,
}

impl Content {
    pub(super) fn open(target: &Target, mappings: &[Mapping]) -> io::Result<Self> {
        let table = PageTable::new(File::open(target.file("pagemap"))?);
        let memory = File::open(target.file("mem"))?;
        let block = |mapping: &Mapping| {
            Ok(Block { addresses: mapping.range.clone(), file: Backing::open(target, mapping)? })
        };
        Ok(Self { table, memory, blocks: mappings.iter().map(block).collect::<io::Result<_>>()? })
    }

    /// Whether the process still runs, with the memory that was found.
    pub(super) fn alive(&self) -> bool {
        // Address 0 is never mapped: an error while there is an address space, the end of the file
        // afterwards.
        !matches!(self.memory.read_at(&mut [0], 0), Ok(0))
    }

    #[cfg(test)]
    pub(super) fn forget_requests(&self) {
        self.table.forget_requests();
    }

    /// Number of blocks with a file that can be opened.
    #[cfg(test)]
    pub(super) fn files(&self) -> usize {
        self.blocks.iter().filter(|block| block.file.is_some()).count()
    }

    /// The pages held now.
    pub(super) fn extent(&self) -> io::Result<Extent> {
        let mut extent = Extent::default();
        let mut pace = Pace::start();
        for (number, block) in self.blocks.iter().enumerate() {
            extent.blocks.push(block.pages() * PAGE as u64);
            let mut add = |run| count(&mut extent.batches, number, run);
            if let Some(file) = &block.file {
                file.data.iter().cloned().for_each(add);
                continue;
            }
            for start in (0..block.pages()).step_by(usize::try_from(STEP_PAGES).unwrap_or(usize::MAX)) {
                block.held(&self.table, start..start + STEP_PAGES, &mut add)?;
                pace.rest();
            }
        }
        Ok(extent)
    }

    /// The held pages among these, which are at most [`BATCH_PAGES`]; counted from the first.
    pub(super) fn held(&self, block: usize, pages: Range<u64>) -> io::Result<Mask> {
        let mut mask = Mask::default();
        if let Some(block) = self.blocks.get(block) {
            let first = pages.start;
            block.held(&self.table, pages, &mut |run| mask.insert(run.start - first..run.end - first))?;
        }
        Ok(mask)
    }

    /// Appends these held pages to `into`, without those freed meanwhile and those that cannot be
    /// read.
    pub(super) fn read(&self, block: usize, pages: Range<u64>, into: &mut Vec<u8>) -> io::Result<()> {
        let Some(block) = self.blocks.get(block) else { return Ok(()) };
        let (file, offset) = match &block.file {
            Some(backing) => (&backing.file, backing.offset),
            None => (&self.memory, block.addresses.start),
        };
        let mut next = pages.start;
        while next < pages.end {
            let filled = into.len();
            into.resize(filled + usize::try_from((pages.end - next) * PAGE as u64).unwrap_or(0), 0);
            let fresh = into.get_mut(filled..).unwrap_or_default();
            let whole = match file.read_at(fresh, offset + next * PAGE as u64) {
                Ok(len) => len / PAGE,
                Err(error) if error.kind() == ErrorKind::Interrupted => {
                    into.truncate(filled);
                    continue;
                }
                // Freed meanwhile, beyond the end of its file, or secret memory (memfd_secret).
                Err(error) if matches!(error.raw_os_error(), Some(libc::EIO | libc::EFAULT)) => 0,
                Err(error) => return Err(error),
            };
            into.truncate(filled + whole * PAGE);
            next += whole.max(1) as u64;
        }
        Ok(())
    }
}

const STEP_PAGES: u64 = STEP / PAGE as u64;

impl Block {
    fn pages(&self) -> u64 {
        (self.addresses.end - self.addresses.start) / PAGE as u64
    }

    /// Calls `found` with the held pages among these, which may go beyond the block.
    fn held(
        &self,
        table: &PageTable,
        pages: Range<u64>,
        found: &mut impl FnMut(Range<u64>),
    ) -> io::Result<()> {
        let pages = pages.start..pages.end.min(self.pages());
        if let Some(file) = &self.file {
            file.held(pages, found);
            return Ok(());
        }
        let start = self.addresses.start;
        let addresses = start + pages.start * PAGE as u64..start + pages.end * PAGE as u64;
        table.held(addresses, |run| found(page(run.start - start)..page(run.end - start)))
    }
}

impl Backing {
    /// `None`: the mapping is private, or there is no permission to open the file.
    fn open(target: &Target, mapping: &Mapping) -> io::Result<Option<Self>> {
        if !mapping.shared() {
            return Ok(None);
        }
        let path = target.file(&format!("map_files/{:x}-{:x}", mapping.named.start, mapping.named.end));
        // Opening a device may have effects.
        if !fs::metadata(&path).is_ok_and(|metadata| metadata.is_file()) {
            return Ok(None);
        }
        let Ok(file) = File::open(path) else { return Ok(None) };
        let data = data(&file, mapping.offset..mapping.offset + mapping.len())?;
        Ok(Some(Self { file, offset: mapping.offset, data }))
    }

    fn held(&self, pages: Range<u64>, found: &mut impl FnMut(Range<u64>)) {
        let first = self.data.partition_point(|run| run.end <= pages.start);
        let runs = self.data.iter().skip(first).take_while(|run| run.start < pages.end);
        runs.for_each(|run| found(run.start.max(pages.start)..run.end.min(pages.end)));
    }
}

/// Pages of this part of a file that are not holes, counted from its start. A file system that does
/// not know its holes (hugetlbfs) reports none: slower, never wrong.
fn data(file: &File, part: Range<u64>) -> io::Result<Vec<Range<u64>>> {
    let mut pages = Vec::new();
    let mut position = part.start;
    while let Some(data) = seek(file, SeekFrom::Data(position))?.filter(|data| *data < part.end) {
        let hole = seek(file, SeekFrom::Hole(data))?.unwrap_or(part.end).min(part.end);
        // A page with any data is held.
        pages.push(page(data - part.start)..page(hole - part.start + PAGE as u64 - 1));
        position = hole;
    }
    Ok(pages)
}

/// `None`: there is no data, or hole, behind that position.
fn seek(file: &File, to: SeekFrom) -> io::Result<Option<u64>> {
    match rustix::fs::seek(file, to) {
        Ok(position) => Ok(Some(position)),
        Err(Errno::NXIO) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// The page of the byte at this offset.
fn page(offset: u64) -> u64 {
    offset / PAGE as u64
}

/// Adds a run of pages to the batches that it lies in. Runs come in order.
fn count(batches: &mut Vec<Batch>, block: usize, run: Range<u64>) {
    let mut next = run.start;
    while next < run.end {
        let number = next / BATCH_PAGES;
        let end = run.end.min((number + 1) * BATCH_PAGES);
        match batches.last_mut() {
            Some(last) if (last.block, last.number) == (block, number) => last.held += end - next,
            _ => batches.push(Batch { block, number, held: end - next }),
        }
        next = end;
    }
}
