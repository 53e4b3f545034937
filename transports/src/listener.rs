//! The accepting side's socket.

use std::io::{self, ErrorKind};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use socket2::Socket;

use crate::dial::command;
use crate::file::FileStream;
use crate::serve::{Arrival, Lobby, serve};
use crate::socket_file::SocketFile;
use crate::{
    Channel, Endpoint, SocketOptions, Stopper, TlsServer, TransportError, descriptor, event_loop, only, vsock,
};

/// A bound socket that takes connections. Dropping it frees the address, and removes a unix socket's file.
#[derive(Debug)]
pub struct Listener {
    endpoint: Endpoint,
    origin: Origin,
    options: SocketOptions,
    stopper: Stopper,
    /// The number that the next connection gets, over all calls of `serve`.
    next_number: AtomicU64,
    tls: Option<TlsServer>,
}

/// Where connections come from.
#[derive(Debug)]
enum Origin {
    /// One that is there already: a connected socket, a pipe, a command or a file. Taken by the first `serve`.
    Ready(Mutex<Option<Channel>>),
    Socket {
        socket: Socket,
        file: Option<SocketFile>,
    },
}

impl Listener {
    /// Binds and listens; clients can connect from now on, and wait in the queue until
    /// [`serve`](Self::serve).
    ///
    /// A descriptor or a command is one channel that is there already, unless the descriptor is a listening socket;
    /// [`serve`](Self::serve) reports it as the only arrival.
    ///
    /// Of a name with several addresses, the first that works is taken. An empty host or `[::]` is any
    /// address, v4 and v6; `0` and `0.0.0.0` are any v4 address. A unix socket file that nobody listens on
    /// any more is replaced. A file is opened to be read: it is the one channel that arrives.
    ///
    /// # Errors
    /// [`Io`](TransportError::Io): the address is taken or not of this machine, the name is unknown, the path
    /// is too long or not a socket.
    pub fn bind(endpoint: &Endpoint) -> Result<Self, TransportError> {
        Self::bind_with(endpoint, &SocketOptions::default())
    }

    /// The same, with sockets that are tuned as `options` say.
    ///
    /// # Errors
    /// As [`bind`](Self::bind).
    pub fn bind_with(endpoint: &Endpoint, options: &SocketOptions) -> Result<Self, TransportError> {
        let begun = Instant::now();
        Self::try_bind(endpoint, options).map_err(|source| TransportError::Io {
            action: if matches!(endpoint, Endpoint::File { .. }) { "read" } else { "listen on" },
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

    /// Whether more than one connection can come.
    pub fn takes_several(&self) -> bool {
        matches!(self.origin, Origin::Socket { .. })
    }

    /// Whether the one channel that comes is a regular file.
    pub fn reads_file(&self) -> bool {
        let Origin::Ready(channel) = &self.origin else { return false };
        let channel = channel.lock().unwrap_or_else(PoisonError::into_inner);
        channel.as_ref().is_some_and(|channel| channel.file().is_some())
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
    pub fn serve(
        &self,
        first_bytes: usize,
        silence: Duration,
        on_arrival: &mut dyn FnMut(Arrival),
    ) -> Result<(), TransportError> {
        let begun = Instant::now();
        let served = match &self.origin {
            Origin::Socket { socket, file } => {
                let path = file.as_ref().map(SocketFile::path);
                Lobby::new(first_bytes, silence, path, (&self.options, self.tls.clone()), on_arrival)
                    .and_then(|lobby| event_loop::block_on(serve(self, socket, lobby)).flatten())
            }
            Origin::Ready(_) if self.tls.is_some() => {
                Err(io::Error::new(ErrorKind::Unsupported, "TLS goes over tcp, unix or vsock"))
            }
            Origin::Ready(channel) => {
                let channel = channel.lock().unwrap_or_else(PoisonError::into_inner).take();
                let served = only::serve(self, channel, (first_bytes, silence), on_arrival);
                event_loop::block_on(served).flatten()
            }
        };
        served.map_err(|source| TransportError::Io {
            action: "accept on",
            endpoint: self.endpoint(),
            elapsed: begun.elapsed(),
            source,
        })
    }

    pub(crate) fn next_number(&self) -> u64 {
        self.next_number.fetch_add(1, Ordering::Relaxed)
    }

    fn try_bind(endpoint: &Endpoint, options: &SocketOptions) -> io::Result<Self> {
        let origin = match endpoint {
            Endpoint::Exec(_) => Origin::Ready(Mutex::new(Some(command(endpoint)?))),
            Endpoint::Fd(number) => Origin::descriptor(descriptor::take(*number)?, endpoint, options)?,
            Endpoint::FdFrom(path) => {
                Origin::descriptor(descriptor::fetch(path, HAND_OVER)?, endpoint, options)?
            }
            Endpoint::File { path, offset } => {
                let channel = Channel::of_file(FileStream::open(path, *offset)?, endpoint.to_string());
                Origin::Ready(Mutex::new(Some(channel)))
            }
            Endpoint::Tcp { host, port } => Origin::listening(bind_tcp(host, *port, options)?, None)?,
            Endpoint::Unix(path) => {
                let (socket, file) = SocketFile::bind(path)?;
                options.set_buffers(&socket)?;
                Origin::listening(socket, Some(file))?
            }
            Endpoint::Vsock { cid, port } => Origin::listening(vsock::bind(*cid, *port)?, None)?,
        };
        let endpoint = origin.endpoint(endpoint)?;
        let (options, stopper) = (options.clone(), Stopper::new());
        Ok(Self { endpoint, origin, options, stopper, next_number: AtomicU64::new(1), tls: None })
    }
}

impl Origin {
    fn listening(socket: Socket, file: Option<SocketFile>) -> io::Result<Self> {
        socket.listen(BACKLOG)?;
        socket.set_nonblocking(true)?;
        Ok(Self::Socket { socket, file })
    }

    fn descriptor(descriptor: OwnedFd, endpoint: &Endpoint, options: &SocketOptions) -> io::Result<Self> {
        match descriptor::arrived(descriptor, endpoint, options)? {
            Ok(channel) => Ok(Self::Ready(Mutex::new(Some(channel)))),
            Err(listening) => {
                listening.set_nonblocking(true)?;
                Ok(Self::Socket { socket: listening, file: None })
            }
        }
    }

    /// What was asked for, with the port that the system chose.
    fn endpoint(&self, asked: &Endpoint) -> io::Result<Endpoint> {
        let Self::Socket { socket, .. } = self else { return Ok(asked.clone()) };
        let bound = socket.local_addr()?;
        Ok(match (asked, bound.as_socket(), bound.as_vsock_address()) {
            (Endpoint::Tcp { host, .. }, Some(bound), _) => {
                Endpoint::Tcp { host: host.clone(), port: bound.port() }
            }
            (Endpoint::Vsock { cid, .. }, _, Some((_, port))) => Endpoint::Vsock { cid: *cid, port },
            _ => asked.clone(),
        })
    }
}

fn bind_tcp(host: &str, port: u16, options: &SocketOptions) -> io::Result<Socket> {
    let any_v4 = SocketAddr::from((Ipv4Addr::UNSPECIFIED, port));
    let addresses = match host {
        // Without v6 in the kernel, v4 is all there is.
        "" => vec![SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)), any_v4],
        "0" => vec![any_v4],
        name => (name, port).to_socket_addrs()?.collect(),
    };
    let mut failure = io::Error::new(ErrorKind::AddrNotAvailable, "the name has no address");
    for address in addresses {
        match bind_address(address, options) {
            Ok(socket) => return Ok(socket),
            Err(error) => failure = error,
        }
    }
    Err(failure)
}

fn bind_address(address: SocketAddr, options: &SocketOptions) -> io::Result<Socket> {
    let socket = options.tcp_socket(address)?;
    socket.set_reuse_address(true)?;
    if address.is_ipv6() && address.ip().is_unspecified() {
        socket.set_only_v6(false)?;
    }
    socket.bind(&address.into())?;
    // Another socket of the same address may be listening: only this tells, and it is to be the next address then.
    socket.listen(BACKLOG)?;
    Ok(socket)
}

/// How long whoever hands over a descriptor may take: he was asked for nothing else.
const HAND_OVER: Duration = Duration::from_secs(10);

/// Connections that the kernel holds until they are accepted: as many channels as a source may have (the
/// channel number is one byte).
pub(crate) const BACKLOG: i32 = 256;

#[cfg(test)]
mod tests;
