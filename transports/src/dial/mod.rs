//! From an endpoint to a channel: names, attempts, deadline.

use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use socket2::{Domain, Socket, Type};

use crate::accept::client::into_socket;
use crate::channel::pipe::Pipe;
use crate::channel::stream::Stream;
use crate::dial::backoff::Backoff;
use crate::dial::connect::connect;
use crate::dial::lookup::lookup;
use crate::file::FileStream;
use crate::os::event_loop::{First, block_on, first, ready, sleep_until, within};
use crate::os::socket;
use crate::{Channel, Endpoint, SocketOptions, Stopper, ThreadHook, TlsClient, TransportError, tls};

pub(crate) mod backoff;
mod connect;
pub(crate) mod descriptor;
mod lookup;
pub(crate) mod vsock;

/// How long to try, and what ends it early. More fields will come: write
/// `..DialOptions::default()`.
#[derive(Clone, Debug)]
pub struct DialOptions {
    /// For everything together: the name look-up and every attempt. Default: 10 s.
    pub deadline: Duration,
    /// Ends the dialling at once. Default: a stopper of its own.
    pub stopper: Stopper,
    /// How the socket is tuned. Default: [`SocketOptions::default`].
    pub socket: SocketOptions,
    /// Encrypts the channel. Default: no.
    pub tls: Option<TlsClient>,
    /// Called on the thread that looks a host's name up. Default: nothing.
    pub thread_hook: ThreadHook,
}

impl Default for DialOptions {
    fn default() -> Self {
        let (deadline, stopper) = (Duration::from_secs(10), Stopper::new());
        Self {
            deadline,
            stopper,
            socket: SocketOptions::default(),
            tls: None,
            thread_hook: ThreadHook::default(),
        }
    }
}

/// Connects, and tries again while nothing listens there yet, until the deadline. A file is opened
/// to be written: see [`FileStream`](crate::FileStream).
///
/// All addresses of a name are tried, one after the other and never two at a time: a connection
/// that is opened and dropped again ends the incoming migration of a QEMU. Blocks the calling
/// thread; a name is looked up on another.
///
/// # Errors
/// [`DeadlinePassed`](TransportError::DeadlinePassed) with the last attempt's error,
/// [`Cancelled`](TransportError::Cancelled), or [`Io`](TransportError::Io) if trying again would
/// not help: unknown name, no route, no permission, no agreement on TLS.
pub fn dial(endpoint: &Endpoint, options: &DialOptions) -> Result<Channel, TransportError> {
    let mut dialling = Dialling {
        endpoint,
        options: &options.socket,
        tls: options.tls.as_ref(),
        hook: &options.thread_hook,
        limit: options.deadline,
        begun: Instant::now(),
        attempts: 0,
        last: None,
    };
    if options.tls.is_some() && !endpoint.takes_several() {
        let text = "TLS goes over tcp, unix or vsock";
        return Err(dialling.refused(ACTION, io::Error::new(ErrorKind::Unsupported, text)));
    }
    if let Endpoint::File { path, offset } = endpoint {
        // Nothing to wait for.
        return FileStream::create(path, *offset)
            .map(|file| Channel::of_file(file, endpoint.to_string()))
            .map_err(|source| dialling.refused("write to", source));
    }
    let trying = within(options.deadline, dialling.keep_trying());
    match block_on(first(options.stopper.stopped(), trying)) {
        Ok(First::Other(Some(Ok(channel)))) => Ok(channel),
        Ok(First::Other(Some(Err(source)))) => Err(dialling.refused(ACTION, source)),
        Ok(First::Other(None)) => Err(dialling.too_late()),
        Ok(First::One(Ok(()))) => Err(dialling.cancelled()),
        Ok(First::One(Err(source))) | Err(source) => Err(dialling.refused(ACTION, source)),
    }
}

/// Encrypts a connection that is there already, with the TLS of `options`: the handshake that
/// [`dial`] makes. It is a plain socket on which nothing has been said. A connection has no host
/// name: the name in the server's certificate is the one that [`TlsClient`] was told to expect.
/// Without TLS in `options` the connection stays as it is.
///
/// # Errors
/// `TimedOut` after the deadline, `ConnectionAborted` by the stopper, `InvalidData` with the reason
/// of a handshake that failed.
pub fn encrypt(connection: Channel, options: &DialOptions) -> io::Result<Channel> {
    let Some(tls) = &options.tls else { return Ok(connection) };
    let number = connection.descriptor_number().ok_or(ErrorKind::NotConnected)?;
    let name = tls::expected_name(tls, &Endpoint::Fd(number))?;
    let (socket, peer) = connection.into_socket()?;
    let shaking = within(options.deadline, tls::connect(tls, socket, name));
    match block_on(first(options.stopper.stopped(), shaking))? {
        First::Other(Some(stream)) => Ok(Channel::over(Stream::Tls(Box::new(stream?)), peer)),
        First::Other(None) => {
            let text = format!("the peer did not finish the TLS handshake within {:?}", options.deadline);
            Err(io::Error::new(ErrorKind::TimedOut, text))
        }
        First::One(stopped) => stopped.and(Err(ErrorKind::ConnectionAborted.into())),
    }
}

struct Dialling<'a> {
    endpoint: &'a Endpoint,
    options: &'a SocketOptions,
    tls: Option<&'a TlsClient>,
    hook: &'a ThreadHook,
    limit: Duration,
    begun: Instant,
    attempts: u32,
    last: Option<io::Error>,
}

impl Dialling<'_> {
    async fn keep_trying(&mut self) -> io::Result<Channel> {
        let mut backoff = Backoff::new(Duration::from_millis(10), Duration::from_millis(500));
        loop {
            self.attempts += 1;
            match self.attempt().await {
                Err(error) if may_pass(&error) => {
                    tracing::debug!(endpoint = %self.endpoint, %error, attempt = self.attempts, "not there yet");
                    self.last = Some(error);
                }
                outcome => return outcome,
            }
            sleep_until(Instant::now() + backoff.pause()).await;
        }
    }

    async fn attempt(&mut self) -> io::Result<Channel> {
        let tls = match self.tls {
            Some(tls) => Some((tls, tls::expected_name(tls, self.endpoint)?)),
            None => None,
        };
        let connected = match self.endpoint {
            Endpoint::Tcp { port: 0, .. } => {
                Err(io::Error::new(ErrorKind::InvalidInput, "port 0 is for listening, expected 1..=65535"))
            }
            Endpoint::Tcp { host, port } => self.tcp(host, *port).await,
            Endpoint::Unix(path) => self.unix(path).await,
            Endpoint::Vsock { cid, port } => vsock::dial(*cid, *port).await,
            Endpoint::Exec(_) | Endpoint::Fd(_) | Endpoint::FdFrom(_) => return self.ready_made().await,
            Endpoint::File { .. } => Err(ErrorKind::Unsupported.into()),
        }?;
        let peer = socket::peer_name(&connected)?;
        let Some((tls, name)) = tls else {
            return socket::into_channel(connected, peer, &[], self.options);
        };
        socket::tune(&connected, self.options)?;
        self.last = Some(io::Error::new(
            ErrorKind::TimedOut,
            "connected, but the peer did not finish the TLS handshake",
        ));
        let stream = tls::connect(tls, connected, name).await?;
        Ok(Channel::over(Stream::Tls(Box::new(stream)), peer))
    }

    async fn tcp(&self, host: &str, port: u16) -> io::Result<Socket> {
        let host = if host.is_empty() { "localhost" } else { host };
        let addresses = lookup(host, port, self.hook).await?;
        let mut failure = io::Error::new(ErrorKind::AddrNotAvailable, "the name has no address");
        for (tried, address) in addresses.iter().enumerate() {
            let timeout = self.attempt_timeout(addresses.len() - tried);
            match within(timeout, tcp_address(*address, self.options))
                .await
                .unwrap_or_else(|| Err(ErrorKind::TimedOut.into()))
            {
                Ok(connected) => return Ok(connected),
                // "Refused" at one address says more than "unreachable" at the next.
                Err(error) if may_pass(&error) || !may_pass(&failure) => failure = error,
                Err(_) => {}
            }
        }
        Err(failure)
    }

    async fn unix(&self, path: &Path) -> io::Result<Socket> {
        let address = socket::unix_address(path)?;
        let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
        self.options.set_buffers(&socket)?;
        connect(socket, &address).await
    }

    /// The channel of a descriptor or a command, which needs no connecting.
    async fn ready_made(&self) -> io::Result<Channel> {
        let descriptor = match self.endpoint {
            Endpoint::Fd(number) => descriptor::take(*number)?,
            Endpoint::FdFrom(path) => {
                let giver = Arc::new(self.unix(path).await?);
                ready(&giver, PollFlags::IN).await?;
                descriptor::receive_descriptor(&OwnedFd::from(into_socket(giver)?).into())?
            }
            endpoint => return command(endpoint),
        };
        descriptor::dialled(descriptor, self.endpoint, self.options)
    }

    /// Timeout for one of `left` addresses: one that does not answer must leave time for the
    /// others.
    fn attempt_timeout(&self, left: usize) -> Duration {
        let rest = self.limit.saturating_sub(self.begun.elapsed());
        match u32::try_from(left) {
            Ok(left) if left > 1 => (rest / left).min(Duration::from_secs(5)),
            _ => rest,
        }
    }

    fn refused(self, action: &'static str, source: io::Error) -> TransportError {
        let (endpoint, elapsed) = (self.endpoint.clone(), self.begun.elapsed());
        TransportError::Io { action, endpoint, elapsed, source }
    }

    fn too_late(self) -> TransportError {
        TransportError::DeadlinePassed {
            action: ACTION,
            endpoint: self.endpoint.clone(),
            attempts: self.attempts,
            elapsed: self.begun.elapsed(),
            limit: self.limit,
            source: self.last.unwrap_or_else(|| ErrorKind::TimedOut.into()),
        }
    }

    fn cancelled(self) -> TransportError {
        let (endpoint, elapsed) = (self.endpoint.clone(), self.begun.elapsed());
        TransportError::Cancelled { action: ACTION, endpoint, elapsed }
    }
}

async fn tcp_address(address: SocketAddr, options: &SocketOptions) -> io::Result<Socket> {
    let socket = options.tcp_socket(address)?;
    options.bind_source(&socket, address)?;
    let connected = connect(socket, &address.into()).await?;
    if socket::is_connected_to_itself(&connected)? {
        return Err(ErrorKind::ConnectionRefused.into());
    }
    Ok(connected)
}

/// The channel through the command of an `exec:` endpoint.
pub(crate) fn command(endpoint: &Endpoint) -> io::Result<Channel> {
    let Endpoint::Exec(command) = endpoint else { return Err(ErrorKind::InvalidInput.into()) };
    Ok(Channel::over(Stream::Pipe(Pipe::through(command)?), endpoint.to_string()))
}

/// Whether the same attempt may succeed later: nothing listens yet, a relay hung up at once
/// (`NotConnected`), or the listener's queue is full (`WouldBlock`, on unix sockets).
fn may_pass(error: &io::Error) -> bool {
    use ErrorKind::{
        ConnectionAborted, ConnectionRefused, ConnectionReset, NotConnected, NotFound, TimedOut, WouldBlock,
    };
    matches!(
        error.kind(),
        ConnectionAborted
            | ConnectionRefused
            | ConnectionReset
            | NotConnected
            | NotFound
            | TimedOut
            | WouldBlock
    )
}

const ACTION: &str = "connect to";

#[cfg(test)]
mod tests;
