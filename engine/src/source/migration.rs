//! The parts of a connected source, and the sections they write together.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use multifd_transports::PeerVanished;
use multifd_wire::{Advise, Command, Configuration, HELLO_PING, RAM_PING, ROUND_PING, SETUP_PING, Wishes};

use super::alive::{Busy, KeepAlive};
use super::audit::AuditReport;
use super::carrier::Carrier;
use super::control::Control;
use super::device_state::DeviceState;
use super::dialer::Dialer;
use super::main_writer::MainWriter;
use super::postcopy::{PostcopySettings, PreemptStyle, UrgentChannels};
use super::resume::Resumption;
use super::return_path::ReturnPathReader;
use super::rounds::RoundContext;
use super::shared::SourceShared;
use crate::convergence::DowntimeLedger;
use crate::dirty::LogSet;
use crate::error::{Error, ErrorKind, Phase, Remedy, Result};
use crate::guest::PAGE;
use crate::report::{DigestVerdict, Report};
use crate::run::counters::Counters;
use crate::run::session::{HandOver, NoteEnd};
use crate::run::state::MigrationState;
use crate::run::workers::Crew;
use crate::stream::dialect;
use crate::stream::sections::EarlySections;
use crate::work::Round;

/// The PING at the end of a round: its number, and [`ROUND_PING`].
pub(super) fn ping_of_round(round: u64) -> u32 {
    ROUND_PING | u32::try_from(round).unwrap_or(u32::MAX)
}

/// One item of the RAM section. Each carries a sync point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Section {
    Start,
    Part,
    End,
}

pub(super) struct Migration {
    pub(super) main: MainWriter,
    pub(super) carrier: Carrier,
    pub(super) shared: Arc<SourceShared>,
    pub(super) control: Control,
    pub(super) crew: Crew,
    pub(super) return_path: Option<ReturnPathReader>,
    pub(super) alive: KeepAlive,
    /// Device sections that go before the end of RAM.
    pub(super) early: EarlySections,
    /// Makes further connections.
    pub(super) dialer: Dialer,
    /// A post-copy may follow.
    pub(super) postcopy: Option<PostcopySettings>,
    /// Connected before the switch to post-copy.
    pub(super) urgent_channels: UrgentChannels,
    /// Send SWITCHOVER_START.
    pub(super) switchover_start: bool,
    pub(super) pause_before_switchover: bool,
    pub(super) logs: LogSet,
    pub(super) setup: Duration,
    /// Rounds begun.
    pub(super) rounds: u64,
    /// What the audit found, if one was asked for.
    pub(super) audit: Option<AuditReport>,
    /// What the destination is to check.
    pub(super) wishes: Wishes,
    /// By which a link that breaks is replaced.
    pub(super) resumption: Option<Resumption>,
    /// The last field: what is dropped before it ends the threads.
    pub(super) _note_end: NoteEnd,
}

impl Migration {
    /// Header, configuration, return path, the list of blocks and the first sync point.
    pub(super) fn set_up(&mut self, configuration: &Configuration) -> Result<()> {
        self.begin_stream(configuration)?;
        self.enter(MigrationState::Active)?;
        self.setup = self.shared.session.elapsed();
        Ok(())
    }

    /// The stream as far as its list of blocks: the same over each link.
    pub(super) fn begin_stream(&mut self, configuration: &Configuration) -> Result<()> {
        let at_setup = |settings: &PostcopySettings| settings.preempt_style == PreemptStyle::AtSetup;
        if self.postcopy.as_ref().is_some_and(|settings| settings.preempt && at_setup(settings)) {
            // It is one of QEMU's: what the destination is, is not known yet.
            self.open_urgent_channels(1)?;
        }
        self.main.header(configuration);
        if self.return_path.is_some() {
            self.main.command(Command::OpenReturnPath)?;
            self.main.ping(HELLO_PING)?;
            if self.wishes != Wishes::default() {
                self.main.ping(self.wishes.ping())?;
            }
        }
        if self.postcopy.is_some() {
            let page_sizes = self.shared.ram.host_page_sizes();
            let advise = Advise { page_sizes, target_page: PAGE as u64 };
            self.main.command(Command::PostcopyAdvise(Some(advise)))?;
        }
        self.main.raw(&self.early.before_ram)?;
        self.section(Section::Start)?;
        self.main.raw(&self.early.within_ram)?;
        self.ask_how_far(SETUP_PING)
    }

    /// Waits until it is known what the destination can do, if that makes a difference to the first
    /// page.
    pub(super) fn agree(&mut self) -> Result<()> {
        let codec = &*self.shared.codec;
        let Some(return_path) = &self.return_path else { return dialect::check_peer(codec, 0) };
        let nothing = self.wishes == Wishes::default() && self.resumption.is_none();
        if nothing || self.shared.agreed.get().is_some() {
            return Ok(());
        }
        // With this PONG, a HELLO has come, or never will.
        return_path.wait_for_pong(HELLO_PING, self.shared.session.timeout)?;
        let features = self.shared.peer_features.load(Ordering::Relaxed);
        dialect::check_peer(codec, features)?;
        let agreed = dialect::granted(self.wishes, features);
        if agreed.digest {
            self.shared.ram.keep_digests();
        }
        let again = |_| Error::bug(Phase::Active, "what the destination checks was agreed on twice");
        self.shared.agreed.set(agreed).map_err(again)?;
        self.offer_resumption()
    }

    /// All pages have gone: what they have to be at the destination.
    fn send_digests(&mut self) -> Result<()> {
        if !self.shared.agreed().digest {
            return Ok(());
        }
        for outgoing in self.shared.ram.blocks.iter() {
            let block = outgoing.block.name().clone();
            let none = || Error::bug(Phase::Active, format_args!("no digest was kept of RAM block {block}"));
            let digest = outgoing.digests().ok_or_else(none)?.of_all();
            self.main.queue(Command::Digest { block, digest })?;
        }
        self.main.flush()
    }

    /// Has the destination say when it has come to here: if it fails, it is known where.
    fn ask_how_far(&mut self, ping: u32) -> Result<()> {
        if self.return_path.is_some() { self.main.ping(ping) } else { Ok(()) }
    }

    /// The guest is paused: the last dirty bits, the last pages.
    pub(super) fn finish_ram(&mut self, ledger: &mut DowntimeLedger, busy: &Busy) -> Result<()> {
        self.begin_switch_over(ledger, busy)?;
        self.send_last_ram(ledger, busy)
    }

    /// The same over a new link, when the last one has broken behind the last dirty bits.
    pub(super) fn finish_ram_again(&mut self, ledger: &mut DowntimeLedger) -> Result<()> {
        loop {
            let busy = self.alive.busy();
            self.main.enter(Phase::Device);
            let sent = self.announce_switch_over().and_then(|()| self.send_last_ram(ledger, &busy));
            if self.or_resumed(sent)?.is_some() {
                return Ok(());
            }
        }
    }

    fn send_last_ram(&mut self, ledger: &mut DowntimeLedger, busy: &Busy) -> Result<()> {
        let begun = Instant::now();
        self.shared.ram.begin_last_pass();
        self.section(Section::End)?;
        self.send_digests()?;
        self.ask_how_far(RAM_PING)?;
        self.shared.ram.check_holes()?;
        ledger.last_ram_us += micros(begun.elapsed());
        self.audit = busy.rest(|| self.shared.ram.audit(&self.shared, &self.crew))?;
        Ok(())
    }

    /// The guest is paused: the last dirty bits, and the announcement.
    pub(super) fn begin_switch_over(&mut self, ledger: &mut DowntimeLedger, busy: &Busy) -> Result<()> {
        let begun = Instant::now();
        self.logs.last_sync(Phase::Active, &self.shared.ram.dirty)?;
        self.shared.ram.take_changes()?;
        ledger.bitmap_sync_us = micros(begun.elapsed());
        if self.pause_before_switchover {
            self.enter(MigrationState::PreSwitchover)?;
            let begun = Instant::now();
            busy.rest(|| self.control.wait_for_go_ahead())?;
            ledger.hold_us = micros(begun.elapsed());
        }
        self.control.begin_switchover();
        self.alive.end_of_ram();
        self.enter(MigrationState::Device)?;
        self.announce_switch_over()
    }

    fn announce_switch_over(&mut self) -> Result<()> {
        if self.switchover_start { self.main.command(Command::SwitchoverStart) } else { Ok(()) }
    }

    /// One item of the RAM section: the pages that are dirty, then a sync point.
    pub(super) fn section(&mut self, section: Section) -> Result<()> {
        if section != Section::Start {
            self.agree()?;
        }
        let Self { main, carrier, shared, rounds, .. } = self;
        let round = match section {
            Section::Start => {
                carrier.announce(main, shared)?;
                Round::empty()
            }
            Section::Part => {
                main.ram_part();
                shared.ram.round(carrier.workers())
            }
            Section::End => {
                main.ram_end();
                shared.ram.round(carrier.workers())
            }
        };
        if section != Section::Start {
            *rounds += 1;
            Counters::add(&shared.session.counters.rounds, 1);
        }
        let context = RoundContext { round: *rounds, last: section == Section::End };
        carrier.send_round(round, context, main, shared)?;
        if section != Section::Start {
            shared.ram.forget_holes();
        }
        main.end_of_section()
    }

    /// Returns when the pages of the round have arrived, as far as that can be known.
    pub(super) fn wait_for_round(&mut self) -> Result<()> {
        let ping = ping_of_round(self.rounds);
        self.carrier.settle_round(ping, &mut self.main, self.return_path.as_ref(), &self.shared)?;
        self.note_arrival();
        Ok(())
    }

    /// Collects what was written since the last time. Gives how long it took.
    pub(super) fn sync_logs(&mut self) -> Result<Duration> {
        let begun = Instant::now();
        self.logs.sync(Phase::Active, &self.shared.ram.dirty)?;
        self.shared.ram.take_changes()?;
        Ok(begun.elapsed())
    }

    /// Device state and the end of the stream, then the destination's answer.
    pub(super) fn hand_over(
        &mut self,
        state: &DeviceState,
        last_ram_sent: Instant,
        ledger: &mut DowntimeLedger,
    ) -> Result<()> {
        state.check()?;
        let begun = Instant::now();
        ledger.state_save_us = micros(begun.duration_since(last_ram_sent));
        state.send(|bytes| self.main.raw(bytes))?;
        let return_path = self.return_path.as_ref();
        let sent = self.carrier.finish(state.end(), &mut self.main, return_path, &self.shared)?;
        ledger.device_state_us = micros(sent.duration_since(begun));
        // What the destination says of its time is no more than what was waited for here.
        let (waited, load) = (sent.elapsed(), return_path.and_then(ReturnPathReader::load_time));
        let load = load.unwrap_or_default().min(waited);
        (ledger.load_us, ledger.acknowledgement_us) = (micros(load), micros(waited - load));
        self.shared.session.complete();
        self.shared.session.set_hand_over(HandOver::Done);
        Ok(())
    }

    /// The account, when all threads have ended.
    pub(super) fn end(self, ledger: DowntimeLedger) -> Report {
        self.carrier.dismiss_workers();
        self.alive.end();
        self.crew.join();
        let session = &self.shared.session;
        session.stop.release();
        session.whole().stop.release();
        let mut report = Report::of(session, session.elapsed(), self.shared.codec_in_words());
        session.close_channels();
        report.setup = self.setup;
        report.downtime = ledger.total();
        report.ledger = ledger;
        report.xbzrle = self.shared.cache.as_ref().map(|cache| cache.stats());
        report.confirmed = self.return_path.is_some();
        report.audit = self.audit;
        report.digest = self.shared.agreed().digest.then_some(DigestVerdict::Equal);
        report.zero_copy = self.shared.zero_copy_stats(&report.progress);
        report
    }

    pub(super) fn enter(&mut self, state: MigrationState) -> Result<()> {
        match state {
            MigrationState::Active => self.main.enter(Phase::Active),
            MigrationState::Device => self.main.enter(Phase::Device),
            _ => {}
        }
        self.shared.session.enter(state)
    }

    /// Ends the migration if `result` is an error, and gives the first cause.
    pub(super) fn caused<T>(&mut self, result: Result<T>) -> Result<T> {
        result.map_err(|error| self.fail(error))
    }

    pub(super) fn fail(&mut self, error: Error) -> Error {
        // The first cause may be another thread's, but only this one knows whether the guest was
        // handed over.
        let handed_over = !error.source_may_resume();
        self.fail_as(error, handed_over)
    }

    pub(super) fn fail_as(&mut self, error: Error, handed_over: bool) -> Error {
        let mut cause = self.shared.session.fail(error, &self.crew);
        self.carrier.abort();
        // Logs are off before the caller hears of it: the guest runs on at full speed.
        self.logs = LogSet::default();
        // A destination that refuses hangs up as well: which of the two shows first is chance.
        let refusal = self.return_path.as_ref().and_then(ReturnPathReader::refusal);
        if let Some(refusal) = refusal.filter(|_| cause.kind() == ErrorKind::Transport) {
            cause = refusal;
        }
        // A destination that has refused the guest does not run it, whatever was sent.
        let refused = matches!(cause.kind(), ErrorKind::PeerAborted(_));
        if handed_over && !refused {
            return cause.after_hand_over();
        }
        self.shared.session.set_hand_over(HandOver::Before);
        let remedy = ended_by_destination(&cause).then_some(Remedy::CompareSettings);
        cause.remedied_by(remedy)
    }
}

/// Whether the destination refused, hung up, or did not do what was waited for. One that has
/// vanished is none of that.
fn ended_by_destination(cause: &Error) -> bool {
    let vanished = std::error::Error::source(cause)
        .and_then(|source| source.downcast_ref::<std::io::Error>())
        .is_some_and(PeerVanished::is_in);
    match cause.kind() {
        ErrorKind::PeerAborted(_) => true,
        ErrorKind::Transport | ErrorKind::Deadline => !vanished,
        _ => false,
    }
}

pub(super) fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}
