//! A connection of any kind whose other end is ours to break.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

use multifd_engine::{Canceller, Error};
use multifd_tests::{Failure, Inherited, Outcome, Scratch};
use multifd_transports::{Arrival, Channel, DialOptions, Endpoint, Listener};
use rustix::pipe::pipe;

/// The timeout of the ends under test.
pub(crate) const TIMEOUT: Duration = Duration::from_millis(300);

/// Nothing that fails may take longer: two waits of a timeout each may come one after the other, a
/// command has a second to end, and the machine may be busy with others.
const LIMIT: Duration = Duration::from_secs(10);

#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Kind {
    Pipe,
    SocketPair,
    Tcp,
    Unix,
    Vsock,
}

/// What the other end does after it has moved some bytes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Then {
    /// It closes.
    Cut,
    /// It neither reads nor writes, and stays.
    Stall,
}

/// Where our end is, and how the other end gets there.
pub(crate) struct Wire {
    pub(crate) endpoint: Endpoint,
    peer: Option<OwnedFd>,
    _scratch: Scratch,
}

impl Kind {
    /// Those that work on this machine.
    pub(crate) fn all() -> Vec<Self> {
        let vsock = || {
            let listener = Listener::bind(&Endpoint::Vsock { cid: 1, port: 0 }).ok()?;
            let options = DialOptions { deadline: TIMEOUT, ..DialOptions::default() };
            multifd_transports::dial(&listener.endpoint(), &options).ok()
        };
        let mut all = vec![Self::Pipe, Self::SocketPair, Self::Tcp, Self::Unix];
        all.extend(vsock().map(|_| Self::Vsock));
        all
    }

    /// What names our end in errors.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Pipe => ", pipe",
            Self::SocketPair => ", unix:(unnamed)",
            Self::Tcp => "tcp:127.0.0.1:",
            Self::Unix => "unix:/",
            Self::Vsock => "vsock:",
        }
    }

    /// Whether a further connection may come.
    pub(crate) fn takes_several(self) -> bool {
        !matches!(self, Self::Pipe | Self::SocketPair)
    }

    /// `source`: our end is one.
    pub(crate) fn wire(self, source: bool) -> Outcome<Wire> {
        let scratch = Scratch::new()?;
        let (endpoint, peer) = match self {
            Self::Pipe => {
                let (reading, writing) = pipe()?;
                let (ours, theirs) = if source { (writing, reading) } else { (reading, writing) };
                (Inherited::new(ours)?.give_away(), Some(theirs))
            }
            Self::SocketPair => {
                let (ours, theirs) = UnixStream::pair()?;
                (Inherited::new(ours)?.give_away(), Some(theirs.into()))
            }
            Self::Tcp => (Endpoint::Tcp { host: "127.0.0.1".to_owned(), port: 0 }, None),
            Self::Unix => (Endpoint::Unix(scratch.path("socket")), None),
            Self::Vsock => (Endpoint::Vsock { cid: 1, port: 0 }, None),
        };
        Ok(Wire { endpoint, peer, _scratch: scratch })
    }
}

impl Wire {
    /// The other end of a destination that listens at `there`.
    pub(crate) fn connect(&mut self, there: &Endpoint) -> Outcome<Channel> {
        match self.peer.take() {
            Some(peer) => Ok(Channel::try_from(peer)?),
            None => Ok(multifd_transports::dial(there, &DialOptions::default())?),
        }
    }

    /// The other end of a source, before that connects to [`Wire::endpoint`].
    pub(crate) fn accept(&mut self) -> Outcome<Receiver<Channel>> {
        let (sender, receiver) = channel();
        if let Some(peer) = self.peer.take() {
            sender.send(Channel::try_from(peer)?)?;
            return Ok(receiver);
        }
        let listener = Listener::bind(&self.endpoint)?;
        self.endpoint = listener.endpoint();
        thread::Builder::new().spawn(move || {
            let stopper = listener.stopper();
            listener.serve(0, LIMIT, &mut |arrival| {
                if let Arrival::Identified { channel, .. } = arrival {
                    let _ = sender.send(channel);
                    stopper.stop();
                }
            })
        })?;
        Ok(receiver)
    }
}

/// Runs `ours` while `peer` breaks the connection, and gives the error. The peer's value lives
/// until `ours` has ended; an end that hangs is cancelled, and that is a failure.
pub(crate) fn broken<K: Send>(
    canceller: Canceller,
    ours: impl FnOnce() -> Result<(), Error>,
    peer: impl FnOnce() -> Outcome<K> + Send,
) -> Outcome<Error> {
    let (done, over) = channel::<()>();
    thread::scope(|scope| {
        let peer = scope.spawn(move || {
            let _stays = peer()?;
            let hangs = over.recv_timeout(LIMIT) == Err(RecvTimeoutError::Timeout);
            if hangs {
                canceller.cancel();
            }
            Ok::<_, Failure>(hangs)
        });
        let result = ours();
        drop(done);
        let hangs = peer.join().map_err(|_| Failure::new("the peer panicked"))??;
        match result {
            Err(error) if hangs => Err(Failure::new(format!("hangs: {}", error.chain()))),
            Err(error) => Ok(error),
            Ok(()) => Err(Failure::new("it succeeded")),
        }
    })
}

/// Fails unless the error says all of it.
#[track_caller]
pub(crate) fn says(error: &Error, parts: &[&str]) {
    let chain = error.chain();
    let missing: Vec<_> = parts.iter().filter(|part| !chain.contains(**part)).collect();
    assert!(missing.is_empty(), "{chain:?} does not say {missing:?}");
}
