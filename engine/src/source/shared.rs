//! What the sending threads share.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use multifd_codecs::Codec;
use multifd_transports::Pacer;
use multifd_wire::pages_per_packet;

use super::outgoing::OutgoingRam;
use super::page_cache::PageCache;
use super::rounds::RoundContext;
use super::zero_copy::{ZeroCopySend, ZeroCopyStats};
use crate::error::{Error, Phase, Result};
use crate::guest::{PAGE, PAGE_SIZE};
use crate::run::session::Session;
use crate::stream::dialect::FEATURE_DELTAS;

pub(super) struct SourceShared {
    pub(super) session: Arc<Session>,
    pub(super) ram: OutgoingRam,
    pub(super) codec: Arc<dyn Codec>,
    pub(super) uuid: [u8; 16],
    pub(super) pacer: Arc<Pacer>,
    /// Number of the next packet, over all channels.
    pub(super) packets: AtomicU64,
    /// The xbzrle cache, if it was asked for.
    pub(super) cache: Option<PageCache>,
    /// Features of a multifd destination; 0: not known yet, or a QEMU.
    pub(super) peer_features: Arc<AtomicU64>,
    pub(super) zero_copy: ZeroCopySend,
}

impl SourceShared {
    /// The cache, if it serves this round and the destination takes differences on the parallel channels.
    pub(super) fn deltas_for_peer(&self, context: RoundContext) -> Option<&PageCache> {
        let can = self.peer_features.load(Ordering::Relaxed) & FEATURE_DELTAS != 0;
        self.cache.as_ref().filter(|cache| can && cache.serves(context))
    }

    /// The cache, if it serves this round on the main channel: every destination takes differences there.
    pub(super) fn deltas_for_main(&self, context: RoundContext) -> Option<&PageCache> {
        self.cache.as_ref().filter(|cache| cache.serves(context))
    }

    /// What became of zero-copy sends, if they were asked for.
    pub(super) fn zero_copy_stats(&self) -> Option<ZeroCopyStats> {
        let counters = &self.session.counters;
        (self.zero_copy != ZeroCopySend::Off).then(|| ZeroCopyStats {
            sends: counters.zero_copy_sends.load(Ordering::Relaxed),
            copied: counters.zero_copy_copied.load(Ordering::Relaxed),
            refused: counters.zero_copy_refused.load(Ordering::Relaxed),
        })
    }

    /// Pages in a batch: a full packet, or as many as take 25 ms at the rate limit, so that a slow link sees no bursts.
    pub(super) fn batch_pages(&self) -> usize {
        let full = pages_per_packet(PAGE_SIZE);
        let Some(rate) = self.pacer.rate() else { return full };
        usize::try_from(rate.get() / 40).unwrap_or(usize::MAX).div_ceil(PAGE).clamp(1, full)
    }

    /// Waits until the rate limit lets `bytes` more go.
    pub(super) fn pace(&self, bytes: usize) -> Result<()> {
        self.pacer.take(bytes).map_err(|_| Error::stopped(Phase::Active))
    }
}
