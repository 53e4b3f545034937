//! The return path, from the source's end.

mod event;

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use multifd_transports::Channel;
use multifd_wire::{Failure, RAM_PING, ReturnMessage, SETUP_PING};

use self::event::{ReturnEvent, ReturnEvents};
use super::shared::SourceShared;
use crate::error::{Error, ErrorKind, Phase, Result};
use crate::run::stop::{Monitor, StopSwitch};
use crate::run::workers::Crew;
use crate::stream::dialect;
use crate::work::{BlockIndex, Requested, WantedPage};

/// Reads the return path on a thread of its own until SHUT, the destination's last message.
pub(super) struct ReturnPathReader {
    received: Monitor<Received>,
    stop: StopSwitch,
    name: String,
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
    /// How far the destination has come, by its PONGs.
    reached: Reached,
    /// Why it fails, in its own words.
    failure: Option<Failure>,
    /// Signs of life while it has nothing else to say.
    signs: u64,
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
    pub(super) fn start(channel: Arc<Channel>, shared: Arc<SourceShared>, crew: &Crew) -> Result<Self> {
        let received = Monitor::new(Received::default(), crew.stop());
        let name = format!("return path ({})", channel.peer());
        let reader = Self { received: received.clone(), stop: crew.stop().clone(), name: name.clone() };
        let worker = Worker { channel, shared, received, unparsed: Vec::new() };
        crew.spawn("mig-return", Phase::Setup, move || worker.run().map_err(|error| error.on(name)))?;
        Ok(reader)
    }

    /// Waits for the answer to PING(`value`), or to a later one with a larger value: the destination has done all that came
    /// before it.
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

    /// Waits for SHUT(0). An error if something else ends the migration, or nothing comes within `timeout`, no sign of life either.
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
    received: Monitor<Received>,
    /// What was received and is no whole message yet.
    unparsed: Vec<u8>,
}

impl Worker {
    /// Deals with one event after the other, until the last.
    fn run(mut self) -> Result<()> {
        let mut events = ReturnEvents::default();
        loop {
            let message = self.next_message()?;
            let event = events.event(message, &self.shared.ram, self.shared.urgent.get().is_some())?;
            tracing::debug!(?event, "return path");
            match event {
                ReturnEvent::Hello { features } => {
                    self.shared.peer_features.store(features, Ordering::Relaxed);
                }
                ReturnEvent::Pong(value) => {
                    self.received.modify_and_notify(|received| received.on_pong(value));
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

    /// Receives a piece, or returns without one to be called again: a destination sends only when it has something to report.
    fn receive(&mut self) -> Result<()> {
        let mut piece = [0; 1024];
        let phase = || self.received.read(Received::phase);
        match self.channel.recv(&mut piece) {
            Ok(0) => {
                let detail = "the destination closed the return path without SHUT: the guest did not arrive";
                Err(Error::new(ErrorKind::Transport, phase(), detail))
            }
            Ok(len) => {
                let piece = piece.get(..len);
                let piece = piece.ok_or_else(|| Error::bug(phase(), "more was received than asked for"))?;
                self.unparsed.extend_from_slice(piece);
                Ok(())
            }
            Err(error) if error.kind() == io::ErrorKind::TimedOut && !self.shared.session.stop.tripped() => {
                Ok(())
            }
            Err(error) => Err(Error::io(phase(), "reading", error)),
        }
    }

    /// Pages before their turn.
    fn request(&self, block: BlockIndex, pages: Range<usize>) -> Result<()> {
        let urgent = self.shared.urgent.get();
        let urgent =
            urgent.ok_or_else(|| Error::bug(Phase::Active, "pages were asked for where none may be"))?;
        for page in pages {
            match urgent.request(WantedPage { block, page }) {
                Requested::Queued | Requested::Repeated => {}
                // It goes in its turn.
                Requested::Full => tracing::debug!(page, "the queue of wanted pages is full"),
                Requested::Unknown => {
                    return Err(Error::bug(Phase::Active, format_args!("page {page} is not in its block")));
                }
            }
        }
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
mod tests {
    use super::*;
    use crate::source::shared::tests::{ram, shared};
    use crate::work::{Place, UrgentPages};

    /// A return path of a source with one block `a` of 8 pages; and the destination's end.
    fn return_path(crew: &Crew, shared: &Arc<SourceShared>) -> (ReturnPathReader, Channel) {
        let (ours, theirs) = Channel::pair().unwrap();
        (ReturnPathReader::start(Arc::new(ours), Arc::clone(shared), crew).unwrap(), theirs)
    }

    fn say(destination: &Channel, messages: &[ReturnMessage]) {
        let mut bytes = Vec::new();
        messages.iter().for_each(|message| message.encode(&mut bytes));
        destination.send_all(&bytes).unwrap();
    }

    fn request(offset: u64, len: u32) -> ReturnMessage {
        ReturnMessage::RequestPages { block: Some("a".try_into().unwrap()), offset, len }
    }

    #[test]
    fn pages_that_the_destination_asks_for_are_the_next_that_a_worker_claims() {
        let shared = shared(ram(&[("a", 8)]));
        shared.urgent.set(UrgentPages::new(8, &shared.ram.dirty)).unwrap();
        let crew = Crew::new(shared.session.stop.clone());
        let (reader, destination) = return_path(&crew, &shared);
        say(&destination, &[request(5 * 4096, 8192), request(3 * 4096, 4096), ReturnMessage::Pong(7)]);
        reader.wait_for_pong(7, Duration::from_secs(60)).unwrap();
        let round = shared.ram.round(1);
        let mut place = Place::default();
        let next = shared.next(&round);
        assert_eq!(next.claim(&mut place, 2).unwrap().pages, [5, 6]);
        assert_eq!(next.claim(&mut place, 2).unwrap().pages, [3]);
        assert_eq!(next.claim(&mut place, 8).unwrap().pages, [0, 1, 2, 4, 7]);
        reader.expect_shut();
        say(&destination, &[ReturnMessage::Shut(0)]);
        reader.wait_for_shut(Duration::from_secs(60)).unwrap();
        crew.join();
    }

    #[test]
    fn a_request_for_pages_ends_a_migration_that_has_no_queue_for_them() {
        let shared = shared(ram(&[("a", 8)]));
        let crew = Crew::new(shared.session.stop.clone());
        let (_reader, destination) = return_path(&crew, &shared);
        say(&destination, &[request(0, 4096)]);
        crew.join();
        let error = shared.session.stop.cause_or(Error::stopped(Phase::Active));
        assert_eq!(error.kind(), ErrorKind::Incompatible);
        assert!(error.to_string().contains("RequestPages"), "{error}");
    }
}
