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
        let memory = block.memory();
        if present() { memory.store_present(offset, content) } else { memory.store_mapped(offset, content) }
    }
}
