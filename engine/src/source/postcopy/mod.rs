//! Post-copy at the source: the guest runs at the destination, and its RAM follows.
//!
//! ```text
//!  Precopy ─ switch_to_postcopy ─> Postcopy ── serve ──> Completed
//!    switch: last dirty bits, discards,          ^   └──> Paused ─┐ the link broke
//!    devices, RUN (the hand-over)                └──── recover ───┘ nothing is lost
//! ```
//!
//! What goes over one connection is a [`Link`](link::Link): its threads and its stop switch end
//! with it, the rest stays.

mod batch;
mod bulk;
mod link;
mod neighbours;
mod recover;
mod sender;
mod short_queue;
mod switch;
mod urgent;
mod wanted;

use std::sync::Arc;
use std::time::{Duration, Instant};

use multifd_transports::Channel;
use multifd_wire::Configuration;

pub(super) use self::bulk::Bulk;
use self::link::Link;
pub(super) use self::neighbours::Neighbours;
pub(super) use self::switch::UrgentChannels;
use self::wanted::{Scan, Wanted};
use super::carrier::{Carrier, Channels};
use super::control::Control;
use super::dialer::Dialer;
use super::migration::{Migration, micros};
use super::return_path::ReturnPathReader;
use super::shared::SourceShared;
use crate::convergence::{DowntimeLedger, RoundRecord};
use crate::error::{Error, ErrorKind, Phase, Result};
use crate::report::{PostcopyReport, Report};
use crate::run::session::{HandOver, ProgressReader, Session};
use crate::run::state::MigrationState;
use crate::stream::dialect::{FEATURE_NEIGHBOURS, FEATURE_URGENT_CHANNELS};

/// What a source was told about a post-copy that may come.
#[derive(Clone, Copy, Debug)]
pub(super) struct PostcopySettings {
    /// Pages that are asked for have a connection of their own.
    pub(super) preempt: bool,
    pub(super) preempt_style: PreemptStyle,
    /// How many connections, to a destination that takes several.
    pub(super) urgent_channels: usize,
}

impl PostcopySettings {
    /// How many channels there are for pages that are asked for. `parallel`: the background stream
    /// has channels of its own, so that the destination can be reached by more than one connection.
    fn urgent(&self, shared: &SourceShared, parallel: bool) -> usize {
        match (self.preempt, shared.peer_can(FEATURE_URGENT_CHANNELS)) {
            (true, true) => self.urgent_channels.max(1),
            (true, false) => 1,
            (false, true) if parallel => self.urgent_channels,
            (false, _) => 0,
        }
    }
}

/// When the channel for pages that are asked for is connected, and how it ends; the destination's
/// machine type decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PreemptStyle {
    /// At the switch, and closed after SHUT: machine types from 8.0 on.
    AtSwitch,
    /// With main, and ended by a record: machine types up to 7.2.
    AtSetup,
}

impl PreemptStyle {
    pub(super) fn for_machine(configuration: &Configuration) -> Self {
        match configuration.machine_version() {
            Some(version) if version <= (7, 2) => Self::AtSetup,
            _ => Self::AtSwitch,
        }
    }
}

/// How long main may take to show that the destination has ended, when another connection has shown
/// that already.
const WORD_OF_MAIN: Duration = Duration::from_secs(2);

/// A connection beside main has broken. That ends the link; but as long as the devices have not
/// been loaded, a destination that has ended gives the guest back, and only main tells that.
fn wait_for_main(session: &Session, return_path: &ReturnPathReader) {
    if session.state() == MigrationState::PostcopyDevice {
        return_path.rest(WORD_OF_MAIN);
    }
}

/// Watches a connection on which only this end sends. Returns when nothing waits for its pages any
/// more.
///
/// # Errors
/// It has broken, and pages that were on their way may be lost without the destination knowing of
/// it.
fn watch(channel: &Channel, name: &str, return_path: &ReturnPathReader) -> Result<()> {
    loop {
        let error = match channel.recv(&mut [0]) {
            Err(error) if error.kind() == std::io::ErrorKind::TimedOut && !return_path.has_stopped() => {
                continue;
            }
            Ok(0) => {
                let detail = "the destination closed it before the end";
                Error::new(ErrorKind::Transport, Phase::Postcopy, detail)
            }
            Ok(_) => Error::misbehaved(Phase::Postcopy, "bytes came back, expected none"),
            Err(error) => Error::io(Phase::Postcopy, "waiting for its end", error),
        };
        // At the end, the destination closes it as it likes; that it is the end, it says on main,
        // or that it is not done yet. One that does not know of the pages that were lost here says
        // neither.
        return if return_path.is_over_within(WORD_OF_MAIN) { Ok(()) } else { Err(error.on(name)) };
    }
}

/// A guest that runs at its destination, or is about to, and needs the RAM that is here.
///
/// The source's memory may only be freed or written when [`Postcopy::serve`] has completed. Dropped
/// before that, the link is cut, and the guest stops at the next page that it lacks.
#[must_use = "the guest at the destination waits for its RAM"]
pub struct Postcopy {
    shared: Arc<SourceShared>,
    control: Control,
    carrier: Carrier,
    dialer: Dialer,
    settings: PostcopySettings,
    /// `None`: paused, or over.
    link: Option<Link>,
    /// Where the background stream goes on.
    scan: Arc<Scan>,
    /// Parallel channels that carry it; 0: main does.
    channels: usize,
    setup: Duration,
    decisions: Vec<RoundRecord>,
    ledger: DowntimeLedger,
    handed_over: Instant,
    /// When the destination had loaded the devices.
    running: Option<Instant>,
    recoveries: u64,
}

/// Why [`Postcopy::serve`] came back.
#[derive(Debug)]
pub enum Served {
    /// All of RAM is at the destination, which has said so. What is here may be freed.
    Completed(Box<Report>),
    /// The link is broken, for this reason. The guest runs on at the destination up to the next
    /// page that it lacks; nothing is lost if [`Postcopy::recover`] follows.
    Paused(Error),
}

impl Postcopy {
    /// Serves until all of RAM is at the destination, or the link breaks: pages that the guest
    /// waits for first, all others in the background, each once.
    ///
    /// # Errors
    /// The destination gave the guest up. [`Error::source_may_resume`] is true if that was before
    /// it had loaded the devices: then the guest may run on here. Else it is lost. `ApiMisuse` if
    /// there is nothing to serve.
    pub fn serve(&mut self) -> Result<Served> {
        let Some(link) = &mut self.link else {
            let detail = format!("the migration is {}: there is no link to serve", self.control.state());
            return Err(Error::new(ErrorKind::ApiMisuse, Phase::Postcopy, detail));
        };
        match link.serve() {
            Ok(()) => self.complete().map(|report| Served::Completed(Box::new(report))),
            Err(error) => self.broken(error),
        }
    }

    /// Steers the migration from other threads.
    pub fn control(&self) -> Control {
        self.control.clone()
    }

    /// Tells how far it has come, from any thread.
    pub fn progress(&self) -> ProgressReader {
        ProgressReader::new(&self.shared.session)
    }

    /// Pages that have not been sent.
    pub fn pages_left(&self) -> usize {
        self.shared.ram.host_pages.left()
    }

    /// After the package with RUN.
    fn new(migration: Migration, parts: switch::Switched, decisions: Vec<RoundRecord>) -> Result<Self> {
        let switch::Switched { settings, place, urgent, keeps_channels, ledger, handed_over } = parts;
        let Migration { main, carrier, shared, control, crew, return_path, dialer, setup, .. } = migration;
        let return_path =
            return_path.ok_or_else(|| Error::bug(Phase::Postcopy, "a post-copy without a return path"))?;
        control.set_link(crew.stop());
        let (channels, carrier) = match carrier {
            Carrier::Channels(channels) if keeps_channels => (Some(channels), Carrier::Main),
            carrier => (None, carrier),
        };
        let mut this = Self {
            shared,
            control,
            carrier,
            dialer,
            settings,
            link: None,
            scan: Scan::new(place),
            channels: channels.as_ref().map_or(0, Channels::workers),
            setup,
            decisions,
            ledger,
            handed_over,
            running: None,
            recoveries: 0,
        };
        let wanted = this.wanted(!urgent.is_empty(), this.dialer.endpoint.is_some());
        let mut link = Link::new(main, return_path, crew, wanted, channels);
        this.start_urgent(&mut link, urgent)?;
        this.link = Some(link);
        Ok(this)
    }

    /// What goes before its turn over a link. `urgent`: it has channels for that. `dialled`: its
    /// sockets are not the caller's.
    fn wanted(&self, urgent: bool, dialled: bool) -> Wanted {
        let again = self.shared.peer_can(FEATURE_NEIGHBOURS) && (urgent || self.channels > 0);
        let short_queues = dialled && self.dialer.socket.send_buffer.is_none();
        let wanted = Wanted::new(&self.shared, &self.scan, self.control.postcopy_pacer(), again);
        wanted.with_short_queues(short_queues)
    }

    /// Gives a link its channels for pages that are asked for.
    fn start_urgent(&self, link: &mut Link, channels: Vec<Arc<Channel>>) -> Result<()> {
        let style = self.settings.preempt_style;
        channels.into_iter().try_for_each(|channel| link.start_urgent(channel, style))
    }

    fn complete(&mut self) -> Result<Report> {
        let link = self.link.take();
        let link = link.ok_or_else(|| Error::bug(Phase::Postcopy, "completed without a link"))?;
        let session = &self.shared.session;
        session.complete();
        session.set_hand_over(HandOver::Done);
        self.running = self.running.or_else(|| link.loaded());
        self.carrier.dismiss_workers();
        link.close();
        let mut report = Report::of(session, session.elapsed(), self.shared.codec.describe());
        session.close_channels();
        let waited = self.running.map(|running| running.saturating_duration_since(self.handed_over));
        self.ledger.acknowledgement_us = micros(waited.unwrap_or_default());
        report.setup = self.setup;
        report.downtime = self.ledger.total();
        report.ledger = self.ledger;
        report.decisions = std::mem::take(&mut self.decisions);
        report.xbzrle = self.shared.cache.as_ref().map(|cache| cache.stats());
        report.zero_copy = self.shared.zero_copy_stats(&report.progress);
        report.postcopy = Some(PostcopyReport {
            requests: report.progress.requests,
            pages_requested: report.progress.pages_requested,
            neighbours_pushed: report.progress.neighbours_pushed,
            pages_repeated: report.progress.pages_repeated,
            recoveries: self.recoveries,
            faults: None,
            run_after: self.running.map(|running| session.elapsed().saturating_sub(running.elapsed())),
        });
        Ok(report)
    }

    /// The link has ended because of `error`: what that means for the guest.
    fn broken(&mut self, error: Error) -> Result<Served> {
        let link = self.link.take();
        let link = link.ok_or_else(|| Error::bug(Phase::Postcopy, "broken without a link"))?;
        let end = link.end(error);
        self.running = self.running.or(end.loaded);
        let session = &self.shared.session;
        session.retire_closed_channels();
        if self.running.is_none() && self.recoveries == 0 && end.by_peer {
            // The destination answers LOADED_PING before it starts the guest, and has not.
            session.enter(MigrationState::Failed)?;
            session.set_hand_over(HandOver::Before);
            return Err(end.cause.noting("its devices were not loaded: the guest may run on at the source"));
        }
        if end.refused {
            session.enter(MigrationState::Failed)?;
            let lost = "the guest is lost there; its RAM as it was at the switch is still at the source";
            return Err(end.cause.noting(lost).after_hand_over());
        }
        session.enter(MigrationState::PostcopyPaused)?;
        let lacks = format!(
            "the guest at the destination lacks {} pages or more, which are still at the source; if the destination has \
             ended, the guest is gone",
            self.pages_left()
        );
        let cause = end.cause.noting(lacks).after_hand_over();
        tracing::debug!(cause = %cause.chain(), "post-copy is paused");
        Ok(Served::Paused(cause))
    }
}
