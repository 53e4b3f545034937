//! The background stream of a post-copy over parallel channels. Spec: docs/wire.md §27.10.
//!
//! ```text
//!  main ── start ─> worker of channel 0   claim, encode, send ... nothing left ─ done ─┐
//!                   worker of channel 1   claim, encode, send ... nothing left ─ done ─┴─> main ends the stream
//! ```

use std::num::NonZeroU64;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use multifd_transports::{Channel, Pacer};
use multifd_wire::pages_per_packet;

use super::short_queue::ShortQueue;
use super::wanted::{Scan, Wanted};
use super::{wait_for_main, watch};
use crate::error::{Error, Phase, Result};
use crate::guest::{PAGE, PAGE_SIZE};
use crate::source::return_path::ReturnPathReader;
use crate::source::shared::SourceShared;
use crate::work::BlockIndex;

/// How long a wait for the bandwidth limit may be, before the limit is looked at again.
pub(super) const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// What the workers of a link's parallel channels share.
pub(in crate::source) struct Bulk {
    scan: Arc<Scan>,
    pacer: Arc<Pacer>,
    return_path: ReturnPathReader,
    /// Workers that have something to send.
    busy: AtomicUsize,
    short_queues: bool,
}

impl Bulk {
    /// The background stream beside what is `wanted`, for so many `workers`.
    pub(super) fn new(wanted: &Wanted, return_path: &ReturnPathReader, workers: usize) -> Arc<Self> {
        Arc::new(Self {
            scan: Arc::clone(wanted.scan()),
            pacer: Arc::clone(wanted.pacer()),
            return_path: return_path.clone(),
            busy: AtomicUsize::new(workers),
            short_queues: wanted.has_short_queues(),
        })
    }

    /// What keeps the queue of a worker's channel short.
    pub(in crate::source) fn short_queue(&self, channel: &Arc<Channel>) -> ShortQueue {
        ShortQueue::of(channel, self.short_queues)
    }

    /// The next pages of a worker, once the bandwidth limit lets them go. `None`: nothing is left.
    ///
    /// # Errors
    /// The link has ended.
    pub(in crate::source) fn next(
        &self,
        shared: &SourceShared,
        pages: &mut Vec<usize>,
    ) -> Result<Option<BlockIndex>> {
        loop {
            if self.return_path.has_stopped() {
                return Err(Error::stopped(Phase::Postcopy));
            }
            let Some(wait) = self.pacer.debt() else {
                return Ok(self.scan.claim(shared, most(self.pacer.rate()), pages));
            };
            self.return_path.rest(wait.min(LOOK_AGAIN));
        }
    }

    /// A worker has sent so many bytes.
    pub(in crate::source) fn charge(&self, bytes: usize) {
        self.pacer.charge(bytes);
    }

    /// A worker has found nothing left, and sent what it had.
    pub(in crate::source) fn done(&self) {
        self.busy.fetch_sub(1, Ordering::AcqRel);
        self.return_path.notify();
    }

    /// Watches a worker's channel, on which everything has been sent, until nothing waits for its
    /// pages any more.
    ///
    /// # Errors
    /// It has broken.
    pub(in crate::source) fn watch(&self, channel: &Channel, name: &str) -> Result<()> {
        watch(channel, name, &self.return_path)
    }

    /// A worker's channel has broken.
    pub(in crate::source) fn broken(&self, shared: &SourceShared) {
        wait_for_main(&shared.session, &self.return_path);
    }

    /// Everything has been sent.
    pub(super) fn is_done(&self) -> bool {
        self.busy.load(Ordering::Acquire) == 0
    }
}

/// Pages in one go: a packet, or fewer at a low rate, for which they would be a burst.
fn most(rate: Option<NonZeroU64>) -> usize {
    let full = pages_per_packet(PAGE_SIZE);
    let Some(rate) = rate else { return full };
    usize::try_from(rate.get() / 40).unwrap_or(usize::MAX).div_ceil(PAGE).clamp(1, full)
}
