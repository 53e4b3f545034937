//! Where connections arrive, in any order, and are told apart by their first bytes.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use multifd_transports::{Arrival, Channel, Listener};
use multifd_wire::{MULTIFD_MAGIC, STREAM_MAGIC};

use super::channel::ChannelWorker;
use super::shared::Shared;
use crate::error::{Error, ErrorKind, Phase, Result};
use crate::stop::Monitor;
use crate::workers::Crew;

/// Most connections of one migration: QEMU's limit of 255 channels, and main.
const MAX_CONNECTIONS: usize = 256;

/// Accepts until the listener is stopped: hands main over, starts a worker for every other channel.
pub(crate) struct Lobby {
    shared: Arc<Shared>,
    crew: Arc<Crew>,
    main: Monitor<Option<Channel>>,
    /// There is only one main, also when it has been taken from `main`.
    main_came: AtomicBool,
    connections: AtomicUsize,
}

impl Lobby {
    pub(crate) fn new(shared: &Arc<Shared>, crew: &Arc<Crew>) -> Self {
        Self {
            shared: Arc::clone(shared),
            crew: Arc::clone(crew),
            main: Monitor::new(None, crew.stop()),
            main_came: AtomicBool::new(false),
            connections: AtomicUsize::new(0),
        }
    }

    /// Where the main channel will be.
    pub(crate) fn main(&self) -> Monitor<Option<Channel>> {
        self.main.clone()
    }

    /// The accept thread: runs until the listener's stopper or an error ends it.
    pub(crate) fn run(&self, listener: &Listener) -> Result<()> {
        let patience = self.shared.session.timeout;
        let stop = self.crew.stop();
        listener
            .serve(4, patience, &mut |arrival| {
                match self.on_arrival(arrival, listener.takes_several()) {
                    Ok(()) => {}
                    // All is here. Who knocks now has lost his way, unless he is a channel that was missing: see Gate::join.
                    Err(error) if self.shared.gate.finished() => tracing::warn!(%error, "after the end"),
                    Err(error) => stop.trip(error),
                }
            })
            .map_err(|error| Error::transport(Phase::Accept, error))
    }

    /// `others_may_come`: whoever hangs up without a word was a mistake, and no reason to give up.
    fn on_arrival(&self, arrival: Arrival, others_may_come: bool) -> Result<()> {
        match arrival {
            Arrival::Opened { .. } => {
                self.shared.gate.opened();
                Ok(())
            }
            Arrival::Identified { channel, first, .. } => {
                self.identify(channel, first)?;
                // After the worker has its place at the gate: a sync point must not slip through in between.
                self.shared.gate.identified();
                Ok(())
            }
            Arrival::Silent { peer, waited, .. } => {
                let detail = format!("the connection said nothing for {waited:?}");
                Err(Error::new(ErrorKind::Deadline, Phase::Accept, detail).on(peer))
            }
            Arrival::Closed { peer, received: 0, .. } if others_may_come => {
                tracing::warn!(peer, "a connection was closed before it said anything");
                self.shared.gate.identified();
                Ok(())
            }
            Arrival::Closed { peer, received, .. } => {
                let detail = format!("the connection ended after {received} bytes, no channel is that short");
                Err(Error::new(ErrorKind::Transport, Phase::Accept, detail).on(peer))
            }
            Arrival::Failed { peer, error, .. } => {
                Err(Error::io(Phase::Accept, "the first bytes", error).on(peer))
            }
        }
    }

    fn identify(&self, channel: Channel, first: [u8; 4]) -> Result<()> {
        let peer = channel.peer().to_owned();
        if self.connections.fetch_add(1, Ordering::Relaxed) >= MAX_CONNECTIONS {
            let detail =
                format!("more than {MAX_CONNECTIONS} connections, a migration has at most 255 channels");
            return Err(Error::misbehaved(Phase::Accept, detail).on(peer));
        }
        match u32::from_be_bytes(first) {
            STREAM_MAGIC if self.main_came.swap(true, Ordering::Relaxed) => {
                Err(Error::misbehaved(Phase::Accept, "a second main channel").on(peer))
            }
            STREAM_MAGIC => {
                self.main.modify_and_notify(|main| *main = Some(channel));
                Ok(())
            }
            MULTIFD_MAGIC if !channel.is_two_way() => {
                let detail = "what went over a parallel channel, expected a main channel's stream";
                Err(Error::new(ErrorKind::InvalidStream, Phase::Accept, detail).on(peer))
            }
            MULTIFD_MAGIC => ChannelWorker::start(channel, &self.shared, &self.crew),
            // A TLS record of the handshake: type 22, version 3.x.
            tls if tls >> 16 == 0x1603 => {
                let detail = "the peer speaks TLS, and this side is not set up for it (see --tls-dir)";
                Err(Error::incompatible(Phase::Accept, detail).on(peer))
            }
            other => {
                let detail = format!(
                    "magic {other:#010x}, expected {STREAM_MAGIC:#010x} (main) or {MULTIFD_MAGIC:#010x} (channel)"
                );
                Err(Error::new(ErrorKind::InvalidStream, Phase::Accept, detail).on(peer))
            }
        }
    }
}
