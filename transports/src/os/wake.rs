//! Waiting for a descriptor, with a limit and a wake.

use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;

/// Wakes every wait on it, once and for all. An eventfd that is never read.
#[derive(Debug)]
pub(crate) struct Wake(OwnedFd);

/// Readable once it has fired.
impl AsFd for Wake {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Wake {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?))
    }

    pub(crate) fn fire(&self) {
        // Fails only when the counter is full, which takes 2^64 - 2 calls.
        let _ = rustix::io::write(&self.0, &1_u64.to_ne_bytes());
    }

    /// Waits until `fd` is `ready`. False: woken. `WouldBlock`, as a socket says it, when `limit`
    /// has passed.
    pub(crate) fn wait(
        &self,
        fd: BorrowedFd<'_>,
        ready: PollFlags,
        limit: Option<Duration>,
    ) -> io::Result<bool> {
        let deadline = limit.and_then(|limit| Instant::now().checked_add(limit));
        loop {
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            // A time too long for the kernel counts as none.
            let left = left.and_then(|left| Timespec::try_from(left).ok());
            let mut fds = [PollFd::from_borrowed_fd(fd, ready), PollFd::new(&self.0, PollFlags::IN)];
            match poll(&mut fds, left.as_ref()) {
                Ok(0) => return Err(ErrorKind::WouldBlock.into()),
                Ok(_) => return Ok(fds.iter().skip(1).all(|wake| wake.revents().is_empty())),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}
