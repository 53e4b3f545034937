//! A device in the kernel: vhost-net, vhost-vsock, ...

use std::fs::File;
use std::os::fd::{AsRawFd, RawFd};

use vhost::net::VhostNet;
use vhost::vhost_kern::net::Net;
use vhost::vhost_kern::{PhysicalGuestAddressSpace, VhostKernBackend};
use vhost::{Result, VhostBackend};
use vm_memory::GuestAddress;

use super::front_end::VhostFrontEnd;
use super::region::VhostRegion;
use super::shared_log::SharedLog;

/// Starts or stops one ring of a kernel device.
type Switch<K> = Box<dyn Fn(&K, usize, bool) -> Result<()> + Send>;

/// A back-end in the kernel. Its answers are those of system calls: there is nothing to wait for,
/// and it cannot hang up.
///
/// The kernel's VHOST_GET_VRING_BASE only reads a number. What stops a ring is a request of the
/// device's kind, which the migration makes first: for vhost-net, taking the tap away.
pub struct VhostKernel<K> {
    device: K,
    switch: Switch<K>,
}

impl<M> VhostKernel<Net<M>>
where
    M: PhysicalGuestAddressSpace + Send + 'static,
{
    /// A pair of vhost-net's rings, which move packets from and to `tap`.
    pub fn net(device: Net<M>, tap: File) -> Self {
        Self::new(device, move |net, ring, on| net.set_backend(ring, on.then_some(&tap)))
    }
}

impl<K: VhostKernBackend> VhostKernel<K> {
    /// Any kernel device. `switch` starts (true) or stops one ring, and returns when nothing more
    /// is written for it.
    pub fn new(device: K, switch: impl Fn(&K, usize, bool) -> Result<()> + Send + 'static) -> Self {
        Self { device, switch: Box::new(switch) }
    }
}

impl<K: AsRawFd> AsRawFd for VhostKernel<K> {
    fn as_raw_fd(&self) -> RawFd {
        self.device.as_raw_fd()
    }
}

impl<K: VhostKernBackend> VhostKernBackend for VhostKernel<K> {
    type AS = K::AS;

    fn mem(&self) -> &Self::AS {
        self.device.mem()
    }
}

impl<K: VhostKernBackend + Send> VhostFrontEnd for VhostKernel<K> {
    fn share_log(&self, log: &SharedLog) -> Result<()> {
        self.set_log_base(log.address(), None)
    }

    fn change_memory(&self, _: &[VhostRegion], new: &[VhostRegion]) -> Result<()> {
        let infos: Vec<_> = new.iter().map(VhostRegion::info).collect();
        self.set_mem_table(&infos).map(drop)
    }

    fn ring_address(&self, guest: GuestAddress, _: u64) -> u64 {
        guest.0
    }

    fn switch_ring(&self, index: usize, on: bool) -> Result<()> {
        (self.switch)(&self.device, index, on)
    }
}

impl<K> std::fmt::Debug for VhostKernel<K> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VhostKernel").finish_non_exhaustive()
    }
}
