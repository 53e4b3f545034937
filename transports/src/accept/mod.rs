//! Accepting connections: their first bytes are read side by side, so that none delays another.

use std::collections::VecDeque;
use std::io::{self, ErrorKind};
use std::path::Path;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use socket2::Socket;

use crate::accept::client::{Client, ListeningSocket};
use crate::accept::first_bytes::{FirstBytes, OpeningLen};
use crate::accept::listener::BACKLOG;
use crate::channel::stream::Stream;
use crate::dial::backoff::Backoff;
use crate::os::event_loop::{First, TaskHandle, Tasks, first, sleep_until, within};
use crate::os::socket;
use crate::tls::Stage;
use crate::{Channel, Listener, SocketOptions, TlsServer};

pub(crate) mod client;
pub(crate) mod first_bytes;
pub(crate) mod listener;
mod ready;
mod socket_file;

/// An event of a connection. Each is [`Opened`](Self::Opened) first, and then has exactly one other
/// event; the last ones may have none when the listener is stopped.
#[derive(Debug)]
pub enum Arrival {
    /// The client closed before it had sent enough.
    Closed {
        /// The connection's number.
        number: u64,
        /// Its name.
        peer: String,
        /// Bytes that it had sent.
        received: usize,
    },
    /// The connection broke before it had sent enough.
    Failed {
        /// The connection's number.
        number: u64,
        /// Its name.
        peer: String,
        /// The system's error.
        error: io::Error,
    },
    /// The client has sent its first bytes.
    Identified {
        /// The connection's number.
        number: u64,
        /// The connection; [`Channel::recv`] gives the first bytes again.
        channel: Channel,
        /// The first bytes.
        first: [u8; 4],
    },
    /// A client connected.
    Opened {
        /// The connection's number; they count up from 1.
        number: u64,
        /// Its name.
        peer: String,
    },
    /// The client did not send its first bytes within the timeout, or had waited longest of too
    /// many; it was dropped.
    TimedOut {
        /// The connection's number.
        number: u64,
        /// Its name.
        peer: String,
        /// How long it had been connected.
        waited: Duration,
    },
}

/// Accepts into `unidentified` until the listener is stopped. An error is the listening socket's
/// own.
///
/// `socket` is a duplicate, which is dropped as soon as `listening` has its own: a closed listener
/// must leave none behind.
pub(crate) async fn serve(
    listener: &Listener,
    socket: Socket,
    mut unidentified: Unidentified<'_>,
) -> io::Result<()> {
    let (stopper, closing) = (listener.stopper(), listener.closing());
    let (mut stopped, mut closed) = (pin!(stopper.stopped()), pin!(closing.stopped()));
    let mut listening = Some(ListeningSocket::new(&socket)?);
    drop(socket);
    let mut backoff = Backoff::new(Duration::from_millis(1), Duration::from_millis(100));
    let mut not_before = Instant::now();
    while listening.is_some() || !unidentified.tasks.is_empty() {
        // In this order: a connection that is identified makes room for the next.
        let close = async {
            match &listening {
                Some(_) => (&mut closed).await,
                None => std::future::pending().await,
            }
        };
        let ends = first(&mut stopped, close);
        let event =
            first(ends, first(unidentified.tasks.next(), accept(listening.as_ref(), not_before))).await;
        match event {
            First::One(First::One(stopped)) => return stopped,
            First::One(First::Other(closed)) => {
                closed?;
                if let Some(listening) = listening.take() {
                    accept_queued(listener, &listening, &mut unidentified).await;
                }
                listener.note_closed();
            }
            First::Other(First::One(done)) => {
                if let Some(listening) = &listening {
                    accept_queued(listener, listening, &mut unidentified).await;
                }
                unidentified.leave(done);
            }
            First::Other(First::Other(accepted)) => match accepted {
                Ok((client, address)) => {
                    backoff.reset();
                    unidentified.admit(listener.next_number(), client, address);
                }
                Err(error) if is_own_fault(&error) => return Err(error),
                Err(error) => {
                    if backoff.is_fresh() {
                        tracing::warn!(endpoint = %listener.endpoint(), %error, "cannot accept, trying again");
                    }
                    not_before = Instant::now() + backoff.pause();
                }
            },
        }
    }
    Ok(())
}

/// The connections that have not sent their first bytes yet.
pub(crate) struct Unidentified<'a> {
    terms: Terms,
    path: Option<&'a Path>,
    on_arrival: &'a mut dyn FnMut(Arrival),
    tasks: Tasks<Arrival>,
    /// One for each task, longest waiting first.
    waiting: VecDeque<Waiting>,
}

struct Waiting {
    number: u64,
    peer: String,
    since: Instant,
    task: TaskHandle,
}

impl<'a> Unidentified<'a> {
    pub(crate) fn new(
        terms: Terms,
        path: Option<&'a Path>,
        on_arrival: &'a mut dyn FnMut(Arrival),
    ) -> io::Result<Self> {
        check_first_bytes(terms.first_bytes)?;
        Ok(Self { terms, path, on_arrival, tasks: Tasks::new(), waiting: VecDeque::new() })
    }

    fn admit(&mut self, number: u64, client: Client, address: Option<String>) {
        if self.waiting.len() >= MAX_WAITING {
            self.drop_longest_waiting();
        }
        let peer = address.unwrap_or_else(|| socket::unix_name(self.path));
        (self.on_arrival)(Arrival::Opened { number, peer: peer.clone() });
        let (name, terms) = (peer.clone(), self.terms.clone());
        let task = match self.terms.tls.clone() {
            None => self.tasks.spawn(identify(number, name, client, terms)),
            Some(tls) => self.tasks.spawn(identify_tls(number, name, client, tls, terms)),
        };
        self.waiting.push_back(Waiting { number, peer, since: Instant::now(), task });
    }

    fn leave(&mut self, arrival: Arrival) {
        let number = match &arrival {
            Arrival::Closed { number, .. }
            | Arrival::Failed { number, .. }
            | Arrival::Identified { number, .. }
            | Arrival::Opened { number, .. }
            | Arrival::TimedOut { number, .. } => *number,
        };
        self.waiting.retain(|waiting| waiting.number != number);
        (self.on_arrival)(arrival);
    }

    fn drop_longest_waiting(&mut self) {
        // A connection that is identified is about to leave by itself, and is not dropped.
        let Some(index) = self.waiting.iter().position(|waiting| !waiting.task.is_finished()) else { return };
        if let Some(Waiting { number, peer, since, task }) = self.waiting.remove(index) {
            task.abort();
            (self.on_arrival)(Arrival::TimedOut { number, peer, waited: since.elapsed() });
        }
    }
}

/// Accepts the clients that are in the system's queue by now. A source makes all of its connections
/// before it sends on main (docs/wire.md §12): when main is reported, the others must have been
/// reported as opened. At most a queue's worth, so that no client can delay the rest by connecting
/// again and again.
async fn accept_queued(
    listener: &Listener,
    listening: &ListeningSocket,
    unidentified: &mut Unidentified<'_>,
) {
    for _ in 0..BACKLOG {
        // An error of the queue is reported by the next regular accept.
        let Ok(Some((client, address))) = listening.accept_now() else { return };
        unidentified.admit(listener.next_number(), client, address);
        // A stream of new clients must not keep the accepted ones from being read.
        unidentified.tasks.turn().await;
    }
}

pub(crate) fn check_first_bytes(wanted: usize) -> io::Result<()> {
    if wanted <= FirstBytes::MOST {
        return Ok(());
    }
    let text = format!("{wanted} first bytes, limit is {}", FirstBytes::MOST);
    Err(io::Error::new(ErrorKind::InvalidInput, text))
}

/// The next client; never ready without a listening socket.
async fn accept(
    listening: Option<&ListeningSocket>,
    not_before: Instant,
) -> io::Result<(Client, Option<String>)> {
    let Some(listening) = listening else { return std::future::pending().await };
    sleep_until(not_before).await;
    listening.accept().await
}

/// Errors that say that the socket does not listen. All others belong to one client or pass with
/// time.
fn is_own_fault(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EBADF | libc::EFAULT | libc::EINVAL | libc::ENOTSOCK))
}

/// How a connection is treated until it is identified, and the options of its socket.
#[derive(Clone)]
pub(crate) struct Terms {
    pub(crate) first_bytes: usize,
    pub(crate) opening: OpeningLen,
    pub(crate) keeps_silent: Arc<AtomicBool>,
    pub(crate) timeout: Duration,
    pub(crate) options: SocketOptions,
    pub(crate) tls: Option<TlsServer>,
}

async fn identify(
    number: u64,
    peer: String,
    client: Client,
    Terms { first_bytes, opening, keeps_silent, timeout, options, .. }: Terms,
) -> Arrival {
    let begun = Instant::now();
    let mut first = FirstBytes::new(first_bytes, opening);
    let received = within_or_kept(timeout, &keeps_silent, receive(&mut first, client)).await;
    let channel = match received {
        None => return Arrival::TimedOut { number, peer, waited: begun.elapsed() },
        Some(Ok(None)) => return Arrival::Closed { number, peer, received: first.received() },
        Some(Ok(Some(client))) => {
            let socket = client.into_socket();
            socket.and_then(|socket| socket::into_channel(socket, peer.clone(), first.so_far(), &options))
        }
        Some(Err(error)) => Err(error),
    };
    match channel {
        Ok(channel) => Arrival::Identified { number, channel, first: first.first() },
        Err(error) => Arrival::Failed { number, peer, error },
    }
}

/// As [`identify`], behind a TLS handshake.
async fn identify_tls(number: u64, peer: String, client: Client, tls: TlsServer, terms: Terms) -> Arrival {
    match client.tune(&terms.options) {
        Ok(()) => {
            let first = FirstBytes::new(terms.first_bytes, terms.opening);
            shake_hands(number, peer, client, &tls, first, (terms.timeout, &terms.keeps_silent)).await
        }
        Err(error) => Arrival::Failed { number, peer, error },
    }
}

/// Waits for the handshake, and for the first bytes behind it.
async fn shake_hands(
    number: u64,
    peer: String,
    client: Client,
    tls: &TlsServer,
    mut first: FirstBytes,
    (timeout, keeps_silent): (Duration, &AtomicBool),
) -> Arrival {
    let begun = Instant::now();
    let mut stage = Stage::Handshake(0);
    let accepting = tls.accept(client, &mut first, &mut stage);
    let accepted = within_or_kept(timeout, keeps_silent, accepting).await;
    let error = match (accepted, stage) {
        (Some(Ok(Some(stream))), _) => {
            let channel = Channel::over(Stream::Tls(Box::new(stream)), peer).push_back(first.so_far());
            return Arrival::Identified { number, channel, first: first.first() };
        }
        (Some(Ok(None)), _) => return Arrival::Closed { number, peer, received: 0 },
        (Some(Err(error)), _) => error,
        (None, Stage::Handshake(received @ 1..)) => {
            let text = format!("the TLS handshake stalled after {received} bytes, for {timeout:?}");
            io::Error::new(ErrorKind::TimedOut, text)
        }
        (None, _) => return Arrival::TimedOut { number, peer, waited: begun.elapsed() },
    };
    Arrival::Failed { number, peer, error }
}

/// The result of `work`, or `None` when `timeout` is over and silence is not kept.
async fn within_or_kept<T>(
    timeout: Duration,
    keeps_silent: &AtomicBool,
    work: impl Future<Output = T>,
) -> Option<T> {
    let mut work = pin!(work);
    loop {
        match within(timeout, &mut work).await {
            None if keeps_silent.load(Ordering::Relaxed) => {}
            outcome => return outcome,
        }
    }
}

/// Receives the first bytes; gives the client back, or `None` if it closed before.
///
/// The bytes are taken from the socket rather than peeked at: a peek of too few would be ready
/// again at once, for as long as the client likes.
async fn receive(first: &mut FirstBytes, mut client: Client) -> io::Result<Option<Client>> {
    while let missing @ [_, ..] = first.missing() {
        match client.read(missing).await? {
            0 => return Ok(None),
            received => first.note(received),
        }
    }
    Ok(Some(client))
}

/// Unidentified connections at a time: as many as the channels that a source may have. At one
/// descriptor each they leave most of the usual limit of 1024 to others.
const MAX_WAITING: usize = 256;
