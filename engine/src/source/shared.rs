//! What the sending threads share.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use crossbeam_utils::CachePadded;
use multifd_codecs::Codec;
use multifd_transports::Pacer;
use multifd_wire::{MigrationId, Wishes, pages_per_packet};

use super::outgoing::OutgoingRam;
use super::page_cache::PageCache;
use super::postcopy::Neighbours;
use super::rounds::RoundContext;
use super::zero_copy::{ZeroCopySend, ZeroCopyStats};
use crate::error::{Error, Phase, Result};
use crate::guest::{PAGE, PAGE_SIZE};
use crate::run::counters::Progress;
use crate::run::secret;
use crate::run::session::Session;
use crate::run::stop::lock;
use crate::stream::dialect::FEATURE_DELTAS;
use crate::work::{Next, Round, UrgentPages};

pub(super) struct SourceShared {
    pub(super) session: Arc<Session>,
    pub(super) ram: Arc<OutgoingRam>,
    pub(super) codec: Arc<dyn Codec>,
    pub(super) uuid: [u8; 16],
    pub(super) pacer: Arc<Pacer>,
    /// Number of the next packet, over all channels: every worker writes it.
    pub(super) packets: CachePadded<AtomicU64>,
    /// The xbzrle cache, if it was asked for.
    pub(super) cache: Option<PageCache>,
    /// Features of a multifd destination; 0: not known yet, or a QEMU.
    pub(super) peer_features: AtomicU64,
    /// The codec of each packet is chosen.
    pub(super) auto_codec: bool,
    /// What the workers have decided since the end of the last round, for the log.
    pub(super) decided: Mutex<Vec<String>>,
    /// What the destination checks. Set before the first page goes.
    pub(super) agreed: OnceLock<Wishes>,
    /// What a multifd destination knows this migration by, if it has said so.
    pub(super) id: OnceLock<MigrationId>,
    /// The destination's half of the secret by which it knows this migration over another link.
    pub(super) resume_key: OnceLock<[u8; secret::LEN]>,
    pub(super) zero_copy: ZeroCopySend,
    /// Pages that are wanted before their turn. Not set: none may be asked for.
    pub(super) urgent: OnceLock<UrgentPages>,
    /// Pages that follow those. Not set: none are pushed.
    pub(super) neighbours: OnceLock<Neighbours>,
}

impl SourceShared {
    /// The same for another link, over which everything is agreed on again. What the destination
    /// holds of a page that was on its way is not known: nothing is in the cache. `known`: by the
    /// same destination, under the same id.
    pub(super) fn for_link(
        &self,
        session: &Arc<Session>,
        cache: Option<PageCache>,
        known: bool,
    ) -> Arc<Self> {
        Arc::new(Self {
            session: Arc::clone(session),
            ram: Arc::clone(&self.ram),
            codec: Arc::clone(&self.codec),
            uuid: self.uuid,
            pacer: Arc::clone(&self.pacer),
            packets: CachePadded::default(),
            cache,
            peer_features: AtomicU64::new(0),
            auto_codec: self.auto_codec,
            decided: Mutex::new(std::mem::take(&mut *lock(&self.decided))),
            agreed: OnceLock::new(),
            id: if known { self.id.clone() } else { OnceLock::new() },
            resume_key: if known { self.resume_key.clone() } else { OnceLock::new() },
            zero_copy: self.zero_copy,
            urgent: OnceLock::new(),
            neighbours: OnceLock::new(),
        })
    }

    /// The cache, if it serves this round and the destination takes differences on the parallel
    /// channels.
    pub(super) fn deltas_for_peer(&self, context: RoundContext) -> Option<&PageCache> {
        let can = self.peer_can(FEATURE_DELTAS);
        self.cache.as_ref().filter(|cache| can && cache.serves(context))
    }

    /// Whether the destination has said that it has this feature of the dialect.
    pub(super) fn peer_can(&self, feature: u64) -> bool {
        self.peer_features.load(Ordering::Relaxed) & feature != 0
    }

    /// The cache, if it serves this round on the main channel: every destination takes differences
    /// there.
    pub(super) fn deltas_for_main(&self, context: RoundContext) -> Option<&PageCache> {
        self.cache.as_ref().filter(|cache| cache.serves(context))
    }

    /// What the destination checks: nothing as long as it is not known.
    pub(super) fn agreed(&self) -> Wishes {
        self.agreed.get().copied().unwrap_or_default()
    }

    /// Features of a destination whose packets may have different codecs; 0 where they may not.
    pub(super) fn features_for_packets(&self) -> u64 {
        if self.agreed().mixed { self.peer_features.load(Ordering::Relaxed) } else { 0 }
    }

    /// The codec for people: `zstd:3`, `auto`.
    pub(super) fn codec_in_words(&self) -> String {
        if self.auto_codec && self.agreed().mixed { "auto".to_owned() } else { self.codec.describe() }
    }

    /// A line for the decision log, to which the end of the round adds it.
    pub(super) fn decide(&self, line: String) {
        tracing::debug!(line);
        lock(&self.decided).push(line);
    }

    /// The pages of `round`, those that are wanted first.
    pub(super) fn next<'r>(&'r self, round: &'r Round) -> Next<'r> {
        Next::new(round, self.urgent.get())
    }

    /// What became of zero-copy sends, if they were asked for.
    pub(super) fn zero_copy_stats(&self, progress: &Progress) -> Option<ZeroCopyStats> {
        (self.zero_copy != ZeroCopySend::Off).then_some(ZeroCopyStats {
            sends: progress.zero_copy_sends,
            copied: progress.zero_copy_copied,
            refused: progress.zero_copy_refused,
        })
    }

    /// Pages in a batch: a full packet, or as many as take 25 ms at the rate limit, so that a slow
    /// link sees no bursts.
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

#[cfg(test)]
pub(in crate::source) mod tests {
    use multifd_codecs::Uncompressed;

    use super::*;
    use crate::guest::{HostMemory, RamBlock};
    use crate::run::session::DEFAULT_TIMEOUT;
    use crate::source::outgoing::{RamNotes, ZeroPages};

    /// Blocks with so many pages each, whose first bytes are the page's number and 1.
    pub(in crate::source) fn ram(blocks: &[(&str, usize)]) -> OutgoingRam {
        let blocks = blocks.iter().map(|(name, pages)| {
            let memory = HostMemory::anonymous(pages * PAGE).unwrap();
            let block = RamBlock::new((*name).try_into().unwrap(), memory);
            for page in 0..*pages {
                let first = block.memory().slice(page * PAGE, 2).unwrap();
                first.copy_from(&[u8::try_from(page % 256).unwrap(), 1]);
            }
            block
        });
        OutgoingRam::new(blocks.collect(), &RamNotes::default(), ZeroPages::None, true).unwrap()
    }

    /// What the threads of a source of `ram` share, without anything that is not on by default.
    pub(in crate::source) fn shared(ram: OutgoingRam) -> Arc<SourceShared> {
        Arc::new(SourceShared {
            session: Session::new(DEFAULT_TIMEOUT),
            ram: Arc::new(ram),
            codec: Arc::new(Uncompressed),
            uuid: [0; 16],
            pacer: Arc::new(Pacer::new(None)),
            packets: CachePadded::default(),
            cache: None,
            peer_features: AtomicU64::new(0),
            auto_codec: false,
            decided: Mutex::default(),
            agreed: OnceLock::new(),
            id: OnceLock::new(),
            resume_key: OnceLock::new(),
            zero_copy: ZeroCopySend::Off,
            urgent: OnceLock::new(),
            neighbours: OnceLock::new(),
        })
    }
}
