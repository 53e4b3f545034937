//! The guest's memory: its extent, and the content of parts of it.

mod process;
mod stored;
mod stream;

use std::path::Path;
use std::time::Duration;

pub(super) use process::pace::politely;
pub use process::refusal::ProcessError;

use super::Result;
use crate::at_rest::AtRest;

/// The memory of the guest at `path`. `progress` gets the position in a stream, and its length.
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

/// Pages of a batch: the most that one packet carries.
pub(super) const BATCH_PAGES: u64 = 128;

/// Bytes of a page.
pub(super) const PAGE: usize = multifd_engine::PAGE;

/// Neighbouring pages that one packet would carry, some of which may hold data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Batch {
    pub(super) block: usize,
    /// Number within the block: the first page's, divided by [`BATCH_PAGES`].
    pub(super) number: u64,
    /// Held pages, which may be other than zero: 1 to [`BATCH_PAGES`].
    pub(super) held: u64,
}

/// Sizes of a guest's memory.
#[derive(Clone, Debug, Default)]
pub(super) struct Extent {
    /// Bytes of each block.
    pub(super) blocks: Vec<u64>,
    /// Batches with at least one held page, in order.
    pub(super) batches: Vec<Batch>,
    /// Bytes of device state, where known.
    pub(super) device_bytes: u64,
}

impl Extent {
    /// Bytes of all blocks.
    pub(super) fn bytes(&self) -> u64 {
        self.blocks.iter().sum()
    }

    /// Bytes of all held pages.
    pub(super) fn held_bytes(&self) -> u64 {
        self.batches.iter().map(|batch| batch.held * PAGE as u64).sum()
    }
}

/// A source of pages.
pub(super) trait Memory: Send {
    /// The name in findings and errors.
    fn name(&self) -> String;

    /// Its sizes; found without reading pages, where possible.
    fn extent(&self) -> &Extent;

    /// The held pages of each of these batches, back to back. `wanted` is in order.
    ///
    /// A process may free or touch pages meanwhile, so there can be fewer or more than counted.
    /// `progress` gets the bytes read so far.
    fn read(&mut self, wanted: &[Batch], progress: &dyn Fn(u64)) -> Result<Vec<Vec<u8>>>;

    /// Pages written during the sampling. `None`: the guest is paused or at rest.
    fn rewrites(&mut self) -> Result<Option<Rewrites>>;
}

/// Pages that a guest writes again.
#[derive(Clone, Debug, Default)]
pub(super) struct Rewrites {
    /// Distinct bytes of pages changed after a time, scaled to all memory; both rise. Empty: the
    /// times are not known.
    pub(super) changed: Vec<(Duration, u64)>,
    /// Pages in two versions, before and after; at most [`MAX_PAIRS`].
    pub(super) pairs: Vec<[Box<[u8; PAGE]>; 2]>,
}

/// Most pages kept in two versions: 32 MiB.
pub(super) const MAX_PAIRS: usize = 4096;
