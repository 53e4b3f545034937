//! The accepting side's socket.

use std::io::{self, ErrorKind};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use socket2::Socket;

use crate::accept::first_bytes::OpeningLen;
use crate::accept::ready;
use crate::accept::socket_file::SocketFile;
use crate::accept::{Arrival, Terms, Unidentified, serve};
use crate::dial::command;
use crate::dial::descriptor;
use crate::dial::vsock;
use crate::file::FileStream;
use crate::os::event_loop;
use crate::{Channel, Endpoint, SocketOptions, Stopper, TlsServer, TransportError};

/// A bound socket that takes connections. Dropping it frees the address, and removes a unix
/// socket's file.
#[derive(Debug)]
pub struct Listener {
    endpoint: Endpoint,
    origin: Origin,
    options: SocketOptions,
    stopper: Stopper,
    /// Stopped when no more clients are to come in.
    closing: Stopper,
    /// Whether nothing listens any more, for threads that wait for that.
    closed: (Mutex<bool>, Condvar),
    opening: OpeningLen,
    /// Connections that say nothing are kept.
    keeps_silent: Arc<AtomicBool>,
    /// The number that the next connection gets, over all calls of `serve`.
    next_number: AtomicU64,
    tls: Option<TlsServer>,
}

/// Where connections come from.
#[derive(Debug)]
enum Origin {
    /// Those that are there already: connected sockets, pipes, a command or a file. Taken by the
    /// first `serve`.
    Ready { waiting: Mutex<Vec<Channel>>, several: bool },
    /// `None` when the listener is closed.
    Socket(Mutex<Option<Listening>>),
}

#[derive(Debug)]
struct Listening {
    socket: Socket,
    file: Option<SocketFile>,
}

impl Listener {
    /// Binds and listens; clients can connect from now on, and wait in the queue until
    /// [`serve`](Self::serve).
    ///
    /// A descriptor or a command is one channel that is there already, unless the descriptor is a
    /// listening socket; [`serve`](Self::serve) reports it as the only arrival.
    ///
    /// Of a name with several addresses, the first that works is taken. An empty host or `[::]` is
    /// any address, v4 and v6; `0` and `0.0.0.0` are any v4 address. A unix socket file without a
    /// listener is replaced. A file is opened to be read: it is the one channel that arrives.
    ///
    /// # Errors
    /// [`Io`](TransportError::Io): the address is taken or not of this machine, the name is
    /// unknown, the path is too long or not a socket.
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

    /// Listens for nothing: `connections` are all that there is, and [`serve`](Self::serve) reports
    /// what becomes of each. They go by the name `endpoint`.
    pub fn of_connections(connections: Vec<Channel>, endpoint: Endpoint) -> Self {
        let several = connections.len() > 1;
        let origin = Origin::Ready { waiting: Mutex::new(connections), several };
        Self::new(endpoint, origin, &SocketOptions::default())
    }

    /// Accepts encrypted connections only: [`serve`](Self::serve) does the handshake before it
    /// waits for the first bytes, within the same timeout. Default: plain ones only.
    #[must_use]
    pub fn tls(mut self, tls: Option<TlsServer>) -> Self {
        self.tls = tls;
        self
    }

    /// The length of a connection's whole opening message, given its first four bytes:
    /// [`serve`](Self::serve) with four first bytes waits for all of it, within the same timeout,
    /// before the connection counts as identified. Default: those four are all. Sockets only: of a
    /// descriptor, a command or a file never more than the first bytes are waited for.
    #[must_use]
    pub fn opening_len(mut self, opening: OpeningLen) -> Self {
        self.opening = opening;
        self
    }

    /// From now on a connection may be silent for longer than the timeout, also one that has been
    /// accepted already: one that is made before there is anything to say on it. The limit on their
    /// number stays.
    pub fn keep_silent(&self) {
        self.keeps_silent.store(true, Ordering::Relaxed);
    }

    /// Where it listens: as asked for, with a port 0 replaced by the one that was given.
    pub fn endpoint(&self) -> Endpoint {
        self.endpoint.clone()
    }

    /// Whether more than one connection can come.
    pub fn takes_several(&self) -> bool {
        match self.origin {
            Origin::Ready { several, .. } => several,
            Origin::Socket(_) => true,
        }
    }

    /// Whether connections can come that the caller knows nothing of.
    pub fn takes_strangers(&self) -> bool {
        matches!(self.origin, Origin::Socket(_))
    }

    /// Whether the one channel that comes is a regular file.
    pub fn reads_file(&self) -> bool {
        let Origin::Ready { waiting, .. } = &self.origin else { return false };
        let waiting = waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.iter().any(|channel| channel.file().is_some())
    }

    /// Ends [`serve`](Self::serve), for good.
    pub fn stopper(&self) -> Stopper {
        self.stopper.clone()
    }

    /// Listens no more: [`serve`](Self::serve) accepts the clients that wait in the system's queue,
    /// lets the system refuse all others, goes on with those that it has accepted, and returns when
    /// none is left to be identified. A unix socket's file goes. A descriptor, a command or a file
    /// cannot be closed: its channel has come.
    pub fn close(&self) {
        if let Origin::Socket(listening) = &self.origin {
            drop(listening.lock().unwrap_or_else(PoisonError::into_inner).take());
            self.closing.stop();
        }
    }

    /// Waits until a closed listener, or one whose [`serve`](Self::serve) has ended, has accepted
    /// its last client. False: it has not within `limit`.
    pub fn wait_closed(&self, limit: Duration) -> bool {
        if !self.takes_strangers() {
            return true;
        }
        let closed = self.closed.0.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.closed.1.wait_timeout_while(closed, limit, |closed| !*closed);
        *waited.unwrap_or_else(PoisonError::into_inner).0
    }

    pub(crate) fn note_closed(&self) {
        *self.closed.0.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.closed.1.notify_all();
    }

    pub(crate) fn closing(&self) -> Stopper {
        self.closing.clone()
    }

    /// Accepts connections and reports what becomes of each, until stopped. Blocks the calling
    /// thread, and calls `on_arrival` on it.
    ///
    /// Waits for the first `first_bytes` bytes of all connections side by side, for at most
    /// `timeout` each: one that sends nothing delays no other (docs/wire.md §12). `first_bytes` is
    /// 0..=4; with fewer than 4 the rest of [`Arrival::Identified`]'s `first` is zero. When more
    /// than 256 connections are unidentified, the one that has waited longest is dropped. While
    /// `on_arrival` runs nothing is accepted: it should hand the channel over and return.
    ///
    /// # Errors
    /// [`Io`](TransportError::Io) if the listening socket itself is broken, or `first_bytes` is out
    /// of range. Clients cannot cause it, and neither can a lack of descriptors: then it pauses and
    /// tries again.
    pub fn serve(
        &self,
        first_bytes: usize,
        timeout: Duration,
        on_arrival: &mut dyn FnMut(Arrival),
    ) -> Result<(), TransportError> {
        let begun = Instant::now();
        let terms = Terms {
            first_bytes,
            opening: self.opening,
            keeps_silent: Arc::clone(&self.keeps_silent),
            timeout,
            options: self.options.clone(),
            tls: self.tls.clone(),
        };
        let served = match &self.origin {
            Origin::Socket(listening) => self.duplicate(listening).and_then(|duplicate| {
                // Closed before it was served.
                let Some((socket, path)) = duplicate else { return Ok(()) };
                let unidentified = Unidentified::new(terms, path.as_deref(), on_arrival)?;
                event_loop::block_on(serve(self, socket, unidentified)).flatten()
            }),
            Origin::Ready { waiting, several } => {
                let channels = std::mem::take(&mut *waiting.lock().unwrap_or_else(PoisonError::into_inner));
                // Of one that is alone no more is asked than what it is.
                let opening: OpeningLen = if *several { self.opening } else { |_| 0 };
                let terms = Terms { opening, ..terms };
                event_loop::block_on(ready::serve(self, channels, terms, on_arrival)).flatten()
            }
        };
        self.note_closed();
        served.map_err(|source| TransportError::Io {
            action: "accept on",
            endpoint: self.endpoint(),
            elapsed: begun.elapsed(),
            source,
        })
    }

    /// A duplicate of the listening socket, and its path if it has one: serving must not keep the
    /// listener from closing it.
    fn duplicate(
        &self,
        listening: &Mutex<Option<Listening>>,
    ) -> io::Result<Option<(Socket, Option<PathBuf>)>> {
        let listening = listening.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(Listening { socket, file }) = &*listening else { return Ok(None) };
        Ok(Some((socket.try_clone()?, file.as_ref().map(|file| file.path().to_owned()))))
    }

    pub(crate) fn next_number(&self) -> u64 {
        self.next_number.fetch_add(1, Ordering::Relaxed)
    }

    fn try_bind(endpoint: &Endpoint, options: &SocketOptions) -> io::Result<Self> {
        let origin = match endpoint {
            Endpoint::Exec(_) => Origin::ready(command(endpoint)?),
            Endpoint::Fd(number) => Origin::descriptor(descriptor::take(*number)?, endpoint, options)?,
            Endpoint::FdFrom(path) => {
                Origin::descriptor(descriptor::fetch(path, HAND_OVER_TIMEOUT)?, endpoint, options)?
            }
            Endpoint::File { path, offset } => {
                let channel = Channel::of_file(FileStream::open(path, *offset)?, endpoint.to_string());
                Origin::ready(channel)
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
        Ok(Self::new(endpoint, origin, options))
    }

    fn new(endpoint: Endpoint, origin: Origin, options: &SocketOptions) -> Self {
        Self {
            endpoint,
            origin,
            options: options.clone(),
            stopper: Stopper::new(),
            closing: Stopper::new(),
            closed: (Mutex::new(false), Condvar::new()),
            opening: |_| 0,
            keeps_silent: Arc::default(),
            next_number: AtomicU64::new(1),
            tls: None,
        }
    }
}

impl Origin {
    fn ready(channel: Channel) -> Self {
        Self::Ready { waiting: Mutex::new(vec![channel]), several: false }
    }

    fn listening(socket: Socket, file: Option<SocketFile>) -> io::Result<Self> {
        socket.listen(BACKLOG)?;
        socket.set_nonblocking(true)?;
        Ok(Self::Socket(Mutex::new(Some(Listening { socket, file }))))
    }

    fn descriptor(descriptor: OwnedFd, endpoint: &Endpoint, options: &SocketOptions) -> io::Result<Self> {
        match descriptor::arrived(descriptor, endpoint, options)? {
            Ok(channel) => Ok(Self::ready(channel)),
            Err(listening) => {
                listening.set_nonblocking(true)?;
                Ok(Self::Socket(Mutex::new(Some(Listening { socket: listening, file: None }))))
            }
        }
    }

    /// What was asked for, with the port that the system chose.
    fn endpoint(&self, asked: &Endpoint) -> io::Result<Endpoint> {
        let Self::Socket(listening) = self else { return Ok(asked.clone()) };
        let listening = listening.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(Listening { socket, .. }) = &*listening else { return Ok(asked.clone()) };
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
    // Another socket of the same address may be listening: only this tells, and it is to be the
    // next address then.
    socket.listen(BACKLOG)?;
    Ok(socket)
}

/// Timeout for receiving a descriptor over SCM_RIGHTS.
const HAND_OVER_TIMEOUT: Duration = Duration::from_secs(10);

/// Connections that the kernel holds until they are accepted: as many channels as a source may have
/// (the channel number is one byte).
pub(crate) const BACKLOG: i32 = 256;

#[cfg(test)]
mod tests;
