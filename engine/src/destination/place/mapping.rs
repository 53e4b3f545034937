//! Pages placed by stores to the mapping.

use std::io;

use super::PlacePages;
use crate::guest::RamBlock;

/// Stores to the mapping, after the kernel has made sure that pages which are not known to be there
/// can be.
pub(crate) struct Mapping;

impl PlacePages for Mapping {
    fn place(
        &self,
        block: &RamBlock,
        offset: usize,
        content: &[u8],
        present: impl FnOnce() -> bool,
    ) -> io::Result<()> {
        self.place_parts(block, offset, &[content], present)
    }
}

impl Mapping {
    /// As [`PlacePages::place`], for content that lies in several places.
    pub(super) fn place_parts(
        &self,
        block: &RamBlock,
        offset: usize,
        parts: &[&[u8]],
        present: impl FnOnce() -> bool,
    ) -> io::Result<()> {
        let memory = block.memory();
        if present() { memory.store_present(offset, parts) } else { memory.store_mapped(offset, parts) }
    }
}
