//! Signs of life of a destination whose embedder has the guest: loading its state, making it
//! durable takes as long as it takes. Spec: docs/wire.md §27.4.

use super::return_path::ReturnPath;
use crate::error::{Phase, Result};
use crate::run::stop::Monitor;
use crate::run::workers::Crew;
use crate::stream::dialect::ALIVE_INTERVAL;

/// Says that this end is alive, from a thread of its own, until it is ended or SHUT was said.
pub(super) struct Alive(Monitor<bool>);

impl Alive {
    /// A source that has hung up meanwhile ends the migration.
    ///
    /// # Errors
    /// The process cannot have another thread.
    pub(super) fn start(return_path: &ReturnPath, crew: &Crew) -> Result<Self> {
        let over = Monitor::new(false, crew.stop());
        let (ended, stop, return_path) = (over.clone(), crew.stop().clone(), return_path.clone());
        crew.spawn("mig-alive", Phase::Device, move || {
            while !stop.tripped() && return_path.say_alive()? {
                if ended.wait(&stop, Some(ALIVE_INTERVAL), |over| over.then_some(())).is_some() {
                    break;
                }
            }
            Ok(())
        })?;
        Ok(Self(over))
    }

    /// Lets the thread end.
    pub(super) fn end(&self) {
        self.0.modify_and_notify(|over| *over = true);
    }
}
