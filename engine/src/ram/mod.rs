//! Guest RAM: the memory, its named blocks, which of their pages hold data, which of them are dirty.

mod bitmap;
mod block;
mod file_io;
mod holes;
mod memory;

pub use bitmap::DirtyBitmap;
pub use block::{PAGE, RamBlock};
pub use memory::HostMemory;

pub(crate) use bitmap::PAGES_PER_WORD;
pub(crate) use block::PAGE_SIZE;
pub(crate) use memory::{IoVecs, Ranges};
