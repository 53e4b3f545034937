//! Accepting the connections of one migration, in any order, and telling them apart by their first
//! bytes.
//!
//! A connection is nothing until it has proved what it is: main by the stream's magic, a channel by
//! a whole initial packet that fits. Until then nothing that becomes of it ends the migration; it
//! is closed, with a warning. See docs/channels.md.

use std::sync::{Arc, Mutex};

use multifd_transports::{Arrival, Channel, Listener};
use multifd_wire::{InitialPacket, MULTIFD_MAGIC, ResumeOpening, STREAM_MAGIC};

use super::sync::JoinError;
use super::worker::ChannelWorker;
use crate::destination::postcopy::urgent;
use crate::destination::resume;
use crate::destination::shared::DestinationShared;
use crate::error::{Error, ErrorKind, Phase, Result};
use crate::run::stop::{Monitor, lock};
use crate::run::workers::Crew;
use crate::stream::foreign;

/// Accepts until the listener is closed or stopped: hands main over, starts a worker for every
/// other channel.
pub(crate) struct Accepting {
    shared: Arc<DestinationShared>,
    crew: Arc<Crew>,
    main: Monitor<Main>,
    /// Channels of authenticated clients that have come before main, whose client is the source.
    early: Mutex<Vec<Channel>>,
}

/// What is known of the main channel, and of connections that may still become it.
#[derive(Default)]
pub(crate) struct Main {
    pub(crate) channel: Option<Channel>,
    /// There is only one main, also when it has been taken from `channel`.
    came: bool,
    /// Nothing more will be accepted.
    pub(crate) over: bool,
    /// By which its client has authenticated itself.
    certificate: Option<Vec<u8>>,
}

impl Main {
    /// The source of a broken migration is there. A second connection of its own is of no use.
    fn take_over(&mut self, channel: Channel) {
        if !std::mem::replace(&mut self.came, true) {
            self.certificate = channel.client_certificate().map(<[u8]>::to_vec);
            self.channel = Some(channel);
        }
    }
}

/// Channels that may wait for main: as many as a source has.
const MAX_EARLY: usize = 255;

/// How long the opening message of a connection is: nothing is known of a channel before its
/// initial packet has come whole.
pub(crate) fn opening_len(first: [u8; 4]) -> usize {
    if u32::from_be_bytes(first) == MULTIFD_MAGIC {
        InitialPacket::LEN
    } else if ResumeOpening::is_begun_by(first) {
        ResumeOpening::LEN
    } else {
        0
    }
}

/// Of a file, as much as it takes to say what it is; of anything else, what there is already.
fn beginning(channel: &Channel, first: [u8; 4]) -> Vec<u8> {
    let mut beginning = first.to_vec();
    if channel.file_handle().is_some() {
        beginning.resize(foreign::LEN, 0);
        // Once more from the first byte on; a shorter file, or one that cannot be read, says less.
        if channel.recv_exact(&mut beginning).is_err() {
            beginning.truncate(first.len());
        }
    }
    beginning
}

impl Accepting {
    pub(crate) fn new(shared: &Arc<DestinationShared>, crew: &Arc<Crew>) -> Self {
        Self {
            shared: Arc::clone(shared),
            crew: Arc::clone(crew),
            main: Monitor::new(Main::default(), crew.stop()),
            early: Mutex::default(),
        }
    }

    /// Where the main channel will be.
    pub(crate) fn main(&self) -> Monitor<Main> {
        self.main.clone()
    }

    /// The accept thread: runs until the listener is stopped, or closed and all that were accepted
    /// are told apart.
    pub(crate) fn run(&self, listener: &Listener) -> Result<()> {
        let timeout = self.shared.session.timeout;
        let stop = self.crew.stop();
        let served = listener.serve(4, timeout, &mut |arrival| {
            if let Err(error) = self.on_arrival(arrival, listener) {
                stop.trip(error);
            }
            let complete = self.main.read(|main| main.came) && self.shared.channels.is_full();
            if complete && !self.shared.keeps_listening() {
                listener.close();
            }
        });
        let silent = self.shared.channels.unidentified();
        if silent > 0 && !stop.tripped() {
            tracing::warn!(
                silent,
                "connections closed that had not said what they are: all channels are here"
            );
        }
        self.main.modify_and_notify(|main| main.over = true);
        served.map_err(|error| Error::transport(Phase::Accept, error))
    }

    /// Where no strangers can come, whatever is wrong with a connection is an error.
    fn on_arrival(&self, arrival: Arrival, listener: &Listener) -> Result<()> {
        if let Arrival::Opened { .. } = arrival {
            self.shared.channels.opened();
            return Ok(());
        }
        let told = self.tell(arrival, listener.takes_several());
        // After the channel has joined: a sync point must not slip through in between.
        self.shared.channels.identified();
        match told {
            Err(JoinError::Late(error)) if listener.takes_strangers() => {
                self.shared.refusals.note(&error);
                Ok(())
            }
            Err(JoinError::Early(error) | JoinError::Late(error)) => Err(error),
            Ok(()) => Ok(()),
        }
    }

    /// An error is `Early` if the migration cannot go on without the connection.
    fn tell(&self, arrival: Arrival, several: bool) -> Result<(), JoinError> {
        let refused =
            |kind, peer, detail| Err(JoinError::Late(Error::new(kind, Phase::Accept, detail).on(peer)));
        match arrival {
            Arrival::Identified { channel, first, .. } => self.identify(channel, first, several),
            Arrival::TimedOut { peer, waited, .. } => {
                let detail = format!("the connection said nothing for {waited:?}, or not enough");
                refused(ErrorKind::Deadline, peer, detail)
            }
            Arrival::Closed { peer, received, .. } => {
                let detail = format!("the connection ended after {received} bytes, no channel is that short");
                refused(ErrorKind::Transport, peer, detail)
            }
            Arrival::Failed { peer, error, .. } => {
                Err(JoinError::Late(Error::io(Phase::Accept, "the first bytes", error).on(peer)))
            }
            // Counted by the caller.
            Arrival::Opened { .. } => Ok(()),
        }
    }

    fn identify(&self, channel: Channel, first: [u8; 4], several: bool) -> Result<(), JoinError> {
        let peer = channel.peer().to_owned();
        let refused = |error: Error| Err(JoinError::Late(error.on(peer.clone())));
        match u32::from_be_bytes(first) {
            STREAM_MAGIC if self.shared.resumed => {
                let detail = "a migration that begins, while the source of a broken one is waited for";
                refused(Error::misbehaved(Phase::Accept, detail))
            }
            _ if ResumeOpening::is_begun_by(first) => self.introduce(channel).or_else(refused),
            MULTIFD_MAGIC if self.shared.resumed && !self.main.read(|main| main.came) => {
                let detail = "a parallel channel before the main channel of the source that is waited for";
                refused(Error::misbehaved(Phase::Accept, detail))
            }
            STREAM_MAGIC => {
                let second = self.main.modify_silently(|main| std::mem::replace(&mut main.came, true));
                if second {
                    let detail = "a second main channel: another source moves its guest in here already";
                    return refused(Error::misbehaved(Phase::Accept, detail));
                }
                let certificate = channel.client_certificate().map(<[u8]>::to_vec);
                self.main.modify_silently(|main| main.certificate = certificate);
                // Before main is read: a sync point must not slip through in between.
                for early in std::mem::take(&mut *lock(&self.early)) {
                    match self.join_authenticated(early) {
                        Err(JoinError::Late(error)) => self.shared.refusals.note(&error),
                        joined => joined?,
                    }
                }
                self.main.modify_and_notify(|main| main.channel = Some(channel));
                Ok(())
            }
            MULTIFD_MAGIC if !several => {
                let detail = "what went over a parallel channel, expected a main channel's stream";
                refused(Error::new(ErrorKind::InvalidStream, Phase::Accept, detail))
            }
            MULTIFD_MAGIC => self.join_or_wait(channel),
            // A TLS record of the handshake: type 22, version 3.x.
            tls if tls >> 16 == 0x1603 => refused(Error::unexpected_tls(Phase::Accept, "peer")),
            _ if several && self.shared.keeps_listening() && urgent::can_begin(first) => {
                urgent::start(channel, 0, &self.shared, &self.crew)
                    .map_err(|error| JoinError::Late(error.on(peer)))
            }
            other => {
                if let Some(what) = foreign::what_it_is(&beginning(&channel, first)) {
                    let detail = format!("no migration stream, it is {what}");
                    return refused(Error::new(ErrorKind::InvalidStream, Phase::Accept, detail));
                }
                let detail = format!(
                    "magic {other:#010x}, expected {STREAM_MAGIC:#010x} (main) or {MULTIFD_MAGIC:#010x} (channel)"
                );
                refused(Error::new(ErrorKind::InvalidStream, Phase::Accept, detail))
            }
        }
    }

    /// A source that would go on with a broken migration: it has to prove that it is its source, on
    /// a thread of its own, since it may take its time.
    fn introduce(&self, channel: Channel) -> Result<()> {
        let shared = &self.shared;
        let mut opening = [0; ResumeOpening::LEN];
        channel
            .recv_exact(&mut opening)
            .map_err(|error| Error::io(Phase::Accept, "which migration it goes on with", error))?;
        let none = || Error::bug(Phase::Accept, "an opening that is none");
        let opening = ResumeOpening::parse(&opening).ok_or_else(none)?;
        let Some(resumption) = shared.resumption.clone().filter(|kept| kept.id() == opening.id) else {
            return Err(resume::say_not_known(&channel));
        };
        if !shared.resumed {
            let detail = "the source has given up its link, which is not known to have broken here";
            return Err(Error::misbehaved(Phase::Accept, detail));
        }
        let candidate = resumption.candidate()?;
        channel
            .set_timeout(Some(shared.session.timeout))
            .map_err(|error| Error::io(Phase::Accept, "setting up the socket", error))?;
        shared.session.close_on_stop(&channel);
        let (shared, main) = (Arc::clone(shared), self.main.clone());
        self.crew.spawn("mig-resume", Phase::Accept, move || {
            let _candidate = candidate;
            match resumption.admit(&channel, &opening) {
                Ok(()) => main.modify_and_notify(|main| main.take_over(channel)),
                Err(error) => shared.refusals.note(&error.on(channel.peer())),
            }
            Ok(())
        })
    }

    /// Of a client that has authenticated itself nothing is known before main has: another client
    /// of the same CA could take the place of a channel of the source.
    fn join_or_wait(&self, channel: Channel) -> Result<(), JoinError> {
        if channel.client_certificate().is_none() || self.main.read(|main| main.came) {
            return self.join_authenticated(channel);
        }
        let mut early = lock(&self.early);
        if early.len() == MAX_EARLY {
            let detail = format!("more than {MAX_EARLY} channels, and no main channel yet");
            return Err(JoinError::Late(Error::misbehaved(Phase::Accept, detail).on(channel.peer())));
        }
        early.push(channel);
        Ok(())
    }

    /// A channel must have shown the certificate that main has: a source has one. A strange one
    /// never ends the migration.
    fn join_authenticated(&self, channel: Channel) -> Result<(), JoinError> {
        let peer = channel.peer().to_owned();
        let same = |main: &Main| !main.came || main.certificate.as_deref() == channel.client_certificate();
        if !self.main.read(same) {
            let detail = "a channel with another certificate than that of main: it is another source's";
            return Err(JoinError::Late(Error::misbehaved(Phase::Accept, detail).on(peer)));
        }
        self.join(channel).map_err(|error| match error {
            JoinError::Early(error) => JoinError::Early(error.on(peer)),
            JoinError::Late(error) => JoinError::Late(error.on(peer)),
        })
    }

    /// A connection that says that it is a channel. Until the first sync point it may be one of the
    /// source, which has pages for it: if it does not fit, the migration ends before a page is
    /// missed. Later, the source has all of its channels here.
    fn join(&self, channel: Channel) -> Result<(), JoinError> {
        let early = self.shared.channels.is_early();
        let unfit = |error| if early { JoinError::Early(error) } else { JoinError::Late(error) };
        let mut bytes = [0; InitialPacket::LEN];
        channel
            .recv_exact(&mut bytes)
            .map_err(|error| unfit(Error::io(Phase::Setup, "the initial packet", error)))?;
        let hello =
            InitialPacket::parse(&bytes).map_err(|invalid| unfit(Error::invalid(Phase::Setup, invalid)))?;
        self.shared.on_uuid(hello.uuid).map_err(unfit)?;
        self.shared.channels.join(hello.channel, channel.closer())?;
        ChannelWorker::start(channel, hello.channel, &self.shared, &self.crew).map_err(JoinError::Early)
    }
}
