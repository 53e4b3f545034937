//! One device: its rings, and what its back-end is told when the guest's memory migrates.

use std::sync::Arc;
use std::time::{Duration, Instant};

use vhost::VringConfigData;
use vm_memory::{Address, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::announce::{Announcement, GUEST_ANNOUNCE};
use super::error::VhostError;
use super::front_end::VhostFrontEnd;
use super::region::{self, VhostRegion};
use super::shared_log::SharedLog;
use super::state::{Inflight, LASTING_PROTOCOL_FEATURES, RING_PACKED, Ring, VhostState};
use super::user::PROTOCOL_FEATURES;

/// VHOST_F_LOG_ALL: what a back-end that can log offers, and what turns its log on.
const LOG_ALL: u64 = 1 << 26;
/// VHOST_VRING_F_LOG: the used ring is logged, too.
const RING_LOGS: u32 = 1;

/// A device whose back-end reads and writes guest memory on its own.
///
/// ```text
///   new, load ──> standing ──start──> running ──stop──> standing: state() ──start──> running
///                                        │ a migration: log on, log off
/// ```
#[derive(Debug)]
pub struct VhostDevice<F> {
    name: String,
    front_end: F,
    /// What guest and device have agreed on.
    features: u64,
    rings: Vec<(Ring, RingEvents)>,
    inflight: Option<Inflight>,
    phase: Phase,
    finishes: bool,
    /// The back-end knows the guest's memory.
    has_memory: bool,
    /// Where the back-end logs, from when it is told until it has confirmed that it does not any more: the kernel writes there.
    log: Option<Arc<SharedLog>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Nothing of its writes any more.
    Standing,
    Running,
    /// Its rings are stopped, but it may not be done with what it took from them.
    Halted,
}

/// Between two looks at a used ring.
const POLL: Duration = Duration::from_micros(100);

/// How guest and back-end wake each other.
#[derive(Debug)]
pub struct RingEvents {
    /// The guest has made buffers available.
    pub kick: EventFd,
    /// The back-end has used buffers.
    pub call: EventFd,
}

impl<F: VhostFrontEnd> VhostDevice<F> {
    /// A device without rings that stands still. `features`: what its guest's driver has acknowledged. `name` is in every
    /// error.
    pub fn new(name: impl Into<String>, front_end: F, features: u64) -> Self {
        let (rings, inflight) = (Vec::new(), None);
        Self {
            name: name.into(),
            front_end,
            features,
            rings,
            inflight,
            phase: Phase::Standing,
            finishes: false,
            has_memory: false,
            log: None,
        }
    }

    /// The device that `state` tells of, standing still, on a back-end that fits. `events`: for each ring of it.
    ///
    /// # Errors
    /// The state needs features that the back-end does not offer, or other rings than there are.
    pub fn load(
        name: impl Into<String>,
        front_end: F,
        state: &VhostState,
        events: Vec<RingEvents>,
    ) -> Result<Self, VhostError> {
        let mut device = Self::new(name, front_end, state.features & !LOG_ALL);
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
        device.rings = state.rings.iter().copied().zip(events).collect();
        let inflight = state.inflight.as_ref().map(Inflight::load).transpose();
        device.inflight =
            inflight.map_err(|cause| device.failed("making the in-flight region").because(cause))?;
        Ok(device)
    }

    /// Adds the next ring.
    #[must_use]
    pub fn ring(mut self, ring: Ring, events: RingEvents) -> Self {
        self.rings.push((ring, events));
        self
    }

    /// The region in which the back-end keeps track of requests: it goes with the guest.
    #[must_use]
    pub fn inflight(mut self, inflight: Inflight) -> Self {
        self.inflight = Some(inflight);
        self
    }

    /// Says that the embedder has told the back-end features, memory and rings, and that the rings run.
    #[must_use]
    pub fn running(mut self) -> Self {
        (self.phase, self.has_memory) = (Phase::Running, true);
        self
    }

    /// Says that the device does every request by itself, as disks and file systems do, and unlike the receive ring of a
    /// network card. Then [`VhostDevices::stop`](super::VhostDevices::stop) waits for all requests that the guest has made,
    /// before it stops the rings. There are back-ends that need it: qemu-storage-daemon 10.0 answers GET_VRING_BASE at
    /// once, and drops the requests that it has not done.
    #[must_use]
    pub fn finishes_requests(mut self) -> Self {
        self.finishes = true;
        self
    }

    fn check_features(&self, state: &VhostState) -> Result<(), VhostError> {
        let offered = self.offered()?;
        let here = self.front_end.protocol_features();
        let lasting = state.protocol_features & LASTING_PROTOCOL_FEATURES;
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

    fn offered(&self) -> Result<u64, VhostError> {
        self.front_end.get_features().map_err(|cause| self.failed("asking for its features").because(cause))
    }

    fn failed(&self, doing: impl Into<String>) -> VhostError {
        VhostError::of_device(&self.name, doing)
    }

    /// What the back-end is told: the guest's features, and those that are between us and it.
    fn all_features(&self) -> u64 {
        let protocol = if self.front_end.protocol_features() == 0 { 0 } else { PROTOCOL_FEATURES };
        let log = if self.log.is_some() { LOG_ALL } else { 0 };
        self.features | protocol | log
    }

    fn tell_features(&self) -> Result<(), VhostError> {
        let features = self.all_features();
        self.front_end
            .set_features(features)
            .map_err(|cause| self.failed(format!("setting features {features:#x}")).because(cause))
    }

    fn tell_log(&self, log: &SharedLog) -> Result<(), VhostError> {
        let text = || format!("sharing a log of {} bytes", log.len());
        self.front_end.share_log(log).map_err(|cause| self.failed(text()).because(cause))
    }

    fn tell_addresses(&self, regions: &[VhostRegion]) -> Result<(), VhostError> {
        for (index, (ring, _)) in self.rings.iter().enumerate() {
            let config = self.config(index, ring, regions)?;
            self.front_end.set_vring_addr(index, &config).map_err(|cause| {
                self.failed(format!("setting the addresses of ring {index}")).because(cause)
            })?;
        }
        Ok(())
    }

    /// A ring that stands still is told when it starts.
    fn tell_running_addresses(&self, regions: &[VhostRegion]) -> Result<(), VhostError> {
        if self.phase == Phase::Running { self.tell_addresses(regions) } else { Ok(()) }
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

    /// Waits until no ring has requests left that `left` counts; of split rings, which alone tell.
    fn wait_for(&self, what: &str, left: impl Fn(&Ring) -> Option<u16>) -> Result<(), VhostError> {
        let patience = self.front_end.timeout();
        let deadline = Instant::now() + patience;
        for (index, (ring, _)) in self.rings.iter().enumerate().filter(|_| self.features & RING_PACKED == 0) {
            while let Some(left) = left(ring).filter(|left| *left > 0) {
                if Instant::now() >= deadline {
                    return Err(
                        self.failed(format!("ring {index}: {left} requests {what} after {patience:?}"))
                    );
                }
                // A poll: back-ends that are being stopped do not signal, and the guest may have told them not to.
                std::thread::park_timeout(POLL);
            }
        }
        Ok(())
    }

    /// Stops every ring, and learns where.
    fn halt_rings(&mut self) -> Result<(), VhostError> {
        for index in 0..self.rings.len() {
            let front_end = &self.front_end;
            let base = front_end.switch_ring(index, false).and_then(|()| front_end.get_vring_base(index));
            let base = base.map_err(|cause| self.failed(format!("stopping ring {index}")).because(cause))?;
            if let Some((ring, _)) = self.rings.get_mut(index) {
                ring.base = base;
            }
        }
        self.phase = Phase::Halted;
        Ok(())
    }

    /// Bytes of a ring's three parts, by the virtio specification: descriptors, available, used. A packed ring has event
    /// structures for the latter two.
    fn lens(&self, ring: &Ring) -> [u64; 3] {
        let size = u64::from(ring.size);
        let (available, used) =
            if self.features & RING_PACKED != 0 { (4, 4) } else { (6 + 2 * size, 6 + 8 * size) };
        [16 * size, available, used]
    }

    fn start_rings(&self, regions: &[VhostRegion]) -> vhost::Result<Result<(), VhostError>> {
        let front_end = &self.front_end;
        for (index, (ring, _)) in self.rings.iter().enumerate() {
            front_end.set_vring_num(index, ring.size)?;
            front_end.set_ring_base(index, ring.base)?;
        }
        if let Err(error) = self.tell_addresses(regions) {
            return Ok(Err(error));
        }
        for (index, (_, events)) in self.rings.iter().enumerate() {
            front_end.set_vring_call(index, &events.call)?;
            front_end.set_vring_kick(index, &events.kick)?;
            front_end.switch_ring(index, true)?;
        }
        Ok(Ok(()))
    }
}

/// A device of any back-end, as the others need it.
pub(super) trait Device: Send {
    fn name(&self) -> &str;
    fn standing(&self) -> bool;
    /// Why it cannot migrate.
    fn blocker(&self) -> Result<(), VhostError>;
    fn start(&mut self, regions: &[VhostRegion]) -> Result<(), VhostError>;
    /// Returns when the back-end writes nothing any more.
    fn stop(&mut self, regions: &[VhostRegion]) -> Result<(), VhostError>;
    /// Everything that is written after this is in `log`.
    fn log_on(
        &mut self,
        log: &Arc<SharedLog>,
        event: Option<&EventFd>,
        regions: &[VhostRegion],
    ) -> Result<(), VhostError>;
    /// The same for a device that logs elsewhere.
    fn log_into(&mut self, log: &Arc<SharedLog>) -> Result<(), VhostError>;
    fn log_off(&mut self, regions: &[VhostRegion]) -> Result<(), VhostError>;
    fn change_memory(&mut self, old: &[VhostRegion], new: &[VhostRegion]) -> Result<(), VhostError>;
    fn check_connected(&self) -> Result<(), VhostError>;
    fn state(&self) -> Result<VhostState, VhostError>;
    fn announce(&self, mac: [u8; 6]) -> Result<Announcement, VhostError>;
}

impl<F: VhostFrontEnd> Device for VhostDevice<F> {
    fn name(&self) -> &str {
        &self.name
    }

    fn standing(&self) -> bool {
        self.phase == Phase::Standing
    }

    fn blocker(&self) -> Result<(), VhostError> {
        let offered = self.offered()?;
        if offered & LOG_ALL == 0 {
            let text = format!(
                "cannot migrate: its back-end has no VHOST_F_LOG_ALL among its features {offered:#x}"
            );
            return Err(self.failed(text));
        }
        match self.front_end.log_obstacle() {
            Some(missing) => {
                Err(self.failed(format!("cannot migrate: {missing} is not negotiated with its back-end")))
            }
            None => Ok(()),
        }
    }

    fn start(&mut self, regions: &[VhostRegion]) -> Result<(), VhostError> {
        if self.phase == Phase::Running {
            return Ok(());
        }
        self.tell_features()?;
        if !self.has_memory {
            let told = self.front_end.change_memory(&[], regions);
            told.map_err(|cause| self.failed("sharing the guest's memory").because(cause))?;
            self.has_memory = true;
            self.log.as_ref().map_or(Ok(()), |log| self.tell_log(log))?;
        }
        if let Some(inflight) = &self.inflight {
            let shared = self.front_end.share_inflight(inflight);
            shared.map_err(|cause| self.failed("sharing the in-flight region").because(cause))?;
        }
        self.start_rings(regions).map_err(|cause| self.failed("starting its rings").because(cause))??;
        self.phase = Phase::Running;
        Ok(())
    }

    fn stop(&mut self, regions: &[VhostRegion]) -> Result<(), VhostError> {
        let index = |area: GuestAddress| region::read_u16(regions, GuestAddress(area.0.saturating_add(2)));
        let done = |ring: &Ring| index(ring.used);
        if self.phase == Phase::Running {
            if self.finishes {
                self.wait_for("are not done", |ring| Some(index(ring.available)?.wrapping_sub(done(ring)?)))?;
            }
            self.halt_rings()?;
        }
        if self.phase == Phase::Halted {
            // A split ring's base is 16 bits. With an in-flight region, what is in flight may go along in it.
            let taken = |ring: &Ring| u16::try_from(ring.base).ok().filter(|_| self.inflight.is_none());
            self.wait_for("are in flight", |ring| Some(taken(ring)?.wrapping_sub(done(ring)?)))?;
            if let Some(log) = &self.log {
                // The index may be there before its page is in the log.
                self.rings.iter().for_each(|(ring, _)| log.mark(ring.used, self.lens(ring)[2]));
            }
            self.phase = Phase::Standing;
        }
        Ok(())
    }

    fn log_on(
        &mut self,
        log: &Arc<SharedLog>,
        event: Option<&EventFd>,
        regions: &[VhostRegion],
    ) -> Result<(), VhostError> {
        self.log_into(log)?;
        if let Some(event) = event {
            let fd = std::os::fd::AsRawFd::as_raw_fd(event);
            let set = self.front_end.set_log_fd(fd);
            set.map_err(|cause| self.failed("setting the log's eventfd").because(cause))?;
        }
        self.tell_features()?;
        self.tell_running_addresses(regions)
    }

    fn log_into(&mut self, log: &Arc<SharedLog>) -> Result<(), VhostError> {
        let before = self.log.replace(Arc::clone(log));
        // On an error, where it logs is not known: the one before must stay as well.
        self.tell_log(log).inspect_err(|_| std::mem::forget(before))
    }

    fn log_off(&mut self, regions: &[VhostRegion]) -> Result<(), VhostError> {
        let Some(log) = self.log.take() else { return Ok(()) };
        let off = self.tell_features().and_then(|()| self.tell_running_addresses(regions));
        off.inspect_err(|_| self.log = Some(log))
    }

    fn change_memory(&mut self, old: &[VhostRegion], new: &[VhostRegion]) -> Result<(), VhostError> {
        if !self.has_memory {
            return Ok(());
        }
        let halt = self.phase == Phase::Running && self.front_end.stops_for_memory();
        if halt {
            self.stop(old)?;
        }
        let changed = self.front_end.change_memory(old, new);
        changed.map_err(|cause| self.failed("changing the guest's memory").because(cause))?;
        if halt {
            // Some back-ends forget with the memory where to log it.
            self.log.as_ref().map_or(Ok(()), |log| self.tell_log(log))?;
            self.start(new)?;
        }
        Ok(())
    }

    fn check_connected(&self) -> Result<(), VhostError> {
        self.front_end.check_connected().map_err(|cause| self.failed("its back-end is gone").because(cause))
    }

    fn state(&self) -> Result<VhostState, VhostError> {
        if self.phase != Phase::Standing {
            return Err(self.failed("it still runs: its state is known when it is stopped"));
        }
        let inflight = self.inflight.as_ref().map(Inflight::save).transpose();
        Ok(VhostState {
            features: self.features,
            protocol_features: self.front_end.protocol_features(),
            rings: self.rings.iter().map(|(ring, _)| *ring).collect(),
            inflight: inflight.map_err(|cause| self.failed("reading its in-flight region").because(cause))?,
        })
    }

    fn announce(&self, mac: [u8; 6]) -> Result<Announcement, VhostError> {
        if self.features & GUEST_ANNOUNCE != 0 {
            return Ok(Announcement::ByGuest);
        }
        let sent = self.front_end.send_rarp(mac);
        match sent.map_err(|cause| self.failed("announcing the guest's address").because(cause))? {
            true => Ok(Announcement::ByBackEnd),
            false => Ok(Announcement::ByEmbedder),
        }
    }
}
