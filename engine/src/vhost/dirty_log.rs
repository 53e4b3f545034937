//! What vhost devices write, as one of a migration's dirty logs.

use std::sync::{Arc, Mutex, MutexGuard};

use super::devices::Group;
use crate::dirty::{Coverage, DirtyLog, DirtyLogError};
use crate::guest::{DirtyBitmap, RamBlock};
use crate::run::stop::lock;

/// The log of a [`VhostDevices`](super::VhostDevices), made by its `log`.
///
/// Its `start` fails, before anything is sent, for a back-end that cannot log. Its `sync` fails
/// when a back-end is gone: the migration fails, the guest can run on. Its `last_sync` fails while
/// a device still runs.
pub struct VhostLog {
    group: Arc<Mutex<Group>>,
    /// The group's log is on for us, or half on.
    started: bool,
}

impl VhostLog {
    pub(super) fn new(group: Arc<Mutex<Group>>) -> Self {
        Self { group, started: false }
    }

    fn group(&self) -> MutexGuard<'_, Group> {
        lock(&self.group)
    }
}

impl DirtyLog for VhostLog {
    fn name(&self) -> &str {
        "vhost"
    }

    fn start(&mut self, ram: &[RamBlock]) -> Result<(), DirtyLogError> {
        let result = {
            let mut group = self.group();
            let free = group.migration.is_none();
            (group.start_log(ram), free)
        };
        self.started = result.1;
        result.0
    }

    /// These devices write to the guest's memory beside its vCPUs, which need a log of their own.
    fn covers(&self, _: &RamBlock) -> Coverage {
        Coverage::Nothing
    }

    fn sync(&mut self, bitmaps: &[Arc<DirtyBitmap>]) -> Result<(), DirtyLogError> {
        let mut group = self.group();
        if let Some(logging) = &mut group.migration {
            // No back-end writes to these: they are read once and dropped.
            logging.retired.drain(..).try_for_each(|log| log.drain(bitmaps))?;
            logging.log.drain(bitmaps)?;
        }
        group.mark_unlogged(bitmaps)?;
        group.check_log()
    }

    fn last_sync(&mut self, bitmaps: &[Arc<DirtyBitmap>]) -> Result<(), DirtyLogError> {
        self.group().check_stopped()?;
        self.sync(bitmaps)
    }

    fn stop(&mut self) {
        if std::mem::take(&mut self.started) {
            self.group().stop_log();
        }
    }
}

impl std::fmt::Debug for VhostLog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VhostLog").field("started", &self.started).finish_non_exhaustive()
    }
}
