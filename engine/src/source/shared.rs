//! What the sending threads share.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use multifd_codecs::Codec;
use multifd_transports::Pacer;

use super::outgoing::OutgoingRam;
use super::rounds::Rounds;
use crate::error::{Error, ErrorKind, Phase, Result};
use crate::session::Session;

pub(super) struct Shared {
    pub(super) session: Arc<Session>,
    pub(super) ram: OutgoingRam,
    pub(super) codec: Arc<dyn Codec>,
    pub(super) uuid: [u8; 16],
    pub(super) rounds: Rounds,
    pub(super) pacer: Arc<Pacer>,
    /// Number of the next packet, over all channels.
    pub(super) packets: AtomicU64,
}

impl Shared {
    /// Waits until the rate limit lets `bytes` more go.
    pub(super) fn pace(&self, bytes: usize) -> Result<()> {
        self.pacer.take(bytes).map_err(|_| Error::new(ErrorKind::Cancelled, Phase::Active, "stopped"))
    }
}
