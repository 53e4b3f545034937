//! Steering a migration from other threads while it runs.

use std::num::NonZeroU64;
use std::sync::mpsc::Receiver;
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
    link: Arc<Mutex<Link>>,
    /// The switch-over has begun: the limit for rounds holds no longer.
    switching_over: Arc<Mutex<bool>>,
    /// What a source with pause-before-switchover waits for.
    go_ahead: Monitor<bool>,
}

/// The connection of a post-copy, as far as a pause of the caller's goes.
#[derive(Default)]
struct Link {
    /// `None` until the switch has come back.
    stop: Option<StopSwitch>,
    /// Asked for when there was nothing to cut.
    pause: bool,
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

    /// Changes the limit over all channels for rounds, at once. `None`: no limit. At the
    /// switch-over [`Limits::max_switchover_bandwidth`] holds instead.
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

    /// Cuts the link of a post-copy, to go on over another (migrate-pause):
    /// [`Postcopy::serve`](crate::Postcopy::serve) comes back with `Paused`, also when it is called
    /// later. A recovery that is under way fails, and is paused again.
    ///
    /// # Errors
    /// `ApiMisuse` as long as the guest has not been handed over, and when the migration has ended:
    /// nothing is paused.
    pub fn pause_postcopy(&self) -> Result<()> {
        let mut link = lock(&self.link);
        let state = self.session.state();
        if !state.is_postcopy() {
            let detail = format!("the migration is {state}, only a post-copy can be paused");
            return Err(Error::new(ErrorKind::ApiMisuse, Phase::Postcopy, detail));
        }
        match &link.stop {
            Some(stop) => stop.trip(paused_by_caller()),
            None => link.pause = true,
        }
        Ok(())
    }

    /// The link that [`Control::pause_postcopy`] cuts. The first is there later than the state that
    /// lets it be cut.
    pub(super) fn set_link(&self, stop: &StopSwitch) {
        let mut link = lock(&self.link);
        link.stop = Some(stop.clone());
        if std::mem::take(&mut link.pause) {
            stop.trip(paused_by_caller());
        }
    }

    /// Lets a source with pause-before-switchover go on (migrate-continue). May come before the
    /// source waits for it.
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

    /// Every state that the migration enters from now on, in its order (QEMU's capability
    /// `events`).
    pub fn state_changes(&self) -> Receiver<MigrationState> {
        self.session.state_changes()
    }

    pub(super) fn pacer(&self) -> &Arc<Pacer> {
        &self.pacer
    }

    pub(super) fn postcopy_pacer(&self) -> &Arc<Pacer> {
        &self.postcopy_pacer
    }

    /// Waits for [`Control::proceed`], for as long as it takes: only the caller knows what it is
    /// waiting for.
    pub(super) fn wait_for_go_ahead(&self) -> Result<()> {
        self.go_ahead
            .wait(&self.session.stop, None, |go_ahead| go_ahead.then_some(()))
            .ok_or_else(|| Error::stopped(Phase::Device))
    }
}

fn paused_by_caller() -> Error {
    Error::new(ErrorKind::Cancelled, Phase::Postcopy, "paused by the caller")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pause_before_the_link_is_known_cuts_it_as_soon_as_it_is() {
        let session = Session::new(Duration::from_secs(1));
        let control = Control::new(&session, &SourceConfig::default());
        let reach =
            |states: &[MigrationState]| states.iter().for_each(|state| session.enter(*state).unwrap());
        reach(&[MigrationState::Setup, MigrationState::Active, MigrationState::Device]);
        let error = control.pause_postcopy().unwrap_err();
        assert!(error.to_string().contains("is device, only a post-copy"), "{error}");
        reach(&[MigrationState::PostcopyDevice]);
        control.pause_postcopy().unwrap();
        let [first, second] = [(); 2].map(|()| StopSwitch::default());
        control.set_link(&first);
        assert!(first.tripped());
        control.set_link(&second);
        assert!(!second.tripped(), "asked for once");
        control.pause_postcopy().unwrap();
        assert!(second.tripped());
    }
}
