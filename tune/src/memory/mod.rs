//! The memory that would be moved: how much of it there is, and a look at parts of it.

mod process;
mod stored;
mod stream;

use std::path::Path;
use std::time::Duration;

pub(super) use process::pace::politely;

use super::Result;
use crate::at_rest::AtRest;

/// What is at `path`. `progress` hears how far a stream has been read, and how long it is.
pub(super) fn open(path: &Path, progress: &dyn Fn(u64, u64)) -> Result<Box<dyn Memory>> {
    Ok(match AtRest::at(path)? {
        AtRest::Checkpoint(directory) => Box::new(stored::Stored::open(&directory)?),
        AtRest::Stream(path, offset) => Box::new(stream::Stream::open(&path, offset, progress)?),
    })
}

/// The memory of a live process.
pub(super) fn of_process(pid: u32) -> Result<Box<dyn Memory>> {
    Ok(Box::new(process::open(pid)?))
}

/// Pages of a batch: what one packet carries at most.
pub(super) const BATCH_PAGES: u64 = 128;

/// Bytes of a page.
pub(super) const PAGE: usize = multifd_engine::PAGE;

/// Neighbouring pages that one packet would carry, of which some may hold data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Batch {
    pub(super) block: usize,
    /// Within the block; its first page is this times [`BATCH_PAGES`].
    pub(super) number: u64,
    /// Pages that may hold something else than zeros, 1 to [`BATCH_PAGES`].
    pub(super) held: u64,
}

/// How much memory there is.
#[derive(Clone, Debug, Default)]
pub(super) struct Extent {
    /// Bytes of each block.
    pub(super) blocks: Vec<u64>,
    /// Those with at least one held page, in order.
    pub(super) batches: Vec<Batch>,
    /// What the devices add, as far as it is known.
    pub(super) device_bytes: u64,
}

impl Extent {
    /// Of all blocks.
    pub(super) fn bytes(&self) -> u64 {
        self.blocks.iter().sum()
    }

    /// Of all held pages.
    pub(super) fn held_bytes(&self) -> u64 {
        self.batches.iter().map(|batch| batch.held * PAGE as u64).sum()
    }
}

/// Where pages come from.
pub(super) trait Memory: Send {
    /// What to call it.
    fn name(&self) -> String;

    /// How much there is, found without looking at the content of pages, where that can be.
    fn extent(&self) -> &Extent;

    /// The content of some batches, which are given in order: for each the pages that are held, back to back.
    ///
    /// A process may have given up a page meanwhile, or found another: there can be fewer or more than were counted.
    /// `progress` hears how many bytes have been read.
    fn read(&mut self, wanted: &[Batch], progress: &dyn Fn(u64)) -> Result<Vec<Vec<u8>>>;

    /// Pages that were written while somebody looked. `None`: this memory stands still.
    fn rewrites(&mut self) -> Result<Option<Rewrites>>;
}

/// What a guest writes.
#[derive(Clone, Debug, Default)]
pub(super) struct Rewrites {
    /// Distinct bytes of pages that had changed after a time, over all memory; both rise. Empty: not known, only what the
    /// pages were before and after.
    pub(super) changed: Vec<(Duration, u64)>,
    /// Pages before and after, at most [`MAX_PAIRS`].
    pub(super) pairs: Vec<[Box<[u8; PAGE]>; 2]>,
}

/// Most pages that are kept in two versions: 32 MiB.
pub(super) const MAX_PAIRS: usize = 4096;
