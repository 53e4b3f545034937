//! The sending end: a guest's RAM and device state move into any QEMU or multifd destination.
//!
//! ```text
//!  Source::builder ─ connect ─> Precopy ─ round ... ─ stop_copy ─> StopCopy ─ commit ─> Report
//!    main_stream ── header, block list, sections, device state      on the caller's thread
//!    channel ×N ─── claim pages, encode, one write a packet         one thread each, `mig-send-N`
//!    rounds ─────── hands a round to the channels, collects SYNCs
//!    single ─────── the pages, when there are no channels
//!    return_path ── what the destination says                       one thread, `mig-return`
//! ```

mod builder;
mod channel;
mod device_state;
mod main_stream;
mod outgoing;
mod return_path;
mod rounds;
mod shared;
mod single;

use std::sync::Arc;
use std::time::{Duration, Instant};

pub use builder::{Source, SourceBuilder};
pub use device_state::DeviceState;
pub use outgoing::ZeroPages;

use multifd_wire::{Command, RamRecord};

use crate::error::{Error, ErrorKind, Phase, Result};
use crate::ram::Round;
use crate::report::Report;
use crate::session::{Canceller, Counters, ProgressReader};
use crate::workers::Crew;
use main_stream::MainStream;
use return_path::ReturnPathReader;
use shared::Shared;

/// Where the destination expects the sync points of the parallel channels; its machine type decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum SyncPoints {
    /// At FLUSH records: machine types from 8.1 on.
    AtFlush,
    /// At every end of a section: machine types up to 8.0.
    AtSectionEnd,
}

/// Connected; the guest runs while rounds move its RAM.
///
/// Dropped before [`Precopy::stop_copy`] and [`StopCopy::commit`], the migration is cancelled and the guest is still here.
#[must_use = "dropping it cancels the migration"]
pub struct Precopy {
    session: Migration,
}

/// The guest is stopped, all of its RAM is over; device state is next.
#[must_use = "dropping it cancels the migration"]
pub struct StopCopy {
    session: Migration,
    stopped: Instant,
}

/// The parts of a connected source.
struct Migration {
    main: MainStream,
    shared: Arc<Shared>,
    crew: Crew,
    return_path: Option<ReturnPathReader>,
    sync_points: SyncPoints,
    /// Send SWITCHOVER_START.
    switchover_start: bool,
    setup: Duration,
}

impl Precopy {
    /// Sends every page that is dirty now.
    ///
    /// # Errors
    /// Anything that broke the migration; the guest may run on.
    pub fn round(&mut self) -> Result<()> {
        let result = self.session.section(Section::Part);
        self.session.caused(result)
    }

    /// Pages that a further round would send.
    pub fn dirty_pages(&self) -> usize {
        self.session.shared.ram.dirty_pages()
    }

    /// Ends the migration from another thread.
    pub fn canceller(&self) -> Canceller {
        Canceller::new(&self.session.shared.session)
    }

    /// Tells how far it has come, from any thread.
    pub fn progress(&self) -> ProgressReader {
        ProgressReader::new(&self.session.shared.session)
    }

    /// Sends what is still dirty. The guest must be stopped, and stay so.
    ///
    /// # Errors
    /// Anything that broke the migration; the guest may run on.
    pub fn stop_copy(mut self) -> Result<StopCopy> {
        let stopped = Instant::now();
        let result = self.session.finish_ram();
        self.session.caused(result)?;
        Ok(StopCopy { session: self.session, stopped })
    }
}

impl StopCopy {
    /// Sends the device state and hands the guest over. After an `Ok`, it runs at the destination.
    ///
    /// # Errors
    /// [`Error::source_may_resume`] says whether the guest may run on here.
    pub fn commit(mut self, state: &DeviceState) -> Result<Report> {
        let result = self.session.hand_over(state);
        self.session.caused(result)?;
        let migration = self.session;
        let downtime = self.stopped.elapsed();
        let codec = migration.codec_name();
        migration.shared.rounds.close();
        migration.crew.join();
        let session = &migration.shared.session;
        let mut report = Report::of(session, session.started.elapsed(), codec);
        session.close_channels();
        report.setup = migration.setup;
        report.downtime = downtime;
        report.confirmed = migration.return_path.is_some();
        Ok(report)
    }
}

/// Which item of the RAM section carries a sync point.
enum Section {
    Start,
    Part,
    End,
}

impl Migration {
    /// Header, configuration, return path, the list of blocks and the first sync point.
    fn set_up(&mut self, configuration: &multifd_wire::Configuration, ping: u32) -> Result<()> {
        self.main.header(configuration);
        if self.return_path.is_some() {
            self.main.command(Command::OpenReturnPath)?;
            self.main.command(Command::Ping(ping))?;
        }
        self.section(Section::Start)?;
        self.main.enter(Phase::Active);
        self.setup = self.shared.session.started.elapsed();
        Ok(())
    }

    fn finish_ram(&mut self) -> Result<()> {
        self.main.enter(Phase::Device);
        if self.switchover_start {
            self.main.command(Command::SwitchoverStart)?;
        }
        self.section(Section::End)
    }

    /// One item of the RAM section: the pages that are dirty, then a sync point.
    fn section(&mut self, section: Section) -> Result<()> {
        let workers = self.shared.rounds.workers();
        let round = match section {
            Section::Start => {
                self.main.ram_start(&self.shared.ram);
                Round::empty()
            }
            Section::Part => {
                self.main.ram_part();
                Counters::add(&self.shared.session.counters.rounds, 1);
                self.shared.ram.round(workers)
            }
            Section::End => {
                self.main.ram_end();
                self.shared.ram.round(workers)
            }
        };
        if workers == 0 {
            single::send_round(&mut self.main, &round, &self.shared)?;
        } else {
            let (main, shared) = (&mut self.main, &self.shared);
            shared.rounds.run(round, |mail| {
                Counters::add(&shared.session.counters.pages_zero, mail.offsets.len());
                main.zero_pages(&shared.ram, &mail)
            })?;
            if self.sync_points == SyncPoints::AtFlush {
                self.main.record(&RamRecord::Flush);
            }
        }
        self.main.end_of_section()
    }

    fn hand_over(&mut self, state: &DeviceState) -> Result<()> {
        self.main.raw(state.sections())?;
        // The point of no return: with the next byte, EOF, the destination has all it needs to run the guest.
        self.main.enter(Phase::Commit);
        self.main.raw(state.end())?;
        match &self.return_path {
            Some(return_path) => return_path.wait(self.shared.session.timeout),
            None => self.main.channel().finish_sending().map_err(|error| self.main.error(error)),
        }
    }

    /// Ends the migration if `result` is an error, and gives the first cause.
    fn caused(&self, result: Result<()>) -> Result<()> {
        let Err(error) = result else { return Ok(()) };
        let stop = self.crew.stop();
        // Whoever broke it first knows best, but only this thread knows whether the guest was handed over.
        let committed = !error.source_may_resume();
        stop.trip(error);
        self.crew.join();
        let cause = stop.cause_or(Error::new(ErrorKind::Cancelled, Phase::Active, "stopped"));
        let refused = matches!(cause.kind(), ErrorKind::PeerAborted(_));
        Err(if committed && !refused { cause.committed() } else { cause })
    }

    fn codec_name(&self) -> String {
        if self.shared.rounds.workers() == 0 { "none".to_owned() } else { self.shared.codec.describe() }
    }
}
