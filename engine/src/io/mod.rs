//! Guest memory to and from descriptors, by the kernel: no byte passes through a buffer of ours.

mod file;
mod iovec;
mod main_file;

pub(crate) use file::write_parts;
pub(crate) use iovec::{IoVecs, Ranges};
pub(crate) use main_file::MainFile;
