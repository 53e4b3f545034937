//! Rounds while the guest runs, then the switch-over: the calls that an embedder makes, in their
//! order.

use std::time::{Duration, Instant};

use super::control::Control;
use super::device_state::DeviceState;
use super::migration::{Migration, Section, micros};
use super::rounds::RoundContext;
use crate::convergence::{Convergence, Decision, DowntimeLedger, RoundFacts, RoundRecord};
use crate::error::{Error, ErrorKind, Phase, Result};
use crate::guest::PAGE;
use crate::report::Report;
use crate::run::counters::{Estimate, Progress};
use crate::run::session::{Canceller, ProgressReader};
use crate::run::stop::lock;

/// Connected; the guest runs while rounds move its RAM.
///
/// Dropped before [`Precopy::stop_copy`] and [`StopCopy::commit`], the migration is cancelled and
/// the guest is still here.
#[must_use = "dropping it cancels the migration"]
pub struct Precopy {
    pub(super) migration: Migration,
    convergence: Convergence,
    pub(super) decisions: Vec<RoundRecord>,
    /// Since when the guest has been paused, if the embedder has said so.
    paused: Option<Instant>,
}

/// The guest is stopped, all of its RAM is over; device state is next.
#[must_use = "dropping it cancels the migration"]
pub struct StopCopy {
    migration: Migration,
    decisions: Vec<RoundRecord>,
    ledger: DowntimeLedger,
    last_ram_sent: Instant,
}

impl Precopy {
    pub(super) fn new(migration: Migration, convergence: Convergence) -> Self {
        Self { migration, convergence, decisions: Vec::new(), paused: None }
    }

    /// Sends every page that is dirty now, then collects what was written meanwhile and decides
    /// what follows.
    ///
    /// # Errors
    /// `NotConverging` if the limits say to give up; else anything that broke the migration. The
    /// guest may run on.
    pub fn round(&mut self) -> Result<&RoundRecord> {
        let record = loop {
            let _busy = self.migration.alive.busy();
            let result = self.send_round();
            // A round that its link has broken begins again, with what has not arrived.
            if let Some(record) = self.migration.or_resumed(result)? {
                break record;
            }
        };
        let abort = matches!(record.decision, Decision::AbortDeadline | Decision::AbortStalled);
        let reason = abort.then(|| record.reason.clone());
        self.decisions.push(record);
        if let Some(reason) = reason {
            let error = Error::new(ErrorKind::NotConverging, Phase::Active, reason);
            return self.migration.caused(Err(error));
        }
        self.decisions.last().ok_or_else(|| Error::new(ErrorKind::ApiMisuse, Phase::Active, "no round"))
    }

    fn send_round(&mut self) -> Result<RoundRecord> {
        let migration = &mut self.migration;
        let (begun, before) = (Instant::now(), migration.shared.session.progress());
        let dirty_bytes = dirty_bytes(migration);
        migration.section(Section::Part)?;
        migration.wait_for_round()?;
        let duration = begun.elapsed();
        migration.shared.ram.check_holes()?;
        let sync = migration.sync_logs()?;
        let after = migration.shared.session.progress();
        let facts = RoundFacts {
            dirty_bytes,
            content_bytes: content_bytes(&after) - content_bytes(&before),
            remaining_bytes: self::dirty_bytes(migration),
            wire_bytes: after.wire_bytes - before.wire_bytes,
            duration,
            sync,
            elapsed: migration.shared.session.elapsed(),
        };
        let mut record = self.convergence.on_round(facts, &migration.control.limits());
        let context = RoundContext { round: migration.rounds, last: false };
        if let Some(said) = migration.shared.cache.as_ref().and_then(|cache| cache.assess(context)) {
            record.reason = format!("{}; {said}", record.reason);
        }
        for said in std::mem::take(&mut *lock(&migration.shared.decided)) {
            record.reason = format!("{}; {said}", record.reason);
        }
        let session = &migration.shared.session;
        session.counters.expect(Estimate {
            remaining_bytes: record.remaining_bytes,
            bandwidth_bytes_per_s: record.bandwidth_bytes_per_s,
            downtime_us: record.expected_downtime_us,
            pages_before: session.counters.pages(),
        });
        tracing::debug!(%record, "round");
        Ok(record)
    }

    /// True when the last round's decision was to stop the guest. Then: pause it, and
    /// [`Precopy::stop_copy`].
    pub fn converged(&self) -> bool {
        self.decisions
            .last()
            .is_some_and(|last| matches!(last.decision, Decision::SwitchOver | Decision::SwitchOverStalled))
    }

    /// True when the last round's decision was to switch to post-copy
    /// ([`OnStall::Postcopy`](crate::OnStall)). Then: pause the guest, and
    /// [`Precopy::switch_to_postcopy`].
    pub fn wants_postcopy(&self) -> bool {
        self.decisions.last().is_some_and(|last| last.decision == Decision::Postcopy)
    }

    /// What was decided after each round so far, and why.
    pub fn decisions(&self) -> &[RoundRecord] {
        &self.decisions
    }

    /// Pages that a further round would send.
    pub fn dirty_pages(&self) -> usize {
        self.migration.shared.ram.dirty_pages()
    }

    /// Steers the migration from other threads.
    pub fn control(&self) -> Control {
        self.migration.control.clone()
    }

    /// Ends the migration from another thread.
    pub fn canceller(&self) -> Canceller {
        Canceller::new(&self.migration.shared.session)
    }

    /// Tells how far it has come, from any thread.
    pub fn progress(&self) -> ProgressReader {
        ProgressReader::new(&self.migration.shared.session)
    }

    /// Says when the pause of the guest began: the downtime in the report counts from there. Take
    /// the time before the vCPUs are asked to stop. Without this, it counts from
    /// [`Precopy::stop_copy`].
    pub fn guest_paused_at(&mut self, begin: Instant) {
        self.paused = Some(begin);
    }

    /// Sends what is still dirty, on all channels. The guest must be stopped, and stay so. With
    /// pause-before-switchover, waits for [`Control::proceed`] first.
    /// [`SourceConfig::max_bandwidth`](crate::SourceConfig::max_bandwidth) does not hold any more.
    ///
    /// # Errors
    /// Anything that broke the migration; the guest may run on.
    pub fn stop_copy(mut self) -> Result<StopCopy> {
        let busy = self.migration.alive.busy();
        let pause = self.paused.map_or(Duration::ZERO, |begin| begin.elapsed());
        let mut ledger = DowntimeLedger { pause_us: micros(pause), ..DowntimeLedger::default() };
        let result = self.migration.finish_ram(&mut ledger, &busy);
        drop(busy);
        if self.migration.or_resumed(result)?.is_none() {
            self.migration.finish_ram_again(&mut ledger)?;
        }
        let Self { migration, decisions, .. } = self;
        Ok(StopCopy { migration, decisions, ledger, last_ram_sent: Instant::now() })
    }
}

impl StopCopy {
    /// Sends the device state and hands the guest over. After an `Ok`, it runs at the destination.
    ///
    /// # Errors
    /// [`Error::source_may_resume`] says whether the guest may run on here.
    pub fn commit(mut self, state: &DeviceState) -> Result<Report> {
        loop {
            let _busy = self.migration.alive.busy();
            let result = self.migration.hand_over(state, self.last_ram_sent, &mut self.ledger);
            if self.migration.or_resumed(result)?.is_some() {
                break;
            }
            self.migration.finish_ram_again(&mut self.ledger)?;
            self.last_ram_sent = Instant::now();
        }
        let mut report = self.migration.end(self.ledger);
        report.decisions = self.decisions;
        Ok(report)
    }
}

fn dirty_bytes(migration: &Migration) -> u64 {
    (migration.shared.ram.dirty_pages() * PAGE) as u64
}

fn content_bytes(progress: &Progress) -> u64 {
    (progress.pages_normal + progress.pages_xbzrle) * PAGE as u64
}
