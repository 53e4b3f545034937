//! All the dirty logs of one migration.

use std::sync::Arc;

use super::{DirtyLog, DirtyLogError, Unwritten};
use crate::error::{Error, ErrorKind, Phase, Result};
use crate::guest::{DirtyBitmap, RamBlock};

/// Logs that were started; dropping it stops them, whatever ended the migration.
#[derive(Default)]
pub(crate) struct LogSet {
    started: Vec<Box<dyn DirtyLog>>,
}

impl LogSet {
    /// Starts every log, and checks that they cover all that is written. An error stops those that
    /// were started.
    pub(crate) fn start(
        logs: Vec<Box<dyn DirtyLog>>,
        ram: &[RamBlock],
        unwritten: &Unwritten,
    ) -> Result<Self> {
        let mut set = Self::default();
        for mut log in logs {
            let result = log.start(ram);
            let failed = result.map_err(|error| {
                let detail = format!("dirty log {} could not be started", log.name());
                Error::new(ErrorKind::GuestMemory, Phase::Setup, detail).because(error)
            });
            set.started.push(log);
            failed?;
        }
        unwritten.check_logs(&set.started, ram)?;
        Ok(set)
    }

    /// ORs what every log has noted into `bitmaps`, one for each block.
    pub(crate) fn sync(&mut self, phase: Phase, bitmaps: &[Arc<DirtyBitmap>]) -> Result<()> {
        self.each(phase, |log| log.sync(bitmaps))
    }

    /// The last sync: the guest is paused.
    pub(crate) fn last_sync(&mut self, phase: Phase, bitmaps: &[Arc<DirtyBitmap>]) -> Result<()> {
        self.each(phase, |log| log.last_sync(bitmaps))
    }

    fn each(
        &mut self,
        phase: Phase,
        read: impl Fn(&mut dyn DirtyLog) -> Result<(), DirtyLogError>,
    ) -> Result<()> {
        self.started.iter_mut().try_for_each(|log| {
            read(&mut **log).map_err(|error| {
                let detail = format!("dirty log {} could not be read", log.name());
                Error::new(ErrorKind::GuestMemory, phase, detail).because(error)
            })
        })
    }
}

impl Drop for LogSet {
    fn drop(&mut self) {
        self.started.iter_mut().for_each(|log| log.stop());
    }
}
