//! One device: its rings, and the messages to its back-end when the guest's memory migrates.

use std::collections::BTreeSet;
use std::sync::Arc;

use vhost::VringConfigData;
use vm_memory::{Address, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::error::VhostError;
use super::front_end::VhostFrontEnd;
use super::region::{self, VhostRegion};
use super::shared_log::SharedLog;
use super::state::{
    DEVICE_STATE, Inflight, LASTING_PROTOCOL_FEATURES, RING_PACKED, Ring, VhostState, check_ring_size,
};
use super::user::PROTOCOL_FEATURES;

/// VHOST_F_LOG_ALL: what a back-end that can log offers, and what turns its log on.
pub(super) const LOG_ALL: u64 = 1 << 26;
/// VHOST_VRING_F_LOG: the used ring is logged, too.
const RING_LOGS: u32 = 1;

/// A device whose back-end reads and writes guest memory on its own.
///
/// ```text
///   new, load ──> stopped ──start──> running ──stop──> stopped: state() ──start──> running
///                                        │ a migration: log on, log off
/// ```
#[derive(Debug)]
pub struct VhostDevice<F> {
    pub(super) name: String,
    pub(super) front_end: F,
    /// What guest and device have agreed on.
    pub(super) features: u64,
    /// By index; `None`: the guest has not set it up.
    pub(super) rings: Vec<Option<(Ring, RingEvents)>>,
    pub(super) inflight: Option<Inflight>,
    /// A back-end's own state that it has not been given yet.
    pub(super) back_end: Option<Vec<u8>>,
    /// Its back-end cannot log: all that it reaches counts as written while it runs.
    pub(super) unlogged: bool,
    /// Such a back-end has run since the last sync.
    pub(super) has_run: bool,
    pub(super) phase: DevicePhase,
    /// The stopped rings of a running device: not all of them could be stopped, or started.
    pub(super) halted: BTreeSet<usize>,
    pub(super) finishes: bool,
    /// The back-end knows the guest's memory.
    pub(super) has_memory: bool,
    /// Where the back-end logs, from when it is told until it has confirmed that it does not any
    /// more: the kernel writes there.
    pub(super) log: Option<Arc<SharedLog>>,
    /// Logs from before a change that failed: the back-end may write to either, and the kernel's
    /// vhost writes into this process. Behind `front_end`, which ends that when it is dropped.
    pub(super) keep_alive: Vec<Arc<SharedLog>>,
}

/// The state of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum DevicePhase {
    /// Its back-end writes nothing.
    Stopped,
    /// Its rings run, but for those that are halted.
    Running,
    /// Its rings are stopped, but it may not be done with what it took from them.
    Halted,
}

/// How guest and back-end wake each other.
#[derive(Debug)]
pub struct RingEvents {
    /// The guest has made buffers available.
    pub kick: EventFd,
    /// The back-end has used buffers.
    pub call: EventFd,
}

impl<F: VhostFrontEnd> VhostDevice<F> {
    /// A stopped device without rings. `features`: what its guest's driver has acknowledged. `name`
    /// is in every error.
    pub fn new(name: impl Into<String>, front_end: F, features: u64) -> Self {
        let (rings, inflight) = (Vec::new(), None);
        Self {
            name: name.into(),
            front_end,
            // Between us and the back-end, never the guest's.
            features: features & !LOG_ALL,
            rings,
            inflight,
            back_end: None,
            unlogged: false,
            has_run: false,
            phase: DevicePhase::Stopped,
            halted: BTreeSet::new(),
            finishes: false,
            has_memory: false,
            log: None,
            keep_alive: Vec::new(),
        }
    }

    /// The device of a saved `state`, stopped, on a back-end that fits. `events`: for each ring of
    /// it, also those that are left out. A back-end's own state is given to it by the first start.
    ///
    /// # Errors
    /// The state needs features that the back-end does not offer, or other rings than there are.
    pub fn load(
        name: impl Into<String>,
        front_end: F,
        state: &VhostState,
        events: Vec<RingEvents>,
    ) -> Result<Self, VhostError> {
        let mut device = Self::new(name, front_end, state.features);
        device.check_features(state)?;
        let (needed, here) = (state.rings.len(), events.len());
        if needed != here {
            return Err(device.failed(format!("the state has {needed} rings, the device here has {here}")));
        }
        let limit = device.front_end.ring_limit();
        let limit = limit.map_err(|cause| device.failed("asking for its number of rings").because(cause))?;
        if let Some(limit) = limit.filter(|limit| *limit < needed as u64) {
            return Err(
                device.failed(format!("the state has {needed} rings, its back-end here serves {limit}"))
            );
        }
        let rings = state.rings.iter().copied().zip(events);
        device.rings = rings.map(|(ring, events)| Some((ring?, events))).collect();
        device.back_end.clone_from(&state.back_end);
        let inflight = state.inflight.as_ref().map(Inflight::load).transpose();
        device.inflight =
            inflight.map_err(|cause| device.failed("making the in-flight region").because(cause))?;
        Ok(device)
    }

    /// Adds the next ring.
    #[must_use]
    pub fn ring(mut self, ring: Ring, events: RingEvents) -> Self {
        self.rings.push(Some((ring, events)));
        self
    }

    /// Leaves out the next ring: the guest has not set it up, as firmware that needs one ring of
    /// several. The back-end is told nothing of it.
    #[must_use]
    pub fn no_ring(mut self) -> Self {
        self.rings.push(None);
        self
    }

    /// Lets a device migrate whose back-end cannot log. As long as it runs, every page of the
    /// guest's memory that its [`VhostDevices`](super::VhostDevices) has counts as written, at each
    /// sync. Rounds do not get smaller by that: stop it before the last of them, or set limits that
    /// let the guest be paused for as long as all of this memory takes. A device that reaches less
    /// than all memory goes into a `VhostDevices` of its own, with the regions that it reaches.
    #[must_use]
    pub fn without_log(mut self) -> Self {
        self.unlogged = true;
        self
    }

    /// The region in which the back-end keeps track of requests: it goes with the guest.
    #[must_use]
    pub fn inflight(mut self, inflight: Inflight) -> Self {
        self.inflight = Some(inflight);
        self
    }

    /// Declares that the embedder has given the back-end features, memory and rings, and that the
    /// rings added so far run, but for those that are not enabled.
    #[must_use]
    pub fn running(mut self) -> Self {
        (self.phase, self.has_memory, self.has_run) = (DevicePhase::Running, true, true);
        self.halted = self.rings_by(|_, ring| !ring.enabled).map(|(index, _)| index).collect();
        self
    }

    /// Says that the device does every request by itself, as disks and file systems do, and unlike
    /// the receive ring of a network card. Then [`VhostDevices::stop`](super::VhostDevices::stop)
    /// waits for all requests that the guest has made, before it stops the rings. There are
    /// back-ends that need it: qemu-storage-daemon 10.0 answers GET_VRING_BASE at once, and never
    /// reports the requests as done that were in flight.
    #[must_use]
    pub fn finishes_requests(mut self) -> Self {
        self.finishes = true;
        self
    }

    pub(super) fn check_rings(&self) -> Result<(), VhostError> {
        let packed = self.features & RING_PACKED != 0;
        self.rings_by(|_, _| true).try_for_each(|(index, ring)| {
            check_ring_size(ring.size, packed)
                .map_err(|wrong| self.failed(format!("adding its ring {index}")).because(wrong))
        })
    }

    fn check_features(&self, state: &VhostState) -> Result<(), VhostError> {
        let offered = self.offered()?;
        let here = self.front_end.protocol_features();
        let inner = if state.back_end.is_some() { DEVICE_STATE } else { 0 };
        let lasting = state.protocol_features & LASTING_PROTOCOL_FEATURES | inner;
        for (kind, needed, here) in
            [("features", self.features, offered), ("protocol features", lasting, here)]
        {
            let missing = needed & !here;
            if missing != 0 {
                let text = format!(
                    "the state needs {kind} {needed:#x}, its back-end here has {here:#x}: not {missing:#x}"
                );
                return Err(self.failed(text));
            }
        }
        Ok(())
    }

    pub(super) fn offered(&self) -> Result<u64, VhostError> {
        self.front_end.get_features().map_err(|cause| self.failed("asking for its features").because(cause))
    }

    pub(super) fn failed(&self, doing: impl Into<String>) -> VhostError {
        VhostError::of_device(&self.name, doing)
    }

    /// The features that the back-end gets: the guest's, and those of the vhost protocol.
    fn all_features(&self) -> u64 {
        let protocol = if self.front_end.protocol_features() == 0 { 0 } else { PROTOCOL_FEATURES };
        let log = if self.log.is_some() { LOG_ALL } else { 0 };
        self.features | protocol | log
    }

    pub(super) fn tell_features(&self) -> Result<(), VhostError> {
        let features = self.all_features();
        self.front_end
            .set_features(features)
            .map_err(|cause| self.failed(format!("setting features {features:#x}")).because(cause))
    }

    pub(super) fn tell_log(&self, log: &SharedLog) -> Result<(), VhostError> {
        let text = || format!("sharing a log of {} bytes", log.len());
        self.front_end.share_log(log).map_err(|cause| self.failed(text()).because(cause))
    }

    /// The stopped rings.
    pub(super) fn halted_rings(&self) -> impl Iterator<Item = (usize, &Ring)> {
        self.rings_by(move |index, _| self.halted.contains(&index))
    }

    /// The stopped rings that the guest uses.
    pub(super) fn waiting_rings(&self) -> impl Iterator<Item = (usize, &Ring)> {
        self.halted_rings().filter(|(_, ring)| ring.enabled)
    }

    /// The rings that may run.
    pub(super) fn live_rings(&self) -> impl Iterator<Item = (usize, &Ring)> {
        self.rings_by(move |index, _| !self.halted.contains(&index))
    }

    /// Those of the rings that are there.
    pub(super) fn rings_by(
        &self,
        mine: impl Fn(usize, &Ring) -> bool,
    ) -> impl Iterator<Item = (usize, &Ring)> {
        let rings = self.rings.iter().enumerate();
        let rings = rings.filter_map(|(index, ring)| ring.as_ref().map(|(ring, _)| (index, ring)));
        rings.filter(move |(index, ring)| mine(*index, ring))
    }

    pub(super) fn tell_addresses<'a>(
        &self,
        rings: impl Iterator<Item = (usize, &'a Ring)>,
        regions: &[VhostRegion],
    ) -> Result<(), VhostError> {
        for (index, ring) in rings {
            let config = self.config(index, ring, regions)?;
            self.front_end.set_vring_addr(index, &config).map_err(|cause| {
                self.failed(format!("setting the addresses of ring {index}")).because(cause)
            })?;
        }
        Ok(())
    }

    /// Stopped rings get theirs when they start.
    pub(super) fn tell_running_addresses(&self, regions: &[VhostRegion]) -> Result<(), VhostError> {
        if self.phase == DevicePhase::Running {
            self.tell_addresses(self.live_rings(), regions)
        } else {
            Ok(())
        }
    }

    fn config(
        &self,
        index: usize,
        ring: &Ring,
        regions: &[VhostRegion],
    ) -> Result<VringConfigData, VhostError> {
        let [descriptors, available, used] = self.lens(ring);
        let address = |at: GuestAddress, len: u64| {
            let host = region::host_address(regions, at, len).ok_or_else(|| {
                let at = at.raw_value();
                self.failed(format!("ring {index}: {len} bytes at {at:#x} are not in the guest's memory"))
            })?;
            Ok::<_, VhostError>(self.front_end.ring_address(at, host))
        };
        Ok(VringConfigData {
            queue_max_size: ring.size,
            queue_size: ring.size,
            flags: if self.log.is_some() { RING_LOGS } else { 0 },
            desc_table_addr: address(ring.descriptors, descriptors)?,
            avail_ring_addr: address(ring.available, available)?,
            used_ring_addr: address(ring.used, used)?,
            log_addr: Some(ring.used.raw_value()),
        })
    }

    /// Bytes of a ring's three parts, by the virtio specification: descriptors, available, used. A
    /// packed ring has event structures for the latter two.
    pub(super) fn lens(&self, ring: &Ring) -> [u64; 3] {
        let size = u64::from(ring.size);
        let (available, used) =
            if self.features & RING_PACKED != 0 { (4, 4) } else { (6 + 2 * size, 6 + 8 * size) };
        [16 * size, available, used]
    }
}
