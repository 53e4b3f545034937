//! Memory that a back-end shares with us, and a descriptor that the vhost crate lends.
#![expect(unsafe_code, reason = "shared memory, and a descriptor of a foreign type, have no safe wrapper")]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::slice;
use std::sync::atomic::AtomicU64;

use crate::guest::HostMemory;

/// A memfd of `len` bytes, all zero, sealed against a change of size: a back-end that cut it would
/// kill this process by SIGBUS.
pub(super) fn sealed_memfd(name: &std::ffi::CStr, len: u64) -> io::Result<File> {
    // SAFETY: the name is a C string.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a new descriptor, owned here only.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(len)?;
    let seals = libc::F_SEAL_GROW | libc::F_SEAL_SHRINK | libc::F_SEAL_SEAL;
    // SAFETY: the request takes no pointer.
    let sealed = unsafe { libc::fcntl(fd, libc::F_ADD_SEALS, seals) };
    if sealed < 0 { Err(io::Error::last_os_error()) } else { Ok(file) }
}

/// The whole words of memory that other processes change as well. `None` if it does not begin at a
/// word's address.
pub(super) fn words(memory: &HostMemory) -> Option<&[AtomicU64]> {
    let slice = memory.slice(0, memory.len())?;
    let start = slice.ptr_guard_mut().as_ptr().cast::<AtomicU64>();
    if !start.is_aligned() {
        return None;
    }
    // SAFETY:
    // * the range is mapped for reading and writing for as long as `memory` lives, which the result
    //   borrows;
    // * it is aligned, checked above, and any bytes are a valid word;
    // * this process accesses it by atomics only: the log's mapping is private to `SharedLog`.
    Some(unsafe { slice::from_raw_parts(start, memory.len() / size_of::<AtomicU64>()) })
}

/// A descriptor of our own for what `lender` has open.
pub(super) fn duplicate(lender: &impl AsRawFd) -> io::Result<OwnedFd> {
    // SAFETY: the descriptor is open for as long as `lender` is borrowed.
    unsafe { BorrowedFd::borrow_raw(lender.as_raw_fd()) }.try_clone_to_owned()
}
