//! Guest RAM: the memory, its named blocks, which of their pages hold data, which of them are
//! dirty.

mod bitmap;
mod block;
mod changes;
mod digests;
mod holes;
mod mappings;
mod memory;
pub(crate) mod page_names;
mod page_table;

pub use bitmap::DirtyBitmap;
pub use block::{PAGE, RamBlock};
pub use changes::RamChanges;
pub use digests::hash;
pub use memory::HostMemory;

pub(crate) use bitmap::PAGES_PER_WORD;
pub(crate) use block::{PAGE_SIZE, READING};
pub(crate) use changes::{Attached, BlockChanges, Parts};
pub(crate) use digests::{PageDigests, zero_hash};
pub(crate) use mappings::{Absent, Mappings};
pub(crate) use page_table::{Found, PageTable};
