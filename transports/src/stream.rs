//! What carries a channel's bytes.

use std::io::{self, IoSlice, Read};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use socket2::Socket;

use crate::tls::TlsStream;

/// The kinds of byte stream. All methods take `&self`: one thread sends while another receives.
#[derive(Debug)]
pub(crate) enum Stream {
    /// A connected, blocking stream socket: the bytes on it are the channel's bytes, nothing in between.
    Socket(Socket),
    /// The same, with TLS in between.
    Tls(Box<TlsStream>),
}

impl Stream {
    /// Sends some of `bufs`, at least one byte unless all are empty. At most [`Self::MAX_SLICES`] of them.
    pub(crate) fn send_vectored(&self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        match self {
            // No SIGPIPE: the process belongs to the embedder, and may not ignore that signal.
            Self::Socket(socket) => socket.send_vectored_with_flags(bufs, libc::MSG_NOSIGNAL),
            Self::Tls(tls) => tls.send_vectored(bufs),
        }
    }

    pub(crate) fn recv(&self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Socket(socket) => (&*socket).read(buf),
            Self::Tls(tls) => tls.recv(buf),
        }
    }

    /// Ends both directions; blocked calls of other threads return.
    pub(crate) fn close(&self) {
        match self {
            // Fails only if the connection is gone already, which is what is wanted.
            Self::Socket(socket) => drop(socket.shutdown(Shutdown::Both)),
            Self::Tls(tls) => tls.close(),
        }
    }

    pub(crate) fn finish_sending(&self) -> io::Result<()> {
        match self {
            Self::Socket(socket) => socket.shutdown(Shutdown::Write),
            Self::Tls(tls) => tls.finish_sending(),
        }
    }

    pub(crate) fn set_silence_limit(&self, limit: Option<Duration>) -> io::Result<()> {
        match self {
            Self::Socket(socket) => {
                socket.set_read_timeout(limit)?;
                socket.set_write_timeout(limit)
            }
            Self::Tls(tls) => tls.set_silence_limit(limit),
        }
    }

    pub(crate) fn silence_limit(&self) -> io::Result<Option<Duration>> {
        match self {
            Self::Socket(socket) => socket.read_timeout(),
            Self::Tls(tls) => tls.silence_limit(),
        }
    }

    /// The descriptor on which the channel's bytes appear as they are.
    pub(crate) fn direct(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::Socket(socket) => Some(socket.as_fd()),
            Self::Tls(_) => None,
        }
    }

    /// Slices that one `sendmsg` takes: IOV_MAX of Linux.
    pub(crate) const MAX_SLICES: usize = 1024;
}
