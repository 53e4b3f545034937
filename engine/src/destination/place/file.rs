//! Pages placed by writes to the file that the memory is shared with.

use std::io;
use std::sync::MutexGuard;

use super::PlacePages;
use crate::guest::RamBlock;

/// Writes through the block's file.
pub(crate) struct FileWriter<'s>(#[expect(dead_code, reason = "held, not read")] Option<MutexGuard<'s, ()>>);

impl<'s> FileWriter<'s> {
    /// The one thread that writes through the file for as long as this lives.
    pub(super) fn alone(turn: MutexGuard<'s, ()>) -> Self {
        Self(Some(turn))
    }

    /// As [`PlacePages::place`], for content that lies in several places.
    pub(super) fn place_parts(&self, block: &RamBlock, offset: usize, parts: &[&[u8]]) -> io::Result<()> {
        block.memory().store(offset, parts)
    }

    /// One of several, for a block that cannot be written in any other way: the kernel has them
    /// wait for each other.
    pub(super) fn beside_others() -> Self {
        Self(None)
    }
}

impl PlacePages for FileWriter<'_> {
    fn place(
        &self,
        block: &RamBlock,
        offset: usize,
        content: &[u8],
        _: impl FnOnce() -> bool,
    ) -> io::Result<()> {
        self.place_parts(block, offset, &[content])
    }
}
