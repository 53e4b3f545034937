//! What carries a channel's bytes.

use std::io::{self, IoSlice, Read};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use socket2::Socket;

use crate::file::FileStream;

/// The kinds of byte stream. All methods take `&self`: one thread sends while another receives.
#[derive(Debug)]
pub(crate) enum Stream {
    /// A regular file, in one direction.
    File(FileStream),
    /// A connected, blocking stream socket: the bytes on it are the channel's bytes, nothing in between.
    Socket(Socket),
}

impl Stream {
    /// Sends some of `bufs`, at least one byte unless all are empty. At most [`Self::MAX_SLICES`] of them.
    pub(crate) fn send_vectored(&self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        match self {
            Self::File(file) => file.send_vectored(bufs),
            // No SIGPIPE: the process belongs to the embedder, and may not ignore that signal.
            Self::Socket(socket) => socket.send_vectored_with_flags(bufs, libc::MSG_NOSIGNAL),
        }
    }

    pub(crate) fn recv(&self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::File(file) => file.recv(buf),
            Self::Socket(socket) => (&*socket).read(buf),
        }
    }

    /// Ends both directions; blocked calls of other threads return.
    pub(crate) fn close(&self) {
        match self {
            Self::File(file) => file.close(),
            // Fails only if the connection is gone already, which is what is wanted.
            Self::Socket(socket) => drop(socket.shutdown(Shutdown::Both)),
        }
    }

    pub(crate) fn finish_sending(&self) -> io::Result<()> {
        match self {
            Self::File(file) => file.finish(),
            Self::Socket(socket) => socket.shutdown(Shutdown::Write),
        }
    }

    pub(crate) fn set_silence_limit(&self, limit: Option<Duration>) -> io::Result<()> {
        match self {
            // The kernel waits for a disk, not for a peer.
            Self::File(_) => Ok(()),
            Self::Socket(socket) => {
                socket.set_read_timeout(limit)?;
                socket.set_write_timeout(limit)
            }
        }
    }

    pub(crate) fn silence_limit(&self) -> io::Result<Option<Duration>> {
        match self {
            Self::File(_) => Ok(None),
            Self::Socket(socket) => socket.read_timeout(),
        }
    }

    /// The descriptor on which the channel's bytes appear as they are.
    pub(crate) fn direct(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::File(_) => None,
            Self::Socket(socket) => Some(socket.as_fd()),
        }
    }

    /// Whether bytes go in both directions.
    pub(crate) fn is_two_way(&self) -> bool {
        match self {
            Self::File(_) => false,
            Self::Socket(_) => true,
        }
    }

    pub(crate) fn file(&self) -> Option<&FileStream> {
        match self {
            Self::File(file) => Some(file),
            Self::Socket(_) => None,
        }
    }

    /// Slices that one `sendmsg` takes: IOV_MAX of Linux.
    pub(crate) const MAX_SLICES: usize = 1024;
}
