//! Guest RAM: the memory, its named blocks, which of their pages hold data, which of them are dirty.

mod bitmap;
mod block;
mod file_io;
mod holes;
mod memory;
mod round;

pub use bitmap::DirtyBitmap;
pub use block::{PAGE, RamBlock};
pub use memory::HostMemory;
pub use round::{Batch, Claim, Round};

pub(crate) use block::PAGE_SIZE;
pub(crate) use memory::{IoVecs, Ranges};
