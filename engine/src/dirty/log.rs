//! What every source of dirty pages has in common.

use std::sync::Arc;

use thiserror::Error;

use super::Coverage;
use crate::guest::{DirtyBitmap, RamBlock};

/// Notes which pages of guest memory are written: a hypervisor's log, a fault handler's, a device
/// back-end's, your own.
///
/// A migration may have any number of them; what they note is OR-ed into one bitmap a block at the
/// start of every round.
///
/// # Contract
/// * Between a `start` that returned and `stop`, no write may be missed: a write that is complete
///   when `sync` is called is in this `sync` or was in an earlier one; a write that races with it
///   is in this one or the next.
/// * `sync` takes what it reports off the log. A failed `sync` must have lost nothing: what it took
///   it has reported.
/// * Reporting too much costs time, never correctness.
/// * `covers` says what is in the log, and the migration does not begin while a page that may be
///   written is in none: a log that claims too much loses what is written there. It has no default,
///   since only the log's author can know.
/// * Memory that is added to the log's share of the guest while it is started, removed from it or
///   mapped anew is either followed or makes the next `sync` fail; it is never passed over. `stop`
///   does not bring back what the VMM took away.
/// * `start`, `sync` and `stop` are called by one thread at a time, the one that drives the
///   migration; they may block for as long as the guest can bear at a switch-over, since the last
///   `sync` is part of the downtime.
/// * `stop` is called after every `start`, however the migration ends, also when `start` failed
///   half-way. A log that takes bits which the VMM needs for itself gives them back then.
pub trait DirtyLog: Send {
    /// Names the log in errors and in the downtime ledger: `kvm`, `userfaultfd`.
    fn name(&self) -> &str;

    /// Begins to note writes to `ram`. What was written before does not matter: every page is sent
    /// once after this.
    ///
    /// # Errors
    /// The log cannot be had for this memory. Nothing was sent yet.
    fn start(&mut self, ram: &[RamBlock]) -> Result<(), DirtyLogError>;

    /// The part of `block` whose writes the log notes: by the vCPUs, or by everything that may
    /// write there. The log of a single device answers [`Coverage::Nothing`], since it does not
    /// stand in for the log of the vCPUs. So does every log for a block that `start` did not name.
    ///
    /// Asked once for each block, after `start`.
    fn covers(&self, block: &RamBlock) -> Coverage;

    /// Sets the bits of all pages written since the last call; `bitmaps` has one for each block of
    /// `start`, in its order.
    ///
    /// # Errors
    /// The log cannot be read: the migration fails, the guest runs on.
    fn sync(&mut self, bitmaps: &[Arc<DirtyBitmap>]) -> Result<(), DirtyLogError>;

    /// The `sync` after which the guest goes over: what is written from now on is lost. A log that
    /// knows of a writer that still runs refuses. Default: `sync`.
    ///
    /// # Errors
    /// As [`DirtyLog::sync`].
    fn last_sync(&mut self, bitmaps: &[Arc<DirtyBitmap>]) -> Result<(), DirtyLogError> {
        self.sync(bitmaps)
    }

    /// Ends the noting, and takes back what `start` did to the guest's memory.
    fn stop(&mut self);
}

/// A dirty log could not do its work.
#[derive(Debug, Error)]
#[error("{doing}")]
pub struct DirtyLogError {
    doing: String,
    #[source]
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl DirtyLogError {
    /// `doing` says what was tried: "write-protecting RAM block pc.ram".
    pub fn new(doing: impl Into<String>) -> Self {
        Self { doing: doing.into(), source: None }
    }

    /// Attaches the cause.
    #[must_use]
    pub fn because(mut self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }
}
