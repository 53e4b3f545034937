//! A userfaultfd that another process has made for its memory, and handed over.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use super::missing::{MemoryEvent, read_events, wake_range, zero_range};
use crate::guest::PAGE;

/// The userfaultfd of another process's memory: its faults are read here, and its threads woken.
/// Pages are placed in memory that both processes share.
#[derive(Debug)]
pub(crate) struct ForeignPages(OwnedFd);

/// What the kernel calls a userfaultfd among a process's descriptors.
const KIND: &str = "anon_inode:[userfaultfd]";

impl ForeignPages {
    /// Takes what another process says is a userfaultfd. Its API has been enabled there.
    ///
    /// # Errors
    /// `InvalidData`: it is none.
    pub(crate) fn new(descriptor: OwnedFd) -> io::Result<Self> {
        let kind = fs::read_link(format!("/proc/self/fd/{}", descriptor.as_raw_fd()))?;
        if kind.as_os_str() != KIND {
            let text = format!("a descriptor of {}, expected {KIND}", kind.display());
            return Err(io::Error::new(io::ErrorKind::InvalidData, text));
        }
        // The flag belongs to what both processes have open. Without it, poll(2) sees an error
        // only.
        // SAFETY: the descriptor is open, and the request takes no pointer.
        let flags = unsafe { libc::fcntl(descriptor.as_raw_fd(), libc::F_GETFL) };
        if flags < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: as above.
        if unsafe { libc::fcntl(descriptor.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self(descriptor))
    }

    /// What has happened since the last call; `false` if nothing has.
    pub(crate) fn read(&self, into: &mut Vec<MemoryEvent>) -> io::Result<bool> {
        read_events(&self.0, into)
    }

    /// Makes the missing page at this address of the other process a page of zeros, in the file
    /// that is mapped there, and wakes who waits for it. Not for huge pages.
    pub(crate) fn zero(&self, at: u64) -> io::Result<()> {
        match zero_range(&self.0, at, PAGE) {
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => self.wake(at, PAGE as u64),
            done => done,
        }
    }

    /// Wakes who waits for these pages, by addresses of the other process.
    pub(crate) fn wake(&self, start: u64, len: u64) -> io::Result<()> {
        wake_range(&self.0, start, len)
    }
}

impl AsRawFd for ForeignPages {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}
