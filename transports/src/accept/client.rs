//! A listening socket and its clients, of any family, without blocking calls.

use std::io::{self, ErrorKind, Read};
use std::sync::Arc;

use rustix::event::PollFlags;
use socket2::Socket;

use crate::SocketOptions;
use crate::os::event_loop::when_ready;
use crate::os::socket;

/// A listening socket.
#[derive(Debug)]
pub(crate) struct ListeningSocket(Arc<Socket>);

impl ListeningSocket {
    /// Takes a duplicate of a non-blocking listening socket.
    pub(crate) fn new(socket: &Socket) -> io::Result<Self> {
        Ok(Self(Arc::new(socket.try_clone()?)))
    }

    /// The next client and its name, which is `None` on unix: clients have none there.
    pub(crate) async fn accept(&self) -> io::Result<(Client, Option<String>)> {
        when_ready(&self.0, PollFlags::IN, accept).await
    }

    /// The next client if one is in the queue, else `None`.
    pub(crate) fn accept_now(&self) -> io::Result<Option<(Client, Option<String>)>> {
        match accept(&self.0) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(None),
            accepted => accepted.map(Some),
        }
    }
}

fn accept(socket: &Socket) -> io::Result<(Client, Option<String>)> {
    let (client, address) = socket.accept()?;
    let name = match address.as_socket() {
        Some(address) => Some(socket::tcp_name(address)),
        None => address.as_vsock_address().map(socket::vsock_name),
    };
    Ok((Client::new(client)?, name))
}

/// An accepted client.
#[derive(Debug)]
pub(crate) struct Client(Arc<Socket>);

impl Client {
    /// Takes a connected stream socket.
    pub(crate) fn new(socket: Socket) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        Ok(Self(Arc::new(socket)))
    }

    pub(crate) async fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.when_ready(PollFlags::IN, |mut socket| socket.read(buf)).await
    }

    /// Makes a call that does not block, again and again until it does not have to wait.
    pub(crate) async fn when_ready<T>(
        &self,
        flags: PollFlags,
        call: impl FnMut(&Socket) -> io::Result<T>,
    ) -> io::Result<T> {
        when_ready(&self.0, flags, call).await
    }

    /// Sets the options of the socket.
    pub(crate) fn tune(&self, options: &SocketOptions) -> io::Result<()> {
        socket::tune(&self.0, options)
    }

    /// The socket, which does not block yet.
    pub(crate) fn into_socket(self) -> io::Result<Socket> {
        into_socket(self.0)
    }
}

/// A socket that was waited for, back from the event loop.
pub(crate) fn into_socket(socket: Arc<Socket>) -> io::Result<Socket> {
    Arc::try_unwrap(socket).or_else(|shared| shared.try_clone())
}
