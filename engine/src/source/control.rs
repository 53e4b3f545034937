//! Steering a migration from other threads while it runs.

use std::num::NonZeroU64;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use multifd_transports::Pacer;

use crate::config::SourceConfig;
use crate::convergence::Limits;
use crate::error::{Error, ErrorKind, Phase, Result};
use crate::run::counters::Progress;
use crate::run::session::{Canceller, Session};
use crate::run::state::MigrationState;
use crate::run::stop::{Monitor, StopSwitch, lock};

/// Steers a source from any thread: limits, the go-ahead, cancel. Clones steer the same migration.
#[derive(Clone)]
pub struct Control {
    session: Arc<Session>,
    pacer: Arc<Pacer>,
    /// Of the background stream of a post-copy.
    postcopy_pacer: Arc<Pacer>,
    limits: Arc<Mutex<Limits>>,
    /// Of the connection of a post-copy.
    link: Arc<Mutex<Option<StopSwitch>>>,
    /// The switch-over has begun: the limit for rounds holds no longer.
    switching_over: Arc<Mutex<bool>>,
    /// What a source with pause-before-switchover waits for.
    go_ahead: Monitor<bool>,
}

impl Control {
    pub(super) fn new(session: &Arc<Session>, config: &SourceConfig) -> Self {
        let pacer = Arc::new(Pacer::new(config.max_bandwidth));
        let paced = Arc::clone(&pacer);
        session.stop.on_trip(move || paced.stop());
        Self {
            session: Arc::clone(session),
            pacer,
            postcopy_pacer: Arc::new(Pacer::new(config.max_postcopy_bandwidth)),
            limits: Arc::new(Mutex::new(config.limits)),
            link: Arc::default(),
            switching_over: Arc::default(),
            go_ahead: Monitor::new(false, &session.stop),
        }
    }

    /// Ends the migration; the guest stays. See [`Canceller::cancel`].
    pub fn cancel(&self) -> bool {
        Canceller::new(&self.session).cancel()
    }

    /// Changes the limit over all channels for rounds, at once. `None`: no limit. At the switch-over
    /// [`Limits::max_switchover_bandwidth`] holds instead.
    pub fn set_max_bandwidth(&self, bytes_per_second: Option<NonZeroU64>) {
        let switching_over = lock(&self.switching_over);
        if !*switching_over {
            self.pacer.set_rate(bytes_per_second);
        }
    }

    /// From now on the guest waits for what is sent.
    pub(super) fn begin_switchover(&self) {
        let mut switching_over = lock(&self.switching_over);
        *switching_over = true;
        self.pacer.set_rate(self.limits().max_switchover_bandwidth);
    }

    /// Changes the limit of a post-copy's background stream, at once. `None`: no limit.
    pub fn set_max_postcopy_bandwidth(&self, bytes_per_second: Option<NonZeroU64>) {
        self.postcopy_pacer.set_rate(bytes_per_second);
    }

    /// Changes the longest downtime; counts from the next decision on.
    pub fn set_downtime_limit(&self, limit: Duration) {
        lock(&self.limits).downtime_limit = limit;
    }

    /// Changes all limits; they count from the next decision on.
    pub fn set_limits(&self, limits: Limits) {
        *lock(&self.limits) = limits;
    }

    /// The limits in force.
    pub fn limits(&self) -> Limits {
        *lock(&self.limits)
    }

    /// Cuts the link of a post-copy, to go on over another (migrate-pause): [`Postcopy::serve`](crate::Postcopy::serve) comes
    /// back with `Paused`. No effect at other times.
    pub fn pause_postcopy(&self) {
        if let Some(stop) = lock(&self.link).as_ref() {
            stop.trip(Error::new(ErrorKind::Cancelled, Phase::Postcopy, "paused by the caller"));
        }
    }

    /// The link that [`Control::pause_postcopy`] cuts.
    pub(super) fn set_link(&self, stop: &StopSwitch) {
        *lock(&self.link) = Some(stop.clone());
    }

    /// Lets a source with pause-before-switchover go on (migrate-continue). May come before the source waits for it.
    pub fn proceed(&self) {
        self.go_ahead.modify_and_notify(|go_ahead| *go_ahead = true);
    }

    /// The counters now.
    pub fn progress(&self) -> Progress {
        self.session.progress()
    }

    /// Where the migration is.
    pub fn state(&self) -> MigrationState {
        self.session.state()
    }

    pub(super) fn pacer(&self) -> &Arc<Pacer> {
        &self.pacer
    }

    pub(super) fn postcopy_pacer(&self) -> &Arc<Pacer> {
        &self.postcopy_pacer
    }

    /// Waits for [`Control::proceed`], for as long as it takes: only the caller knows what it is waiting for.
    pub(super) fn wait_for_go_ahead(&self) -> Result<()> {
        self.go_ahead
            .wait(&self.session.stop, None, |go_ahead| go_ahead.then_some(()))
            .ok_or_else(|| Error::stopped(Phase::Device))
    }
}
