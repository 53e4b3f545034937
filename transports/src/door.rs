//! A listening socket and its clients of any family, in tokio's hands.

use std::io::{self, ErrorKind, Read};

use socket2::{SockRef, Socket};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncReadExt, Interest};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};

use crate::sys::watch;
use crate::{SocketOptions, socket};

/// Where clients come in.
#[derive(Debug)]
pub(crate) enum Door {
    Tcp(TcpListener),
    Unix(UnixListener),
    Vsock(AsyncFd<Socket>),
}

impl Door {
    /// Takes a duplicate of a non-blocking listening socket. Must be called in a runtime.
    pub(crate) fn new(socket: &Socket) -> io::Result<Self> {
        let copy = socket.try_clone()?;
        if socket.local_addr()?.is_unix() {
            Ok(Self::Unix(UnixListener::from_std(copy.into())?))
        } else if socket.local_addr()?.as_vsock_address().is_some() {
            Ok(Self::Vsock(watch(copy, Interest::READABLE)?))
        } else {
            Ok(Self::Tcp(TcpListener::from_std(copy.into())?))
        }
    }

    /// The next client and its name, which is `None` on unix: clients have none there.
    pub(crate) async fn accept(&self) -> io::Result<(Client, Option<String>)> {
        Ok(match self {
            Self::Tcp(listener) => {
                let (client, address) = listener.accept().await?;
                (Client::Tcp(client), Some(socket::tcp_name(address)))
            }
            Self::Unix(listener) => (Client::Unix(listener.accept().await?.0), None),
            Self::Vsock(listener) => {
                let (client, address) = listener.async_io(Interest::READABLE, Socket::accept).await?;
                client.set_nonblocking(true)?;
                let name = address.as_vsock_address().map(socket::vsock_name);
                (Client::Vsock(watch(client, Interest::READABLE | Interest::WRITABLE)?), name)
            }
        })
    }
}

/// Who came in.
#[derive(Debug)]
pub(crate) enum Client {
    Tcp(TcpStream),
    Unix(UnixStream),
    Vsock(AsyncFd<Socket>),
}

impl Client {
    pub(crate) async fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.read(buf).await,
            Self::Unix(stream) => stream.read(buf).await,
            Self::Vsock(socket) => socket.async_io(Interest::READABLE, |mut socket| socket.read(buf)).await,
        }
    }

    /// Puts a connected stream socket into tokio's hands. Must be called in a runtime.
    pub(crate) fn new(socket: Socket) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        if socket.local_addr()?.is_unix() {
            Ok(Self::Unix(UnixStream::from_std(socket.into())?))
        } else if socket.local_addr()?.as_vsock_address().is_some() {
            Ok(Self::Vsock(watch(socket, Interest::READABLE | Interest::WRITABLE)?))
        } else {
            Ok(Self::Tcp(TcpStream::from_std(socket.into())?))
        }
    }

    /// Makes a call that does not block, again and again until it does not have to wait.
    pub(crate) async fn when_ready<T>(
        &self,
        interest: Interest,
        mut call: impl FnMut(SockRef<'_>) -> io::Result<T>,
    ) -> io::Result<T> {
        loop {
            let outcome = match self {
                Self::Tcp(stream) => {
                    stream.ready(interest).await?;
                    stream.try_io(interest, || call(SockRef::from(stream)))
                }
                Self::Unix(stream) => {
                    stream.ready(interest).await?;
                    stream.try_io(interest, || call(SockRef::from(stream)))
                }
                Self::Vsock(socket) => socket.async_io(interest, |socket| call(SockRef::from(socket))).await,
            };
            match outcome {
                Err(error) if matches!(error.kind(), ErrorKind::Interrupted | ErrorKind::WouldBlock) => {}
                outcome => return outcome,
            }
        }
    }

    /// Sets the options of the socket.
    pub(crate) fn tune(&self, options: &SocketOptions) -> io::Result<()> {
        let socket = match self {
            Self::Tcp(stream) => SockRef::from(stream),
            Self::Unix(stream) => SockRef::from(stream),
            Self::Vsock(socket) => SockRef::from(socket.get_ref()),
        };
        socket::tune(&socket, options)
    }

    /// Takes it out of tokio's hands.
    pub(crate) fn into_socket(self) -> io::Result<Socket> {
        Ok(match self {
            Self::Tcp(stream) => stream.into_std()?.into(),
            Self::Unix(stream) => stream.into_std()?.into(),
            Self::Vsock(socket) => socket.into_inner(),
        })
    }
}
