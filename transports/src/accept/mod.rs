//! Accepting: every client is heard, none holds up another.

use std::collections::VecDeque;
use std::io::{self, ErrorKind};
use std::path::Path;
use std::pin::pin;
use std::time::{Duration, Instant};

use socket2::Socket;

use crate::accept::client::{Client, Door};
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

/// What happened to a connection. Each is [`Opened`](Self::Opened) first, and then has exactly one other end;
/// the last ones may have none when the listener is stopped.
#[derive(Debug)]
pub enum Arrival {
    /// The client closed before it had sent enough.
    Closed {
        /// The connection's number.
        number: u64,
        /// Who it was.
        peer: String,
        /// Bytes that it had sent.
        received: usize,
    },
    /// The connection broke before it had sent enough.
    Failed {
        /// The connection's number.
        number: u64,
        /// Who it was.
        peer: String,
        /// The system's word.
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
        /// Who it is.
        peer: String,
    },
    /// The client sent too little for too long, or was the longest silent of too many; it was dropped.
    Silent {
        /// The connection's number.
        number: u64,
        /// Who it was.
        peer: String,
        /// How long it had been connected.
        waited: Duration,
    },
}

/// Accepts into `lobby` until the listener is stopped. An error is the listening socket's own.
///
/// `socket` is a duplicate, which is dropped as soon as the door has its own: a closed listener must leave none behind.
pub(crate) async fn serve(listener: &Listener, socket: Socket, mut lobby: Lobby<'_>) -> io::Result<()> {
    let (stopper, closing) = (listener.stopper(), listener.closing());
    let (mut stopped, mut closed) = (pin!(stopper.stopped()), pin!(closing.stopped()));
    let mut door = Some(Door::new(&socket)?);
    drop(socket);
    let mut backoff = Backoff::new(Duration::from_millis(1), Duration::from_millis(100));
    let mut not_before = Instant::now();
    while door.is_some() || !lobby.tasks.is_empty() {
        // In this order: those who are through make room for the next.
        let close = async {
            match &door {
                Some(_) => (&mut closed).await,
                None => std::future::pending().await,
            }
        };
        let ends = first(&mut stopped, close);
        let event = first(ends, first(lobby.tasks.next(), accept(door.as_ref(), not_before))).await;
        match event {
            First::One(First::One(stopped)) => return stopped,
            First::One(First::Other(closed)) => {
                closed?;
                if let Some(door) = door.take() {
                    admit_queued(listener, &door, &mut lobby).await;
                }
                listener.note_closed();
            }
            First::Other(First::One(done)) => {
                if let Some(door) = &door {
                    admit_queued(listener, door, &mut lobby).await;
                }
                lobby.leave(done);
            }
            First::Other(First::Other(accepted)) => match accepted {
                Ok((client, address)) => {
                    backoff.reset();
                    lobby.admit(listener.next_number(), client, address);
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
pub(crate) struct Lobby<'a> {
    first_bytes: usize,
    opening: OpeningLen,
    silence: Duration,
    path: Option<&'a Path>,
    options: &'a SocketOptions,
    tls: Option<TlsServer>,
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

impl<'a> Lobby<'a> {
    pub(crate) fn new(
        (first_bytes, opening): (usize, OpeningLen),
        silence: Duration,
        path: Option<&'a Path>,
        (options, tls): (&'a SocketOptions, Option<TlsServer>),
        on_arrival: &'a mut dyn FnMut(Arrival),
    ) -> io::Result<Self> {
        check_first_bytes(first_bytes)?;
        let (tasks, waiting) = (Tasks::new(), VecDeque::new());
        Ok(Self { first_bytes, opening, silence, path, options, tls, on_arrival, tasks, waiting })
    }

    fn admit(&mut self, number: u64, client: Client, address: Option<String>) {
        if self.waiting.len() >= MAX_WAITING {
            self.evict_longest_waiting();
        }
        let peer = address.unwrap_or_else(|| socket::unix_name(self.path));
        (self.on_arrival)(Arrival::Opened { number, peer: peer.clone() });
        let (first, caller) = (FirstBytes::new(self.first_bytes, self.opening), peer.clone());
        let terms = Terms { silence: self.silence, options: self.options.clone() };
        let task = match self.tls.clone() {
            None => self.tasks.spawn(identify(number, caller, client, first, terms)),
            Some(tls) => self.tasks.spawn(identify_sealed(number, caller, client, (tls, first), terms)),
        };
        self.waiting.push_back(Waiting { number, peer, since: Instant::now(), task });
    }

    fn leave(&mut self, arrival: Arrival) {
        let number = match &arrival {
            Arrival::Closed { number, .. }
            | Arrival::Failed { number, .. }
            | Arrival::Identified { number, .. }
            | Arrival::Opened { number, .. }
            | Arrival::Silent { number, .. } => *number,
        };
        self.waiting.retain(|waiting| waiting.number != number);
        (self.on_arrival)(arrival);
    }

    fn evict_longest_waiting(&mut self) {
        // Whoever is through already is about to leave by itself, and will not be dropped at the door.
        let Some(index) = self.waiting.iter().position(|waiting| !waiting.task.is_finished()) else { return };
        if let Some(Waiting { number, peer, since, task }) = self.waiting.remove(index) {
            task.abort();
            (self.on_arrival)(Arrival::Silent { number, peer, waited: since.elapsed() });
        }
    }
}

/// Admits who is in the queue by now. A source makes all of its connections before it speaks on main (docs/wire.md
/// §12): whoever hears main must have heard of the others. At most a queue's worth, so that nobody can hold up the
/// rest by connecting again and again.
async fn admit_queued(listener: &Listener, door: &Door, lobby: &mut Lobby<'_>) {
    for _ in 0..BACKLOG {
        // What is wrong with the queue, the next regular look at it will tell.
        let Ok(Some((client, address))) = door.accept_now() else { return };
        lobby.admit(listener.next_number(), client, address);
        // A stream of clients must not keep those inside from being heard.
        lobby.tasks.turn().await;
    }
}

pub(crate) fn check_first_bytes(wanted: usize) -> io::Result<()> {
    if wanted <= FirstBytes::MOST {
        return Ok(());
    }
    let text = format!("{wanted} first bytes, limit is {}", FirstBytes::MOST);
    Err(io::Error::new(ErrorKind::InvalidInput, text))
}

/// The next client; without a door, none ever.
async fn accept(door: Option<&Door>, not_before: Instant) -> io::Result<(Client, Option<String>)> {
    let Some(door) = door else { return std::future::pending().await };
    sleep_until(not_before).await;
    door.accept().await
}

/// Errors that say that the socket does not listen. All others belong to one client or pass with time.
fn is_own_fault(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EBADF | libc::EFAULT | libc::EINVAL | libc::ENOTSOCK))
}

/// How a connection is treated until it is identified, and its socket for good.
struct Terms {
    silence: Duration,
    options: SocketOptions,
}

async fn identify(
    number: u64,
    peer: String,
    client: Client,
    mut first: FirstBytes,
    Terms { silence, options }: Terms,
) -> Arrival {
    let begun = Instant::now();
    let channel = match within(silence, receive(&mut first, client)).await {
        None => return Arrival::Silent { number, peer, waited: begun.elapsed() },
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

/// The same behind a TLS handshake.
async fn identify_sealed(
    number: u64,
    peer: String,
    client: Client,
    (tls, mut first): (TlsServer, FirstBytes),
    Terms { silence, options }: Terms,
) -> Arrival {
    let begun = Instant::now();
    let mut stage = Stage::Handshake(0);
    if let Err(error) = client.tune(&options) {
        return Arrival::Failed { number, peer, error };
    }
    let accepted = within(silence, tls.accept(client, &mut first, &mut stage)).await;
    let error = match (accepted, stage) {
        (Some(Ok(Some(stream))), _) => {
            let channel = Channel::over(Stream::Tls(Box::new(stream)), peer).push_back(first.so_far());
            return Arrival::Identified { number, channel, first: first.first() };
        }
        (Some(Ok(None)), _) => return Arrival::Closed { number, peer, received: 0 },
        (Some(Err(error)), _) => error,
        (None, Stage::Handshake(received @ 1..)) => {
            let text = format!("the TLS handshake stalled after {received} bytes, for {silence:?}");
            io::Error::new(ErrorKind::TimedOut, text)
        }
        (None, _) => return Arrival::Silent { number, peer, waited: begun.elapsed() },
    };
    Arrival::Failed { number, peer, error }
}

/// Receives what is wanted; gives the client back, or `None` if it closed before.
///
/// The bytes are taken from the socket rather than peeked at: a peek of too few would be ready again at
/// once, for as long as the client likes.
async fn receive(first: &mut FirstBytes, mut client: Client) -> io::Result<Option<Client>> {
    while let missing @ [_, ..] = first.missing() {
        match client.read(missing).await? {
            0 => return Ok(None),
            received => first.note(received),
        }
    }
    Ok(Some(client))
}

/// Connections that may be silent at a time: as many as the channels that a source may have. At one
/// descriptor each they leave most of the usual limit of 1024 to others.
const MAX_WAITING: usize = 256;
