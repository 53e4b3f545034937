//! Bare sockets of either family.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

use multifd_transports::Endpoint;

use crate::Outcome;

/// A connection.
#[derive(Debug)]
pub enum Socket {
    /// Over TCP.
    Tcp(TcpStream),
    /// Over a unix socket.
    Unix(UnixStream),
}

/// What waits for connections.
#[derive(Debug)]
pub(super) enum Listening {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl Socket {
    /// Connects; the other side must be listening already.
    ///
    /// # Errors
    /// When it is not.
    pub fn connect(endpoint: &Endpoint) -> io::Result<Self> {
        let socket = match endpoint {
            Endpoint::Tcp { host, port } => Self::Tcp(TcpStream::connect((host.as_str(), *port))?),
            Endpoint::Unix(path) => Self::Unix(UnixStream::connect(path)?),
            other => return Err(io::Error::other(format!("{other} is for others to test"))),
        };
        socket.limit(LONG)?;
        Ok(socket)
    }

    /// How long a read may wait from now on, and a write.
    ///
    /// # Errors
    /// When the limit is zero.
    pub fn limit(&self, limit: Duration) -> io::Result<()> {
        match self {
            Self::Tcp(socket) => {
                socket.set_read_timeout(Some(limit)).and(socket.set_write_timeout(Some(limit)))
            }
            Self::Unix(socket) => {
                socket.set_read_timeout(Some(limit)).and(socket.set_write_timeout(Some(limit)))
            }
        }
    }

    /// Ends the connection, both ways.
    pub fn hang_up(self) {
        // Fails only if the other side was faster.
        drop(match self {
            Self::Tcp(socket) => socket.shutdown(Shutdown::Both),
            Self::Unix(socket) => socket.shutdown(Shutdown::Both),
        });
    }
}

/// The longest that a scripted peer waits for anything.
pub(super) const LONG: Duration = Duration::from_secs(10);

impl Read for Socket {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(socket) => socket.read(into),
            Self::Unix(socket) => socket.read(into),
        }
    }
}

impl Write for Socket {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(socket) => socket.write(bytes),
            Self::Unix(socket) => socket.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(socket) => socket.as_fd(),
            Self::Unix(socket) => socket.as_fd(),
        }
    }
}

impl Listening {
    pub(super) fn open(endpoint: &Endpoint) -> Outcome<Self> {
        Ok(match endpoint {
            Endpoint::Tcp { host, port } => Self::Tcp(TcpListener::bind((host.as_str(), *port))?),
            Endpoint::Unix(path) => Self::Unix(UnixListener::bind(path)?),
            other => return Err(io::Error::other(format!("{other} is for others to test")).into()),
        })
    }

    /// Where it is.
    pub(super) fn endpoint(&self, asked: &Endpoint) -> Outcome<Endpoint> {
        Ok(match (self, asked) {
            (Self::Tcp(listener), Endpoint::Tcp { host, .. }) => {
                Endpoint::Tcp { host: host.clone(), port: listener.local_addr()?.port() }
            }
            _ => asked.clone(),
        })
    }

    pub(super) fn accept(&self) -> Outcome<Socket> {
        let socket = match self {
            Self::Tcp(listener) => Socket::Tcp(listener.accept()?.0),
            Self::Unix(listener) => Socket::Unix(listener.accept()?.0),
        };
        socket.limit(LONG)?;
        Ok(socket)
    }
}

impl AsFd for Listening {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(listener) => listener.as_fd(),
            Self::Unix(listener) => listener.as_fd(),
        }
    }
}
