//! Pages that the kernel sends straight from guest memory (MSG_ZEROCOPY).

use std::sync::atomic::Ordering;

use multifd_transports::{Channel, ZeroCopy};
use serde::Serialize;

use crate::error::{Error, Phase, Result};
use crate::io::Ranges;
use crate::run::counters::ChannelCounters;

/// Whether the parallel channels let the kernel send pages straight from guest memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum ZeroCopySend {
    /// The kernel copies, as it always does.
    #[default]
    Off,
    /// Until the kernel says that it copies after all, as it does on loopback and virtual networks:
    /// then it only costs.
    WhileItPays,
    /// Even then; for measurements.
    Always,
}

/// What became of the zero-copy sends of a migration.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ZeroCopyStats {
    /// System calls that were to send without copying.
    pub sends: u64,
    /// Those of them that the kernel has copied after all.
    pub copied: u64,
    /// Calls that had to be plain ones, because the kernel had no room to keep track of more
    /// (`net.core.optmem_max`, RLIMIT_MEMLOCK).
    pub refused: u64,
}

/// The zero-copy sends of one channel.
pub(super) struct ZeroCopySender {
    account: ZeroCopy,
    always: bool,
    refused: u64,
    /// What the counters know already.
    told: ZeroCopyStats,
}

impl ZeroCopySender {
    /// `None` if it was not asked for.
    pub(super) fn new(channel: &Channel, wanted: ZeroCopySend) -> Result<Option<Self>> {
        if wanted == ZeroCopySend::Off {
            return Ok(None);
        }
        let account =
            channel.zero_copy().map_err(|error| Error::io(Phase::Connect, "setting up the socket", error))?;
        let always = wanted == ZeroCopySend::Always;
        Ok(Some(Self { account, always, refused: 0, told: ZeroCopyStats::default() }))
    }

    /// Whether the next packet should go this way.
    pub(super) fn pays(&self) -> bool {
        self.always || self.account.copied() == 0
    }

    pub(super) fn send(
        &mut self,
        header: &[u8],
        pages: Ranges<'_>,
        channel: &Channel,
    ) -> std::io::Result<()> {
        let refused = pages.send_zero_copy(header, channel, &mut self.account)?;
        self.refused += refused as u64;
        self.account.reap(channel)
    }

    /// Waits until the kernel is done with all of guest memory, and adds to `counters` what has
    /// become of it.
    pub(super) fn settle(&mut self, channel: &Channel, counters: &ChannelCounters) -> Result<()> {
        self.account.wait(channel).map_err(|error| Error::io(Phase::Active, "sending pages", error))?;
        let (sends, copied) = (self.account.sends(), self.account.copied());
        if copied > 0 && self.told.copied == 0 {
            tracing::info!(peer = channel.peer(), copied, sends, "the kernel copies zero-copy sends");
        }
        counters.zero_copy_sends.fetch_add(sends - self.told.sends, Ordering::Relaxed);
        counters.zero_copy_copied.fetch_add(copied - self.told.copied, Ordering::Relaxed);
        counters.zero_copy_refused.fetch_add(self.refused - self.told.refused, Ordering::Relaxed);
        self.told = ZeroCopyStats { sends, copied, refused: self.refused };
        Ok(())
    }
}
