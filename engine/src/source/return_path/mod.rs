//! The return path, from the source's end.

mod event;
mod last_words;
pub(super) mod received_pages;

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use multifd_transports::Channel;
use multifd_wire::{Failure, MigrationId, RAM_PING, ReturnMessage, SETUP_PING};

use self::event::{ReturnEvent, ReturnEvents};
pub(super) use self::last_words::LastWords;
use self::last_words::Listening;
use super::shared::SourceShared;
use crate::error::{Error, ErrorKind, Phase, Result};
use crate::run::counters::Counters;
use crate::run::secret;
use crate::run::state::MigrationState;
use crate::run::stop::{Monitor, StopSwitch};
use crate::run::workers::Crew;
use crate::stream::dialect;
use crate::work::{BlockIndex, Requested, WantedPage};

/// Reads the return path on a thread of its own until SHUT, the destination's last message. Clones
/// are of the same.
#[derive(Clone)]
pub(super) struct ReturnPathReader {
    received: Monitor<Received>,
    /// Apart from that: a request wakes the threads that send what is asked for, and no other.
    requests: Monitor<Requests>,
    stop: StopSwitch,
    name: String,
}

/// Pages are asked for; which, [`UrgentPages`](crate::work::UrgentPages) knows.
#[derive(Default)]
struct Requests {
    /// Nothing is sent any more.
    closing: bool,
}

/// What has come over the return path.
#[derive(Default)]
struct Received {
    /// SHUT(0).
    arrived: bool,
    /// SHUT(0) may come: the guest is being handed over.
    may_arrive: bool,
    /// The status of another SHUT.
    refused: Option<u32>,
    /// The largest value of a PONG.
    pong: u32,
    /// When [`LOADED_PING`] was answered.
    loaded: Option<Instant>,
    /// The destination has ended the connection.
    ended: bool,
    /// The block whose bitmap was asked for, and then the bitmap.
    asked_for: Option<BlockIndex>,
    bitmap: Option<Vec<u8>>,
    /// RESUME was acknowledged.
    resumed: bool,
    /// Nothing is sent any more.
    closing: bool,
    /// How far the destination has come, by its PONGs.
    reached: Reached,
    /// Why it fails, in its own words.
    failure: Option<Failure>,
    /// Signs of life while it has nothing else to say.
    signs: u64,
    /// Messages of any kind.
    heard: u64,
    /// How long it took to load the device state.
    load: Option<Duration>,
}

/// How far the destination has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Reached {
    #[default]
    Nothing,
    /// It has the list of RAM blocks.
    Blocks,
    /// It has all of RAM.
    Ram,
}

/// Value of the PING between the device state of a post-copy and the command that starts the guest:
/// its PONG says that the devices are loaded.
pub(super) const LOADED_PING: u32 = 0x42;

impl Received {
    /// Where the migration is, as far as the return path knows.
    fn phase(&self) -> Phase {
        if self.may_arrive { Phase::Commit } else { Phase::Active }
    }

    fn on_pong(&mut self, value: u32) {
        self.pong = self.pong.max(value);
        match value {
            SETUP_PING => self.reached = Reached::Blocks,
            RAM_PING => self.reached = Reached::Ram,
            _ => {}
        }
    }

    /// Where the destination is: it works off what comes in order.
    fn phase_there(&self) -> Phase {
        match self.reached {
            Reached::Nothing => Phase::Setup,
            Reached::Blocks => Phase::Active,
            Reached::Ram => Phase::Device,
        }
    }

    /// The destination's refusal, if one has come.
    fn refusal(&self) -> Option<Error> {
        let status = self.refused?;
        let (phase, detail) = match &self.failure {
            Some(failure) => {
                let phase = dialect::phase_of(failure).unwrap_or_else(|| self.phase_there());
                (phase, format!("the destination failed: {}", printable(&failure.reason)))
            }
            None => {
                let detail =
                    format!("the destination failed and reported status {status}; why, it says there");
                (self.phase_there(), detail)
            }
        };
        Some(Error::new(ErrorKind::PeerAborted(status), phase, detail))
    }
}

/// What a peer says, without anything that a terminal takes for a command.
fn printable(text: &str) -> String {
    text.chars().map(|char| if char.is_control() { ' ' } else { char }).collect()
}

impl ReturnPathReader {
    /// What the destination says changes `shared`: its features, the pages that it wants.
    pub(super) fn start(
        channel: Arc<Channel>,
        shared: Arc<SourceShared>,
        crew: &Crew,
        last_words: &LastWords,
    ) -> Result<Self> {
        let received = Monitor::new(Received::default(), crew.stop());
        let requests = Monitor::new(Requests::default(), crew.stop());
        let (name, stop) = (format!("return path ({})", channel.peer()), crew.stop().clone());
        let reader = Self {
            received: received.clone(),
            requests: requests.clone(),
            stop: stop.clone(),
            name: name.clone(),
        };
        let (unparsed, listening) = (Vec::new(), last_words.listen());
        let worker = Worker { channel, shared, stop, received, requests, asked: false, unparsed, listening };
        crew.spawn("mig-return", Phase::Setup, move || worker.run().map_err(|error| error.on(name)))?;
        Ok(reader)
    }

    /// Waits for the answer to PING(`value`), or to a later one with a larger value: the
    /// destination has done all that came before it.
    pub(super) fn wait_for_pong(&self, value: u32, timeout: Duration) -> Result<()> {
        self.wait_while_alive(timeout, |received| (received.pong >= value).then_some(())).ok_or_else(|| {
            let detail = format!("no PONG({value:#x}) within {timeout:?}");
            Error::new(ErrorKind::Deadline, Phase::Active, detail).on(self.name.clone())
        })
    }

    /// From here on the destination may say that it has the guest.
    pub(super) fn expect_shut(&self) {
        self.received.modify_silently(|received| received.may_arrive = true);
    }

    /// The destination's refusal, if one has come.
    pub(super) fn refusal(&self) -> Option<Error> {
        self.received.read(Received::refusal).map(|refusal| refusal.on(self.name.clone()))
    }

    /// When the devices of a post-copy had been loaded, if they have.
    pub(super) fn loaded(&self) -> Option<Instant> {
        self.received.read(|received| received.loaded)
    }

    /// True if the destination has ended the connection.
    pub(super) fn ended(&self) -> bool {
        self.received.read(|received| received.ended)
    }

    /// Waits for `ready`, which [`ReturnPathReader::notify`] can make true, for `limit` at most.
    /// False: it is not, or the link has ended.
    pub(super) fn wait_until(&self, limit: Duration, ready: impl Fn() -> bool) -> bool {
        self.received.wait(&self.stop, Some(limit), |_| ready().then_some(())).is_some()
    }

    /// The same for what requests can make true as well.
    pub(super) fn wait_for_request(&self, limit: Duration, ready: impl Fn() -> bool) -> bool {
        self.requests.wait(&self.stop, Some(limit), |_| ready().then_some(())).is_some()
    }

    /// Waits until the devices of a post-copy have been loaded, for `limit` at most. Gives whether
    /// they have, and how many messages of any kind have come.
    pub(super) fn wait_until_loaded(&self, limit: Duration) -> (bool, u64) {
        self.received.wait(&self.stop, Some(limit), |received| received.loaded.map(drop));
        self.received.read(|received| (received.loaded.is_some(), received.heard))
    }

    /// Waits for `limit`, or until the link has ended.
    pub(super) fn rest(&self, limit: Duration) {
        self.received.wait(&self.stop, Some(limit), |_| None::<()>);
    }

    /// Waits for the destination's word that all has arrived, for `limit` at most from the last
    /// sign of life on. True also when nothing waits for it any more.
    pub(super) fn is_over_within(&self, limit: Duration) -> bool {
        let over = |received: &mut Received| (received.arrived || received.closing).then_some(());
        self.wait_while_alive(limit, over).is_some()
    }

    /// Has every [`ReturnPathReader::wait_until`] and [`ReturnPathReader::wait_for_request`] look
    /// again.
    pub(super) fn notify(&self) {
        self.received.modify_and_notify(|_| ());
        self.requests.modify_and_notify(|_| ());
    }

    /// The link has ended.
    pub(super) fn has_stopped(&self) -> bool {
        self.stop.tripped()
    }

    /// Waits until pages are `wanted`. False: none will be any more.
    pub(super) fn next_request(&self, wanted: impl Fn() -> bool) -> bool {
        let next = self.requests.wait(&self.stop, None, |requests| {
            if requests.closing { Some(false) } else { wanted().then_some(true) }
        });
        next.unwrap_or(false)
    }

    /// True when SHUT may come.
    pub(super) fn is_ending(&self) -> bool {
        self.received.read(|received| received.may_arrive)
    }

    /// Ends every [`ReturnPathReader::next_request`].
    pub(super) fn close(&self) {
        self.received.modify_and_notify(|received| received.closing = true);
        self.requests.modify_and_notify(|requests| requests.closing = true);
    }

    /// Says whose bitmap is asked for next. The command may only go afterwards.
    pub(super) fn expect_bitmap(&self, block: BlockIndex) {
        self.received.modify_silently(|received| received.asked_for = Some(block));
    }

    /// Waits for the bitmap that was asked for.
    pub(super) fn wait_for_bitmap(&self, timeout: Duration) -> Result<Vec<u8>> {
        self.received.wait(&self.stop, Some(timeout), |received| received.bitmap.take()).ok_or_else(|| {
            let detail = format!("no bitmap of the pages that have arrived within {timeout:?}");
            Error::new(ErrorKind::Deadline, Phase::Postcopy, detail).on(self.name.clone())
        })
    }

    /// Waits until the destination says that it goes on.
    pub(super) fn wait_for_resumed(&self, timeout: Duration) -> Result<()> {
        self.received.wait(&self.stop, Some(timeout), |received| received.resumed.then_some(())).ok_or_else(
            || {
                let detail = format!("the destination did not go on within {timeout:?}");
                Error::new(ErrorKind::Deadline, Phase::Postcopy, detail).on(self.name.clone())
            },
        )
    }

    /// How long the destination took to load the device state, if it has said so.
    pub(super) fn load_time(&self) -> Option<Duration> {
        self.received.read(|received| received.load)
    }

    /// Waits for as long as the destination says, within each `timeout`, that it is alive.
    fn wait_while_alive<R>(
        &self,
        timeout: Duration,
        mut ready: impl FnMut(&mut Received) -> Option<R>,
    ) -> Option<R> {
        let mut signs = self.received.read(|received| received.signs);
        loop {
            if let Some(value) = self.received.wait(&self.stop, Some(timeout), &mut ready) {
                return Some(value);
            }
            let now = self.received.read(|received| received.signs);
            if self.stop.tripped() || now == signs {
                return None;
            }
            signs = now;
        }
    }

    /// Waits for SHUT(0). An error if something else ends the migration, or nothing comes within
    /// `timeout`, no sign of life either.
    pub(super) fn wait_for_shut(&self, timeout: Duration) -> Result<()> {
        self.wait_while_alive(timeout, |received| received.arrived.then_some(())).ok_or_else(|| {
            let detail =
                format!("the destination did not confirm within {timeout:?}; it may run the guest or not");
            Error::new(ErrorKind::Deadline, Phase::Commit, detail).on(self.name.clone())
        })
    }
}

/// The thread that reads.
struct Worker {
    channel: Arc<Channel>,
    shared: Arc<SourceShared>,
    stop: StopSwitch,
    received: Monitor<Received>,
    requests: Monitor<Requests>,
    /// Pages were asked for, and the threads that send them have not been told.
    asked: bool,
    /// What was received and is no whole message yet.
    unparsed: Vec<u8>,
    listening: Listening,
}

impl Worker {
    /// Deals with one event after the other, until the last.
    fn run(mut self) -> Result<()> {
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

#[cfg(test)]
mod tests;
