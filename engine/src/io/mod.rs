//! Guest memory to and from descriptors, by the kernel: no byte passes through a buffer of ours.

mod file;
mod iovec;

pub(crate) use iovec::{IoVecs, Ranges};
