//! A listening socket and its clients of either family, in tokio's hands.

use std::io::{self, ErrorKind};
use std::net::{Shutdown, SocketAddr};

use socket2::{SockRef, Socket};
use tokio::io::{AsyncReadExt, Interest};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};

/// Where clients come in.
#[derive(Debug)]
pub(crate) enum Door {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl Door {
    /// Takes a duplicate of a non-blocking listening socket. Must be called in a runtime.
    pub(crate) fn new(socket: &Socket) -> io::Result<Self> {
        let copy = socket.try_clone()?;
        if socket.local_addr()?.is_unix() {
            Ok(Self::Unix(UnixListener::from_std(copy.into())?))
        } else {
            Ok(Self::Tcp(TcpListener::from_std(copy.into())?))
        }
    }

    /// The next client and its address, which is `None` on unix: clients have no name there.
    pub(crate) async fn accept(&self) -> io::Result<(Client, Option<SocketAddr>)> {
        Ok(match self {
            Self::Tcp(listener) => {
                let (client, address) = listener.accept().await?;
                (Client::Tcp(client), Some(address))
            }
            Self::Unix(listener) => (Client::Unix(listener.accept().await?.0), None),
        })
    }
}

/// Who came in.
#[derive(Debug)]
pub(crate) enum Client {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Client {
    pub(crate) async fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.read(buf).await,
            Self::Unix(stream) => stream.read(buf).await,
        }
    }

    /// Puts a connected stream socket into tokio's hands. Must be called in a runtime.
    pub(crate) fn new(socket: Socket) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        if socket.local_addr()?.is_unix() {
            Ok(Self::Unix(UnixStream::from_std(socket.into())?))
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
            };
            match outcome {
                Err(error) if matches!(error.kind(), ErrorKind::Interrupted | ErrorKind::WouldBlock) => {}
                outcome => return outcome,
            }
        }
    }

    /// Says that nothing more will be sent.
    pub(crate) fn shutdown(&self) -> io::Result<()> {
        match self {
            Self::Tcp(stream) => SockRef::from(stream).shutdown(Shutdown::Write),
            Self::Unix(stream) => SockRef::from(stream).shutdown(Shutdown::Write),
        }
    }

    /// Takes it out of tokio's hands.
    pub(crate) fn into_socket(self) -> io::Result<Socket> {
        Ok(match self {
            Self::Tcp(stream) => stream.into_std()?.into(),
            Self::Unix(stream) => stream.into_std()?.into(),
        })
    }
}
