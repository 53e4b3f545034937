//! What a device goes through: start, stop, a migration's log, new memory.

use std::sync::Arc;
use std::time::{Duration, Instant};

use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;

use super::announce::{Announcement, GUEST_ANNOUNCE};
use super::device::{DevicePhase, LOG_ALL, VhostDevice};
use super::error::VhostError;
use super::front_end::VhostFrontEnd;
use super::region::{self, VhostRegion};
use super::shared_log::SharedLog;
use super::state::{Inflight, RING_PACKED, Ring, VhostState};

/// Between two looks at a used ring.
const POLL: Duration = Duration::from_micros(100);

/// A device of any back-end, as the others need it.
pub(super) trait Device: Send {
    fn name(&self) -> &str;
    fn is_stopped(&self) -> bool;
    /// An error if the device cannot migrate.
    fn blocker(&self) -> Result<(), VhostError>;
    fn start(&mut self, regions: &[VhostRegion]) -> Result<(), VhostError>;
    /// Returns when the back-end has stopped writing.
    fn stop(&mut self, regions: &[VhostRegion]) -> Result<(), VhostError>;
    /// Turns the log on: all that is written after this is in `log`.
    fn log_on(
        &mut self,
        log: &Arc<SharedLog>,
        event: Option<&EventFd>,
        regions: &[VhostRegion],
    ) -> Result<(), VhostError>;
    /// Moves a device that logs already to another log.
    fn log_into(&mut self, log: &Arc<SharedLog>) -> Result<(), VhostError>;
    fn log_off(&mut self, regions: &[VhostRegion]) -> Result<(), VhostError>;
    fn change_memory(&mut self, old: &[VhostRegion], new: &[VhostRegion]) -> Result<(), VhostError>;
    /// Has the device use a ring, or not.
    fn enable_ring(&mut self, index: usize, on: bool, regions: &[VhostRegion]) -> Result<(), VhostError>;
    /// True if it may have written since the last call what no log has.
    fn take_unlogged(&mut self) -> bool;
    fn check_connected(&self) -> Result<(), VhostError>;
    fn state(&self) -> Result<VhostState, VhostError>;
    fn announce(&self, mac: [u8; 6]) -> Result<Announcement, VhostError>;
}

impl<F: VhostFrontEnd> Device for VhostDevice<F> {
    fn name(&self) -> &str {
        &self.name
    }

    fn is_stopped(&self) -> bool {
        self.phase == DevicePhase::Stopped
    }

    fn blocker(&self) -> Result<(), VhostError> {
        if self.unlogged {
            return Ok(());
        }
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
        if self.phase != DevicePhase::Running {
            self.prepare(regions)?;
            self.halted = self.rings_by(|_, _| true).map(|(index, _)| index).collect();
        }
        self.prepare_rings(regions)?;
        // Once the first ring is enabled, the device may write guest memory.
        (self.phase, self.has_run) = (DevicePhase::Running, true);
        self.start_rings(regions)
    }

    fn stop(&mut self, regions: &[VhostRegion]) -> Result<(), VhostError> {
        let index = |area: GuestAddress| index_of(area, regions);
        let done = |ring: &Ring| index(ring.used);
        if self.phase == DevicePhase::Running {
            if self.finishes {
                let left = |ring: &Ring| Some(index(ring.available)?.wrapping_sub(done(ring)?));
                self.wait_for(self.live_rings(), "are not done", left)?;
            }
            self.halt_rings()?;
        }
        if self.phase == DevicePhase::Halted {
            self.settle(self.waiting_rings(), regions)?;
            self.phase = DevicePhase::Stopped;
        }
        Ok(())
    }

    fn log_on(
        &mut self,
        log: &Arc<SharedLog>,
        event: Option<&EventFd>,
        regions: &[VhostRegion],
    ) -> Result<(), VhostError> {
        if self.unlogged {
            return Ok(());
        }
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
        if self.unlogged {
            return Ok(());
        }
        let before = self.log.replace(Arc::clone(log));
        let told = self.tell_log(log);
        if told.is_err() {
            self.keep_alive.extend(before);
        }
        told
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
        let halt = self.phase == DevicePhase::Running && self.front_end.stops_for_memory();
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

    fn enable_ring(&mut self, index: usize, on: bool, regions: &[VhostRegion]) -> Result<(), VhostError> {
        let known = self.rings.get(index).and_then(Option::as_ref);
        let (ring, _) = known.ok_or_else(|| self.failed(format!("it has no ring {index}")))?;
        if ring.enabled == on {
            return Ok(());
        }
        // Until it is stopped it is one that the guest uses.
        if self.phase == DevicePhase::Running && !on {
            self.halt_ring(index)?;
            self.settle(self.rings_by(|other, _| other == index), regions)?;
        }
        if let Some(Some((ring, _))) = self.rings.get_mut(index) {
            ring.enabled = on;
        }
        if self.phase == DevicePhase::Running && on {
            self.prepare_rings(regions)?;
            self.start_rings(regions)?;
        }
        Ok(())
    }

    fn take_unlogged(&mut self) -> bool {
        let has_run = self.has_run;
        self.has_run &= self.phase != DevicePhase::Stopped;
        self.unlogged && has_run
    }

    fn check_connected(&self) -> Result<(), VhostError> {
        self.front_end.check_connected().map_err(|cause| self.failed("its back-end is gone").because(cause))
    }

    fn state(&self) -> Result<VhostState, VhostError> {
        if self.phase != DevicePhase::Stopped {
            return Err(self.failed("it still runs: its state is known when it is stopped"));
        }
        let inflight = self.inflight.as_ref().map(Inflight::save).transpose();
        Ok(VhostState {
            features: self.features,
            protocol_features: self.front_end.protocol_features(),
            rings: self.rings.iter().map(|ring| ring.as_ref().map(|(ring, _)| *ring)).collect(),
            inflight: inflight.map_err(|cause| self.failed("reading its in-flight region").because(cause))?,
            back_end: self.back_end_state()?,
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

impl<F: VhostFrontEnd> VhostDevice<F> {
    /// Tells the back-end what it must know before any ring.
    fn prepare(&mut self, regions: &[VhostRegion]) -> Result<(), VhostError> {
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
        if let Some(state) = &self.back_end {
            let text = || format!("giving its back-end {} bytes of its own state", state.len());
            let given = self.front_end.load_state(state);
            given.map_err(|cause| self.failed(text()).because(cause))?;
            self.back_end = None;
        }
        Ok(())
    }

    /// The back-end's own state: what it has not been given yet, or what it says now.
    fn back_end_state(&self) -> Result<Option<Vec<u8>>, VhostError> {
        match &self.back_end {
            Some(state) => Ok(Some(state.clone())),
            // Before the first start, there is none.
            None if !self.has_memory => Ok(None),
            None => {
                let saved = self.front_end.save_state();
                saved.map_err(|cause| self.failed("asking its back-end for its own state").because(cause))
            }
        }
    }

    /// Rings that were stopped: waits for what is in flight, and marks what tells that it is done.
    fn settle<'a>(
        &self,
        rings: impl Iterator<Item = (usize, &'a Ring)>,
        regions: &[VhostRegion],
    ) -> Result<(), VhostError> {
        let rings: Vec<_> = rings.collect();
        // A split ring's base is 16 bits. With an in-flight region, what is in flight may go along
        // in it.
        let taken = |ring: &Ring| u16::try_from(ring.base).ok().filter(|_| self.inflight.is_none());
        let left = |ring: &Ring| Some(taken(ring)?.wrapping_sub(index_of(ring.used, regions)?));
        self.wait_for(rings.iter().copied(), "are in flight", left)?;
        if let Some(log) = &self.log {
            // The index may be there before its page is in the log.
            rings.iter().for_each(|(_, ring)| log.mark(ring.used, self.lens(ring)[2]));
        }
        Ok(())
    }

    /// Waits until none of `rings` has requests left that `left` counts; of split rings, which
    /// alone tell.
    fn wait_for<'a>(
        &self,
        rings: impl Iterator<Item = (usize, &'a Ring)>,
        what: &str,
        left: impl Fn(&Ring) -> Option<u16>,
    ) -> Result<(), VhostError> {
        let timeout = self.front_end.timeout();
        let deadline = Instant::now() + timeout;
        for (index, ring) in rings.filter(|_| self.features & RING_PACKED == 0) {
            while let Some(left) = left(ring).filter(|left| *left > 0) {
                if Instant::now() >= deadline {
                    return Err(
                        self.failed(format!("ring {index}: {left} requests {what} after {timeout:?}"))
                    );
                }
                self.check_connected()?;
                // A poll: back-ends that are being stopped do not signal, and the guest may have
                // told them not to.
                std::thread::park_timeout(POLL);
            }
        }
        Ok(())
    }

    /// Stops every ring that may run.
    fn halt_rings(&mut self) -> Result<(), VhostError> {
        let live: Vec<_> = self.live_rings().map(|(index, _)| index).collect();
        live.into_iter().try_for_each(|index| self.halt_ring(index))?;
        self.phase = DevicePhase::Halted;
        Ok(())
    }

    /// Stops a ring, and learns where. One that is halted already may not be asked again.
    fn halt_ring(&mut self, index: usize) -> Result<(), VhostError> {
        if self.halted.contains(&index) {
            return Ok(());
        }
        let front_end = &self.front_end;
        let base = front_end.switch_ring(index, false).and_then(|()| front_end.get_vring_base(index));
        let base = base.map_err(|cause| self.failed(format!("stopping ring {index}")).because(cause))?;
        if let Some(Some((ring, _))) = self.rings.get_mut(index) {
            ring.base = base;
        }
        self.halted.insert(index);
        Ok(())
    }

    /// Tells what the halted rings need that the guest uses, and where they go on. None of them
    /// runs yet.
    fn prepare_rings(&self, regions: &[VhostRegion]) -> Result<(), VhostError> {
        for (index, ring) in self.waiting_rings() {
            let size = self.front_end.set_vring_num(index, ring.size);
            let told = size.and_then(|()| self.front_end.set_ring_base(index, ring.base));
            told.map_err(|cause| self.failed("starting its rings").because(cause))?;
        }
        self.tell_addresses(self.waiting_rings(), regions)
    }

    /// Starts the halted rings that the guest uses: all of them, or, if they can be stopped again,
    /// none of the device.
    fn start_rings(&mut self, regions: &[VhostRegion]) -> Result<(), VhostError> {
        let waiting: Vec<_> = self.waiting_rings().map(|(index, _)| index).collect();
        for index in waiting {
            let Err(refusal) = self.start_ring(index) else { continue };
            // First the ring that may not run: its requests need not be waited for.
            let stopped = self.halt_ring(index).and_then(|()| self.stop(regions));
            if let Err(error) = stopped {
                tracing::warn!(error = error.chain(), "rings of a device that did not start may run");
            }
            return Err(refusal);
        }
        Ok(())
    }

    fn start_ring(&mut self, index: usize) -> Result<(), VhostError> {
        let Some(Some((_, events))) = self.rings.get(index) else { return Ok(()) };
        let told = self.front_end.set_vring_call(index, &events.call).and_then(|()| {
            // With its kick it may run, whatever the back-end answers.
            self.halted.remove(&index);
            self.front_end.set_vring_kick(index, &events.kick)?;
            self.front_end.switch_ring(index, true)
        });
        told.map_err(|cause| self.failed("starting its rings").because(cause))
    }
}

/// The index in a ring's available or used area.
fn index_of(area: GuestAddress, regions: &[VhostRegion]) -> Option<u16> {
    region::read_u16(regions, GuestAddress(area.0.saturating_add(2)))
}
