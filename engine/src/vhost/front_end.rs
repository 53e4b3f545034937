//! What a migration asks of a device's back-end.

use std::time::Duration;

use vhost::{Error, Result, VhostBackend};
use vm_memory::GuestAddress;

use super::region::VhostRegion;
use super::shared_log::SharedLog;

/// The longest wait for a back-end. GET_VRING_BASE takes as long as the requests in flight.
pub(super) const DEFAULT_TIMEOUT: Duration = Duration::from_secs(10);

/// What vhost-user and the kernel's vhost do differently; everything else they share by the `vhost`
/// crate's [`VhostBackend`]. [`VhostUser`](super::VhostUser) and
/// [`VhostKernel`](super::VhostKernel) are such; yours may be.
///
/// # Contract
/// * Every call returns in bounded time. A setter returns when the back-end has applied it, and not
///   before.
/// * When `get_vring_base` has returned, the back-end writes nothing more for this ring, neither
///   data nor used ring.
/// * A call that follows one that failed may fail at once.
pub trait VhostFrontEnd: VhostBackend + Send {
    /// The longest wait for the back-end: for an answer, and for requests to be done. Default: 10
    /// s.
    fn timeout(&self) -> Duration {
        DEFAULT_TIMEOUT
    }

    /// The protocol features that both ends use. The kernel has none.
    fn protocol_features(&self) -> u64 {
        0
    }

    /// What is missing for a log, beside VHOST_F_LOG_ALL.
    fn log_obstacle(&self) -> Option<&'static str> {
        None
    }

    /// Most rings that the back-end serves, if it tells.
    ///
    /// # Errors
    /// The back-end does not answer.
    fn ring_limit(&self) -> Result<Option<u64>> {
        Ok(None)
    }

    /// Has the back-end log there from now on, and no longer where it did.
    ///
    /// # Errors
    /// It refuses.
    fn share_log(&self, log: &SharedLog) -> Result<()>;

    /// Has the back-end reach `new` where it reached `old`.
    ///
    /// # Errors
    /// It refuses.
    fn change_memory(&self, old: &[VhostRegion], new: &[VhostRegion]) -> Result<()>;

    /// True if a ring must be stopped while memory changes, since what is written meanwhile may not
    /// be logged.
    fn stops_for_memory(&self) -> bool {
        false
    }

    /// The kind of address that the back-end expects for a ring: the guest's, or this process's.
    fn ring_address(&self, guest: GuestAddress, host: u64) -> u64;

    /// Lets a ring run that has all it needs, or halts it before `get_vring_base`.
    ///
    /// # Errors
    /// The back-end refuses.
    fn switch_ring(&self, index: usize, on: bool) -> Result<()>;

    /// Has the ring go on at `base`: 16 bits of a split ring, 32 of a packed one.
    ///
    /// # Errors
    /// The back-end refuses.
    fn set_ring_base(&self, index: usize, base: u32) -> Result<()> {
        self.set_vring_base(index, u16::try_from(base).map_err(|_| Error::InvalidQueue)?)
    }

    /// Fails if the back-end is gone.
    ///
    /// # Errors
    /// It is.
    fn check_connected(&self) -> Result<()> {
        Ok(())
    }

    /// Has the back-end announce the guest's address on its network. False: it cannot.
    ///
    /// # Errors
    /// The back-end refuses.
    fn send_rarp(&self, _mac: [u8; 6]) -> Result<bool> {
        Ok(false)
    }

    /// The state that the back-end has of its own, if it has one. All rings are stopped.
    ///
    /// # Errors
    /// The back-end refuses, or fails meanwhile.
    fn save_state(&self) -> Result<Option<Vec<u8>>> {
        Ok(None)
    }

    /// Gives the back-end such a state, before any ring is started.
    ///
    /// # Errors
    /// The back-end refuses, or has no state of its own.
    fn load_state(&self, _state: &[u8]) -> Result<()> {
        Err(Error::InvalidOperation)
    }

    /// Gives the back-end the region in which it finds the requests that were in flight.
    ///
    /// # Errors
    /// The back-end refuses, or does not have it.
    fn share_inflight(&self, _inflight: &super::Inflight) -> Result<()> {
        Err(Error::InvalidOperation)
    }
}
