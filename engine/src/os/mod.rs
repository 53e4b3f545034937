//! Interfaces of the kernel that no crate has: requests, page tables, userfaultfd.

pub(crate) mod ioctl;
pub(crate) mod memory;
pub(crate) mod pagemap;
mod retry;
pub(crate) mod userfaultfd;

pub(crate) use retry::retry;
