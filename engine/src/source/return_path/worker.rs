//! The thread that reads the return path.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use multifd_transports::Channel;
use multifd_wire::{MigrationId, ReturnMessage};

use super::event::{ReturnEvent, ReturnEvents};
use super::last_words::Listening;
use super::{LOADED_PING, Received, Requests, received_pages};
use crate::error::{Error, ErrorKind, Phase, Result};
use crate::run::counters::Counters;
use crate::run::secret;
use crate::run::state::MigrationState;
use crate::run::stop::{Monitor, StopSwitch};
use crate::source::shared::SourceShared;
use crate::work::{BlockIndex, Requested, WantedPage};

/// The thread that reads.
pub(super) struct Worker {
    pub(super) channel: Arc<Channel>,
    pub(super) shared: Arc<SourceShared>,
    pub(super) stop: StopSwitch,
    pub(super) received: Monitor<Received>,
    pub(super) requests: Monitor<Requests>,
    /// Pages were asked for, and the threads that send them have not been told.
    pub(super) asked: bool,
    /// What was received and is no whole message yet.
    pub(super) unparsed: Vec<u8>,
    pub(super) listening: Listening,
}

impl Worker {
    /// Deals with one event after the other, until the last.
    pub(super) fn run(mut self) -> Result<()> {
        let mut events = ReturnEvents::default();
        loop {
            let message = self.next_message()?;
            self.received.modify_silently(|received| received.heard += 1);
            let event = events.event(message, &self.shared.ram, self.shared.urgent.get().is_some())?;
            tracing::debug!(?event, "return path");
            match event {
                ReturnEvent::Hello { features } => {
                    self.shared.peer_features.store(features, Ordering::Relaxed);
                }
                ReturnEvent::Id(id) => self.id(id)?,
                ReturnEvent::ResumeKey(key) => self.resume_key(key)?,
                ReturnEvent::Pong(value) => self.pong(value)?,
                ReturnEvent::Received { block } => self.bitmap(block)?,
                ReturnEvent::Resumed => {
                    self.received.modify_and_notify(|received| received.resumed = true);
                }
                ReturnEvent::Alive => self.received.modify_silently(|received| received.signs += 1),
                ReturnEvent::Failing(failure) => {
                    self.received.modify_silently(|received| received.failure = Some(failure));
                }
                ReturnEvent::Loaded(time) => {
                    self.received.modify_silently(|received| received.load = Some(time));
                }
                ReturnEvent::Unknown => {}
                ReturnEvent::RequestPages { block, pages } => self.request(block, pages)?,
                // Nothing here waits for it.
                ReturnEvent::SwitchoverAck => {}
                ReturnEvent::Shut(0) => return self.arrived(),
                ReturnEvent::Shut(status) => return Err(self.refused(status)),
            }
        }
    }

    fn next_message(&mut self) -> Result<ReturnMessage> {
        loop {
            let parsed = ReturnMessage::parse(&self.unparsed).map_err(|invalid| {
                if self.unparsed.starts_with(TLS_ALERT) {
                    return Error::unexpected_tls(Phase::Active, "destination");
                }
                Error::invalid(Phase::Active, invalid)
            })?;
            if let Some((message, used)) = parsed {
                self.unparsed.drain(..used);
                return Ok(message);
            }
            self.receive()?;
        }
    }

    /// Receives a piece, or returns without one to be called again: a destination sends only when
    /// it has something to report.
    fn receive(&mut self) -> Result<()> {
        // Once for all requests of a piece: they go together.
        if std::mem::take(&mut self.asked) {
            self.requests.modify_and_notify(|_| ());
        }
        let mut piece = [0; 1024];
        let phase = || self.phase();
        match self.channel.recv(&mut piece) {
            Ok(0) => {
                // Once the link has ended here, this end has closed it, and nothing is known of the
                // destination.
                let ended = !self.stop.tripped();
                self.received.modify_silently(|received| received.ended |= ended);
                let detail = match self.shared.session.state().is_postcopy() {
                    true => "the destination closed the return path without SHUT",
                    false => "the destination closed the return path without SHUT: the guest did not arrive",
                };
                Err(Error::new(ErrorKind::Transport, phase(), detail))
            }
            Ok(len) => {
                let piece = piece.get(..len);
                let piece = piece.ok_or_else(|| Error::bug(phase(), "more was received than asked for"))?;
                self.unparsed.extend_from_slice(piece);
                Ok(())
            }
            Err(error) if error.kind() == io::ErrorKind::TimedOut && !self.stop.tripped() => Ok(()),
            Err(error) => {
                let reset = error.raw_os_error() == Some(libc::ECONNRESET);
                self.received.modify_silently(|received| received.ended |= reset);
                Err(Error::io(phase(), "reading", error))
            }
        }
    }

    fn phase(&self) -> Phase {
        if self.shared.session.state().is_postcopy() {
            Phase::Postcopy
        } else {
            self.received.read(Received::phase)
        }
    }

    /// It is the same for as long as the migration lives.
    fn id(&self, id: MigrationId) -> Result<()> {
        if *self.shared.id.get_or_init(|| id) == id {
            return Ok(());
        }
        Err(Error::misbehaved(
            self.phase(),
            "another id of the migration than the destination has said before",
        ))
    }

    fn resume_key(&self, key: [u8; secret::LEN]) -> Result<()> {
        if *self.shared.resume_key.get_or_init(|| key) == key {
            self.received.modify_and_notify(|_| ());
            return Ok(());
        }
        Err(Error::misbehaved(self.phase(), "a second half of the secret of the migration"))
    }

    fn pong(&self, value: u32) -> Result<()> {
        let session = &self.shared.session;
        let loaded = value == LOADED_PING && session.state() == MigrationState::PostcopyDevice;
        if loaded {
            session.enter(MigrationState::PostcopyActive)?;
            self.listening.end();
        }
        self.received.modify_and_notify(|received| {
            received.on_pong(value);
            received.loaded = received.loaded.or_else(|| loaded.then(Instant::now));
        });
        Ok(())
    }

    /// The raw bytes behind RECV_BITMAP.
    fn bitmap(&mut self, block: BlockIndex) -> Result<()> {
        let name = self.shared.ram.blocks.at(block).block.name().clone();
        let asked_for = self.received.modify_silently(|received| received.asked_for.take());
        if asked_for != Some(block) {
            let asked_for = asked_for.map(|block| self.shared.ram.blocks.at(block).block.name());
            let asked_for = asked_for.map_or_else(|| "none".to_owned(), |name| format!("that of {name}"));
            let detail = format!("a bitmap of RAM block {name}, {asked_for} was asked for");
            return Err(Error::misbehaved(Phase::Postcopy, detail));
        }
        let expected = received_pages::len(self.shared.ram.blocks.at(block).block.pages());
        let whole = received_pages::HEAD + expected + received_pages::MARK;
        while self.unparsed.len() < whole {
            received_pages::check_head(&self.unparsed, expected, &name)?;
            self.receive()?;
        }
        received_pages::check_head(&self.unparsed, expected, &name)?;
        let bytes: Vec<u8> = self.unparsed.drain(..whole).collect();
        let bitmap = received_pages::content(bytes, &name)?;
        self.received.modify_and_notify(|received| received.bitmap = Some(bitmap));
        Ok(())
    }

    /// Pages before their turn.
    fn request(&mut self, block: BlockIndex, pages: Range<usize>) -> Result<()> {
        let urgent = self.shared.urgent.get();
        let urgent =
            urgent.ok_or_else(|| Error::bug(Phase::Active, "pages were asked for where none may be"))?;
        let counters = &self.shared.session.counters;
        Counters::add(&counters.requests, 1);
        Counters::add(&counters.pages_requested, pages.len());
        let outgoing = self.shared.ram.blocks.at(block);
        // A huge page has its neighbours with it.
        if let Some(neighbours) = self.shared.neighbours.get().filter(|_| outgoing.per_host == 1) {
            let dirty = self.shared.ram.dirty.at(block);
            pages.clone().for_each(|page| neighbours.note(block, page, dirty));
        }
        // A host page is asked for by its first page.
        for page in pages.step_by(outgoing.per_host) {
            match urgent.request(WantedPage { block, page }) {
                Requested::Queued | Requested::Repeated => {}
                Requested::Full => {
                    tracing::debug!(page, "the queue of wanted pages is full: they go in their turn");
                    break;
                }
                Requested::Unknown => {
                    return Err(Error::bug(Phase::Active, format_args!("page {page} is not in its block")));
                }
            }
        }
        self.asked = true;
        Ok(())
    }

    /// SHUT(0).
    fn arrived(&self) -> Result<()> {
        let arrived = self.received.modify_and_notify(|received| {
            received.arrived = received.may_arrive;
            received.arrived
        });
        let early = || Error::misbehaved(Phase::Active, "SHUT(0), success, before the guest was handed over");
        arrived.then_some(()).ok_or_else(early)
    }

    fn refused(&self, status: u32) -> Error {
        let refusal = self.received.modify_and_notify(|received| {
            received.refused = Some(status);
            received.refusal()
        });
        refusal.unwrap_or_else(|| Error::bug(Phase::Active, "a refusal that is none"))
    }
}

/// How an alert in the clear begins: type 21, version 3.x. No message begins so.
const TLS_ALERT: &[u8; 2] = &[21, 3];
