//! The limit on the time of a whole migration, however slowly its bytes come.

use std::time::Duration;

use crate::error::{Error, ErrorKind, Phase, Result};
use crate::run::stop::Monitor;
use crate::run::workers::Crew;

/// Ends the migration unless it is dropped in time.
pub(super) struct Deadline(Option<Monitor<bool>>);

impl Deadline {
    /// `limit`, of which so much has `elapsed` over earlier links; `None`: no thread, no limit.
    pub(super) fn start(limit: Option<Duration>, elapsed: Duration, crew: &Crew) -> Result<Self> {
        let Some(limit) = limit else { return Ok(Self(None)) };
        let met = Monitor::new(false, crew.stop());
        let (watched, stop) = (met.clone(), crew.stop().clone());
        crew.spawn("mig-deadline", Phase::Active, move || {
            let left = limit.saturating_sub(elapsed);
            let met = watched.wait(&stop, Some(left), |met| met.then_some(()));
            if met.is_some() || stop.tripped() {
                return Ok(());
            }
            let detail = format!("the guest has not come whole within {limit:?}, the deadline");
            Err(Error::new(ErrorKind::Deadline, Phase::Active, detail))
        })?;
        Ok(Self(Some(met)))
    }
}

impl Drop for Deadline {
    fn drop(&mut self) {
        if let Some(met) = &self.0 {
            met.modify_and_notify(|met| *met = true);
        }
    }
}
