//! The accepting side's socket.

use std::io::{self, ErrorKind};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use socket2::{Domain, Protocol, Socket, Type};

use crate::serve::{Arrival, Lobby, serve};
use crate::socket_file::SocketFile;
use crate::{Endpoint, Stopper, TlsServer, TransportError, blocking};

/// A bound socket that takes connections. Dropping it frees the address, and removes a unix socket's file.
#[derive(Debug)]
pub struct Listener {
    endpoint: Endpoint,
    socket: Socket,
    file: Option<SocketFile>,
    stopper: Stopper,
    /// The number that the next connection gets, over all calls of `serve`.
    next_number: AtomicU64,
    tls: Option<TlsServer>,
}

impl Listener {
    /// Binds and listens; clients can connect from now on, and wait in the queue until
    /// [`serve`](Self::serve).
    ///
    /// Of a name with several addresses, the first that works is taken. An empty host or `[::]` is any
    /// address, v4 and v6; `0` and `0.0.0.0` are any v4 address. A unix socket file that nobody listens on
    /// any more is replaced.
    ///
    /// # Errors
    /// [`Io`](TransportError::Io): the address is taken or not of this machine, the name is unknown, the path
    /// is too long or not a socket.
    pub fn bind(endpoint: &Endpoint) -> Result<Self, TransportError> {
        let begun = Instant::now();
        Self::try_bind(endpoint).map_err(|source| TransportError::Io {
            action: "listen on",
            endpoint: endpoint.clone(),
            elapsed: begun.elapsed(),
            source,
        })
    }

    /// Takes sealed connections only: [`serve`](Self::serve) shakes hands before it waits for the first bytes, within the same
    /// silence. Default: plain ones only.
    #[must_use]
    pub fn tls(mut self, tls: Option<TlsServer>) -> Self {
        self.tls = tls;
        self
    }

    /// Where it listens: as asked for, with a port 0 replaced by the one that was given.
    pub fn endpoint(&self) -> Endpoint {
        self.endpoint.clone()
    }

    /// Ends [`serve`](Self::serve), for good.
    pub fn stopper(&self) -> Stopper {
        self.stopper.clone()
    }

    /// Accepts connections and reports what becomes of each, until stopped. Blocks the calling thread, and
    /// calls `on_arrival` on it.
    ///
    /// Waits for the first `first_bytes` bytes of all connections side by side, for at most `silence` each:
    /// one that says nothing delays no other (docs/wire.md §12). `first_bytes` is 0..=4; with fewer than 4
    /// the rest of [`Arrival::Identified`]'s `first` is zero. When more than 256 connections have not spoken
    /// yet, the one that has been silent longest is dropped. While `on_arrival` runs nobody is accepted: it
    /// should hand the channel over and return.
    ///
    /// # Errors
    /// [`Io`](TransportError::Io) if the listening socket itself is broken, or `first_bytes` is out of range.
    /// Clients cannot cause it, and neither can a lack of descriptors: then it pauses and tries again.
    ///
    /// # Panics
    /// On a thread that drives a tokio runtime: use one that may block.
    pub fn serve(
        &self,
        first_bytes: usize,
        silence: Duration,
        on_arrival: &mut dyn FnMut(Arrival),
    ) -> Result<(), TransportError> {
        let begun = Instant::now();
        let path = self.file.as_ref().map(SocketFile::path);
        let served = Lobby::new(first_bytes, silence, path, self.tls.clone(), on_arrival)
            .and_then(|lobby| blocking::runtime()?.block_on(serve(self, lobby)));
        served.map_err(|source| TransportError::Io {
            action: "accept on",
            endpoint: self.endpoint(),
            elapsed: begun.elapsed(),
            source,
        })
    }

    pub(crate) fn socket(&self) -> &Socket {
        &self.socket
    }

    pub(crate) fn next_number(&self) -> u64 {
        self.next_number.fetch_add(1, Ordering::Relaxed)
    }

    fn try_bind(endpoint: &Endpoint) -> io::Result<Self> {
        let (socket, file) = match endpoint {
            Endpoint::Tcp { host, port } => (bind_tcp(host, *port)?, None),
            Endpoint::Unix(path) => bind_unix(path)?,
        };
        socket.set_nonblocking(true)?;
        let endpoint = match (endpoint, socket.local_addr()?.as_socket()) {
            (Endpoint::Tcp { host, .. }, Some(bound)) => {
                Endpoint::Tcp { host: host.clone(), port: bound.port() }
            }
            _ => endpoint.clone(),
        };
        Ok(Self {
            endpoint,
            socket,
            file,
            stopper: Stopper::new(),
            next_number: AtomicU64::new(1),
            tls: None,
        })
    }
}

fn bind_unix(path: &Path) -> io::Result<(Socket, Option<SocketFile>)> {
    let (socket, file) = SocketFile::bind(path)?;
    socket.listen(BACKLOG)?;
    Ok((socket, Some(file)))
}

fn bind_tcp(host: &str, port: u16) -> io::Result<Socket> {
    let any_v4 = SocketAddr::from((Ipv4Addr::UNSPECIFIED, port));
    let addresses = match host {
        // Without v6 in the kernel, v4 is all there is.
        "" => vec![SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)), any_v4],
        "0" => vec![any_v4],
        name => (name, port).to_socket_addrs()?.collect(),
    };
    let mut failure = io::Error::new(ErrorKind::AddrNotAvailable, "the name has no address");
    for address in addresses {
        match bind_address(address) {
            Ok(socket) => return Ok(socket),
            Err(error) => failure = error,
        }
    }
    Err(failure)
}

fn bind_address(address: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    if address.is_ipv6() && address.ip().is_unspecified() {
        socket.set_only_v6(false)?;
    }
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket)
}

/// Connections that the kernel holds until they are accepted: as many channels as a source may have (the
/// channel number is one byte).
pub(crate) const BACKLOG: i32 = 256;

#[cfg(test)]
mod tests;
