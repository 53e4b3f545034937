//! The return path, from the source's end.

mod event;
mod last_words;
pub(super) mod received_pages;
mod worker;

use std::sync::Arc;
use std::time::{Duration, Instant};

use multifd_transports::Channel;
use multifd_wire::{Failure, RAM_PING, SETUP_PING};

pub(super) use self::last_words::LastWords;
use self::worker::Worker;
use super::shared::SourceShared;
use crate::error::{Error, ErrorKind, Phase, Result};
use crate::run::stop::{Monitor, StopSwitch};
use crate::run::workers::Crew;
use crate::stream::dialect;
use crate::work::BlockIndex;

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

#[cfg(test)]
mod tests;
