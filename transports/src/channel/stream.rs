//! What carries a channel's bytes.

use std::io::{self, IoSlice, Read};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use socket2::Socket;

use crate::channel::pipe::Pipe;
use crate::file::FileStream;
use crate::tls::TlsStream;

/// The kinds of byte stream. All methods take `&self`: one thread sends while another receives.
#[derive(Debug)]
pub(crate) enum Stream {
    /// A regular file, in one direction.
    File(Arc<FileStream>),
    /// Pipes, with or without a command behind them.
    Pipe(Pipe),
    /// A connected, blocking stream socket: the bytes on it are the channel's bytes, nothing in
    /// between.
    Socket(Socket),
    /// The same, with TLS in between.
    Tls(Box<TlsStream>),
}

impl Stream {
    /// Sends some of `bufs`, at least one byte unless all are empty. At most [`Self::MAX_SLICES`]
    /// of them.
    pub(crate) fn send_vectored(&self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        match self {
            Self::File(file) => file.send_vectored(bufs),
            Self::Pipe(pipe) => pipe.send_vectored(bufs),
            // No SIGPIPE: the process belongs to the embedder, and may not ignore that signal.
            Self::Socket(socket) => socket.send_vectored_with_flags(bufs, libc::MSG_NOSIGNAL),
            Self::Tls(tls) => tls.send_vectored(bufs),
        }
    }

    pub(crate) fn recv(&self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::File(file) => file.recv(buf),
            Self::Pipe(pipe) => pipe.recv(buf),
            Self::Socket(socket) => (&*socket).read(buf),
            Self::Tls(tls) => tls.recv(buf),
        }
    }

    /// Ends both directions; blocked calls of other threads return.
    pub(crate) fn close(&self) {
        match self {
            Self::File(file) => file.close(),
            Self::Pipe(pipe) => pipe.close(),
            // Fails only if the connection is gone already, which is what is wanted.
            Self::Socket(socket) => drop(socket.shutdown(Shutdown::Both)),
            Self::Tls(tls) => tls.close(),
        }
    }

    pub(crate) fn finish_sending(&self) -> io::Result<()> {
        match self {
            Self::File(file) => file.finish(),
            Self::Pipe(pipe) => {
                pipe.finish_sending();
                Ok(())
            }
            Self::Socket(socket) => socket.shutdown(Shutdown::Write),
            Self::Tls(tls) => tls.finish_sending(),
        }
    }

    pub(crate) fn set_timeout(&self, limit: Option<Duration>) -> io::Result<()> {
        match self {
            // The kernel waits for a disk, not for a peer.
            Self::File(_) => Ok(()),
            Self::Pipe(pipe) => {
                pipe.set_timeout(limit);
                Ok(())
            }
            Self::Socket(socket) => {
                socket.set_read_timeout(limit)?;
                socket.set_write_timeout(limit)
            }
            Self::Tls(tls) => tls.set_timeout(limit),
        }
    }

    pub(crate) fn timeout(&self) -> io::Result<Option<Duration>> {
        match self {
            Self::File(_) => Ok(None),
            Self::Pipe(pipe) => Ok(pipe.timeout()),
            Self::Socket(socket) => socket.read_timeout(),
            Self::Tls(tls) => tls.timeout(),
        }
    }

    /// The descriptor on which the channel's bytes appear as they are.
    pub(crate) fn direct(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::File(_) => None,
            Self::Pipe(_) => None,
            Self::Socket(socket) => Some(socket.as_fd()),
            Self::Tls(_) => None,
        }
    }

    /// Whether bytes may come back from where they are sent to.
    pub(crate) fn is_two_way(&self) -> bool {
        match self {
            Self::File(_) => false,
            Self::Pipe(pipe) => pipe.is_two_way(),
            Self::Socket(_) | Self::Tls(_) => true,
        }
    }

    /// Whether a peer is at the other end of a socket.
    pub(crate) fn is_connection(&self) -> bool {
        match self {
            Self::File(_) | Self::Pipe(_) => false,
            Self::Socket(_) | Self::Tls(_) => true,
        }
    }

    pub(crate) fn file(&self) -> Option<&Arc<FileStream>> {
        match self {
            Self::File(file) => Some(file),
            Self::Pipe(_) | Self::Socket(_) | Self::Tls(_) => None,
        }
    }

    /// Waits until a command behind the channel has ended well; returns at once if there is none.
    pub(crate) fn settle(&self, limit: Duration) -> io::Result<()> {
        match self {
            Self::Pipe(pipe) => pipe.settle(limit),
            Self::File(_) | Self::Socket(_) | Self::Tls(_) => Ok(()),
        }
    }

    /// A duplicate of the descriptor that becomes readable when bytes have come.
    pub(crate) fn readable_end(&self) -> io::Result<OwnedFd> {
        match self {
            Self::File(file) => file.as_fd().try_clone_to_owned(),
            Self::Pipe(pipe) => pipe.readable_end(),
            Self::Socket(socket) => socket.as_fd().try_clone_to_owned(),
            // Bytes on its socket need not be bytes of the channel.
            Self::Tls(_) => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    /// What the descriptor is called by; `None` if it is closed.
    pub(crate) fn descriptor_number(&self) -> Option<i32> {
        match self {
            Self::File(file) => Some(file.as_fd().as_raw_fd()),
            Self::Pipe(pipe) => pipe.descriptor_number(),
            Self::Socket(socket) => Some(socket.as_raw_fd()),
            Self::Tls(tls) => Some(tls.socket().as_raw_fd()),
        }
    }

    /// Slices that one `sendmsg` takes: IOV_MAX of Linux.
    pub(crate) const MAX_SLICES: usize = 1024;
}
