//! The parts of a connected source, and the sections they write together.

use std::sync::Arc;
use std::time::{Duration, Instant};

use multifd_wire::{Command, Configuration, HELLO_PING, RamRecord};

use super::control::Control;
use super::device_state::DeviceState;
use super::main_stream::MainStream;
use super::mapped::MappedFile;
use super::page_cache::Moment;
use super::return_path::ReturnPathReader;
use super::shared::Shared;
use super::single;
use crate::convergence::DowntimeLedger;
use crate::dirty::LogSet;
use crate::error::{Error, ErrorKind, Phase, Result};
use crate::ram::Round;
use crate::report::Report;
use crate::sections::EarlySections;
use crate::session::Counters;
use crate::state::MigrationState;
use crate::workers::Crew;

/// Where the destination expects the sync points of the parallel channels; its machine type decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SyncPoints {
    /// At FLUSH records: machine types from 8.1 on.
    AtFlush,
    /// At every end of a section: machine types up to 8.0.
    AtSectionEnd,
}

impl SyncPoints {
    pub(super) fn for_machine(configuration: &Configuration) -> Self {
        match configuration.machine_version() {
            Some(version) if version <= (8, 0) => Self::AtSectionEnd,
            _ => Self::AtFlush,
        }
    }
}

/// Marks the PING at the end of a round; the round's number is below it.
const ROUND_PING: u32 = 0x8000_0000;

/// One item of the RAM section. Each carries a sync point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Section {
    Start,
    Part,
    End,
}

pub(super) struct Migration {
    pub(super) main: MainStream,
    pub(super) shared: Arc<Shared>,
    pub(super) control: Control,
    pub(super) crew: Crew,
    pub(super) return_path: Option<ReturnPathReader>,
    pub(super) sync_points: SyncPoints,
    /// Device sections that go before the end of RAM.
    pub(super) early: EarlySections,
    /// Send SWITCHOVER_START.
    pub(super) switchover_start: bool,
    pub(super) pause_before_switchover: bool,
    pub(super) logs: LogSet,
    pub(super) setup: Duration,
    /// Rounds begun.
    pub(super) rounds: u64,
}

impl Migration {
    /// Header, configuration, return path, the list of blocks and the first sync point.
    pub(super) fn set_up(&mut self, configuration: &Configuration) -> Result<()> {
        self.main.header(configuration);
        if self.return_path.is_some() {
            self.main.command(Command::OpenReturnPath)?;
            self.main.command(Command::Ping(HELLO_PING))?;
        }
        self.main.raw(&self.early.before_ram)?;
        self.section(Section::Start)?;
        self.main.raw(&self.early.within_ram)?;
        self.enter(MigrationState::Active)?;
        self.setup = self.shared.session.elapsed();
        Ok(())
    }

    /// The guest stands still: the last dirty bits, the last pages.
    pub(super) fn finish_ram(&mut self, ledger: &mut DowntimeLedger) -> Result<()> {
        let begun = Instant::now();
        self.logs.last_sync(Phase::Active, &self.shared.ram.dirty)?;
        ledger.bitmap_sync_us = micros(begun.elapsed());
        if self.pause_before_switchover {
            self.enter(MigrationState::PreSwitchover)?;
            self.control.wait_for_go_ahead()?;
        }
        self.enter(MigrationState::Device)?;
        let begun = Instant::now();
        if self.switchover_start {
            self.main.command(Command::SwitchoverStart)?;
        }
        self.section(Section::End)?;
        ledger.last_ram_us = micros(begun.elapsed());
        Ok(())
    }

    /// One item of the RAM section: the pages that are dirty, then a sync point.
    pub(super) fn section(&mut self, section: Section) -> Result<()> {
        let workers = self.shared.rounds.workers();
        let round = match section {
            Section::Start => {
                match &self.shared.mapped {
                    Some(mapped) => mapped.announce(&mut self.main, &self.shared.ram)?,
                    None => self.main.ram_start(&self.shared.ram),
                }
                Round::empty()
            }
            Section::Part => {
                self.main.ram_part();
                self.shared.ram.round(workers)
            }
            Section::End => {
                self.main.ram_end();
                self.shared.ram.round(workers)
            }
        };
        if section != Section::Start {
            self.rounds += 1;
            Counters::add(&self.shared.session.counters.rounds, 1);
        }
        let moment = Moment { round: self.rounds, last: section == Section::End };
        if let Some(mapped) = &self.shared.mapped {
            self.write_mapped(mapped, round, moment)?;
        } else if workers == 0 {
            single::send_round(&mut self.main, &round, moment, &self.shared)?;
        } else {
            self.send_parallel(round, moment)?;
        }
        if section != Section::Start {
            self.shared.ram.forget_holes();
        }
        self.main.end_of_section()
    }

    /// Pages at fixed places; the section itself stays empty.
    fn write_mapped(&self, mapped: &MappedFile, round: Round, moment: Moment) -> Result<()> {
        if self.shared.rounds.workers() == 0 {
            mapped.write_round(&round, &self.shared)?;
        } else {
            // A page is written again only when all workers are through: the newest stays.
            self.shared.rounds.run(round, moment, |_| Ok(()))?;
        }
        if moment.last { mapped.write_bitmaps() } else { Ok(()) }
    }

    fn send_parallel(&mut self, round: Round, moment: Moment) -> Result<()> {
        let (main, shared) = (&mut self.main, &self.shared);
        shared.rounds.run(round, moment, |mail| {
            Counters::add(&shared.session.counters.pages_zero, mail.offsets.len());
            main.zero_pages(&shared.ram, &mail)
        })?;
        if self.sync_points == SyncPoints::AtFlush {
            self.main.record(&RamRecord::Flush);
        }
        Ok(())
    }

    /// Returns when the destination has done all of the round, if it can say so: only then is its bandwidth known, and not that
    /// of the socket buffers. A file has it when the disk has it: what is left to be synced when the guest stands still is little.
    pub(super) fn wait_for_round(&mut self) -> Result<()> {
        if let Some(file) = self.main.channel().file() {
            return file.sync().map_err(|error| self.main.error(error));
        }
        let Some(return_path) = &self.return_path else { return Ok(()) };
        let value = ROUND_PING | u32::try_from(self.rounds).unwrap_or(u32::MAX);
        self.main.command(Command::Ping(value))?;
        return_path.wait_for_pong(value, self.shared.session.timeout)
    }

    /// Collects what was written since the last time. Gives how long it took.
    pub(super) fn sync_logs(&mut self) -> Result<Duration> {
        let begun = Instant::now();
        self.logs.sync(Phase::Active, &self.shared.ram.dirty)?;
        Ok(begun.elapsed())
    }

    /// Device state and the end of the stream, then the destination's word.
    pub(super) fn hand_over(
        &mut self,
        state: &DeviceState,
        last_ram_sent: Instant,
        ledger: &mut DowntimeLedger,
    ) -> Result<()> {
        self.main.raw(state.sections())?;
        let channel = Arc::clone(self.main.channel());
        let before = channel.bytes_sent();
        self.return_path.iter().for_each(ReturnPathReader::expect_shut);
        let sent = channel.send_all(state.end());
        // The point of no return: with EOF, the first of these bytes, the destination has all it needs to run the guest. If not
        // even that one has left, because the destination died before, it has not been reached.
        // A file runs nowhere by itself, and is thrown away if it does not come to its end.
        if channel.bytes_sent() > before && channel.file().is_none() {
            self.main.enter(Phase::Commit);
        }
        sent.map_err(|error| self.main.error(error))?;
        ledger.device_state_us = micros(last_ram_sent.elapsed());
        let begun = Instant::now();
        match &self.return_path {
            Some(return_path) => return_path.wait_for_shut(self.shared.session.timeout)?,
            None => self.end_unanswered()?,
        }
        ledger.acknowledgement_us = micros(begun.elapsed());
        self.shared.session.complete();
        Ok(())
    }

    /// Without a return path the end is all that can be said. A command behind the channel must end well.
    fn end_unanswered(&self) -> Result<()> {
        let channel = self.main.channel();
        channel.finish_sending().map_err(|error| self.main.error(error))?;
        channel
            .settle(self.shared.session.timeout)
            .map_err(|error| Error::io(Phase::Commit, "at the end", error).on(self.main.name()))
    }

    /// The account, when all threads have ended.
    pub(super) fn end(self, ledger: DowntimeLedger) -> Report {
        self.shared.rounds.close();
        self.crew.join();
        let session = &self.shared.session;
        let codec =
            if self.shared.rounds.workers() == 0 { "none".to_owned() } else { self.shared.codec.describe() };
        let mut report = Report::of(session, session.elapsed(), codec);
        session.close_channels();
        report.setup = self.setup;
        report.downtime = ledger.total();
        report.ledger = ledger;
        report.xbzrle = self.shared.cache.as_ref().map(|cache| cache.stats());
        report.confirmed = self.return_path.is_some();
        report.zero_copy = self.shared.zero_copy_stats();
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

    fn fail(&mut self, error: Error) -> Error {
        let session = &self.shared.session;
        // Whoever broke it first knows best, but only this thread knows whether the guest was handed over.
        let committed = !error.source_may_resume();
        session.stop.trip(error);
        session.note_end_of_failed();
        self.crew.join();
        // What a writer has put into a file after that was thrown away.
        session.close_channels();
        // Logs are off before the caller hears of it: the guest runs on at full speed.
        self.logs = LogSet::default();
        let mut cause = session.stop.cause_or(Error::new(ErrorKind::Cancelled, Phase::Active, "stopped"));
        // A destination that refuses hangs up as well: which of the two shows first is chance.
        let refusal = self.return_path.as_ref().and_then(ReturnPathReader::refusal);
        if let Some(refusal) = refusal.filter(|_| cause.kind() == ErrorKind::Transport) {
            cause = refusal;
        }
        let refused = matches!(cause.kind(), ErrorKind::PeerAborted(_));
        if committed && !refused { cause.committed() } else { cause }
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}
