//! The devices of a guest that share a log, around a migration.

use std::sync::{Arc, Mutex, MutexGuard};

use vmm_sys_util::eventfd::EventFd;

use super::announce::Announcement;
use super::device::VhostDevice;
use super::dirty_log::VhostLog;
use super::error::VhostError;
use super::front_end::VhostFrontEnd;
use super::life::Device;
use super::region::{self, VhostRegion};
use super::shared_log::RunLog;
use super::state::VhostState;
use crate::dirty::DirtyLogError;
use crate::guest::{DirtyBitmap, RamBlock};
use crate::run::stop::lock;

/// The vhost devices of a guest, and the memory that they all see. They share one log; devices that
/// shall have one of their own go into a `VhostDevices` of their own. Cheap to clone: a handle, for
/// any thread.
///
/// ```text
///   source                                            destination
///   start ... the guest runs
///   Source::connect with log(): blockers, log on      VhostDevice::load(state), add
///   Precopy::round: sync, sync, ...                   Arrived::accept
///   vCPUs are paused                                  start: the rings go on
///   stop: GET_VRING_BASE, now nothing more is written announce
///   Precopy::stop_copy: the last sync
///   state, StopCopy::commit
///   (failed, cancelled: the log is off; start: the rings go on)
/// ```
#[derive(Clone)]
pub struct VhostDevices(Arc<Mutex<Group>>);

/// What a handle and the log share.
pub(super) struct Group {
    regions: Vec<VhostRegion>,
    devices: Vec<Box<dyn Device>>,
    log_event: Option<Arc<EventFd>>,
    pub(super) migration: Option<Logging>,
}

/// A migration's log.
pub(super) struct Logging {
    ram: Vec<RamBlock>,
    pub(super) log: RunLog,
    /// Logs that no back-end writes to, not read yet.
    pub(super) retired: Vec<RunLog>,
    /// Why the back-ends' writes are no longer known; `None`: they are.
    pub(super) lost: Option<String>,
}

impl VhostDevices {
    /// No devices yet. `regions`: all guest memory that they may reach.
    ///
    /// # Errors
    /// A region outside of its block, or overlaps another.
    pub fn new(regions: Vec<VhostRegion>) -> Result<Self, VhostError> {
        region::check(&regions).map_err(VhostError::of_memory)?;
        let group = Group { regions, devices: Vec::new(), log_event: None, migration: None };
        Ok(Self(Arc::new(Mutex::new(group))))
    }

    /// Has back-ends signal `event` when they log something (SET_LOG_FD). Nothing here needs it.
    pub fn log_event(&self, event: EventFd) {
        self.group().log_event = Some(Arc::new(event));
    }

    /// Adds a device, also while a migration runs: then it logs from now on.
    ///
    /// # Errors
    /// There is one of that name, or it cannot be logged while it must, or one of its rings has a
    /// size that no ring can have.
    pub fn add<F: VhostFrontEnd + 'static>(&self, device: VhostDevice<F>) -> Result<(), VhostError> {
        device.check_rings()?;
        self.group().add(Box::new(device))
    }

    /// Stops a device and forgets it. What it has written stays in the log.
    ///
    /// # Errors
    /// There is none of that name, or it does not stop; then it is removed nevertheless, and a
    /// migration that runs will fail.
    pub fn remove(&self, name: &str) -> Result<(), VhostError> {
        self.group().remove(name)
    }

    /// Starts every stopped device where its rings stopped: after the move at the destination,
    /// after a failure at the source.
    ///
    /// # Errors
    /// The first device that does not; the others run. It is stopped again if possible. A migration
    /// that runs will fail.
    pub fn start(&self) -> Result<(), VhostError> {
        let mut group = self.group();
        group.each(|device, regions| device.start(regions)).or_else(|error| group.lose(error))
    }

    /// Stops every ring. The vCPUs are paused already; when this has returned without an error,
    /// nothing writes guest memory any more, and the last sync
    /// ([`Precopy::stop_copy`](crate::Precopy::stop_copy)) finds all of it. Takes as long as the
    /// requests in flight, and is downtime.
    ///
    /// # Errors
    /// The first device that does not stop; the others are stopped. So may be some of its own
    /// rings: [`start`](Self::start) lets them go on.
    pub fn stop(&self) -> Result<(), VhostError> {
        self.group().each(|device, regions| device.stop(regions))
    }

    /// Changes the guest memory that devices reach: adds, removes, resizes regions, also while a
    /// migration runs. Tell the guest of new memory after this has returned; memory that is removed
    /// must have been taken from the guest before.
    ///
    /// # Errors
    /// Wrong regions: nothing is changed. A back-end that does not take a larger log: no memory is
    /// changed, and a migration that runs will fail. A back-end that does not follow: a migration
    /// that runs will fail.
    pub fn change_regions(&self, regions: Vec<VhostRegion>) -> Result<(), VhostError> {
        region::check(&regions).map_err(VhostError::of_memory)?;
        self.group().change_regions(regions)
    }

    /// Has a device use a ring, or not: the guest has changed the number of its queue pairs.
    /// Instead of SET_VRING_ENABLE by the embedder: what is enabled is part of the device's state.
    ///
    /// # Errors
    /// There is no such device or ring, or its back-end does not do it; then a migration that runs
    /// will fail.
    pub fn enable_ring(&self, name: &str, index: usize, on: bool) -> Result<(), VhostError> {
        self.group().enable_ring(name, index, on)
    }

    /// The log of these devices, for one migration after the other:
    /// [`SourceBuilder::dirty_log`](crate::SourceBuilder).
    pub fn log(&self) -> VhostLog {
        VhostLog::new(Arc::clone(&self.0))
    }

    /// Why the guest cannot migrate now: devices whose back-ends cannot log. A migration asks this
    /// before anything is sent.
    pub fn blockers(&self) -> Vec<VhostError> {
        self.group().devices.iter().filter_map(|device| device.blocker().err()).collect()
    }

    /// The state of a stopped device, which goes with the guest.
    ///
    /// # Errors
    /// There is none of that name, or it runs.
    pub fn state(&self, name: &str) -> Result<VhostState, VhostError> {
        self.group().find(name)?.state()
    }

    /// Announces a guest's network address after the move, or returns who has to.
    ///
    /// # Errors
    /// There is no device of that name, or its back-end refuses.
    pub fn announce(&self, name: &str, mac: [u8; 6]) -> Result<Announcement, VhostError> {
        self.group().find(name)?.announce(mac)
    }

    fn group(&self) -> MutexGuard<'_, Group> {
        lock(&self.0)
    }
}

impl Group {
    fn add(&mut self, mut device: Box<dyn Device>) -> Result<(), VhostError> {
        if self.find(device.name()).is_ok() {
            return Err(VhostError::of_device(device.name(), "there is one of this name already"));
        }
        if let Some(logging) = &self.migration {
            let (log, event) = (&logging.log.log, self.log_event.as_deref());
            let logged = device.blocker().and_then(|()| device.log_on(log, event, &self.regions));
            if let Err(error) = logged {
                return if device.is_stopped() { Err(error) } else { self.lose(error) };
            }
        }
        self.devices.push(device);
        Ok(())
    }

    fn remove(&mut self, name: &str) -> Result<(), VhostError> {
        let at = self.devices.iter().position(|device| device.name() == name);
        let mut device = self.devices.remove(at.ok_or_else(|| unknown(name))?);
        device.stop(&self.regions).or_else(|error| self.lose(error))?;
        device.log_off(&self.regions)
    }

    fn enable_ring(&mut self, name: &str, index: usize, on: bool) -> Result<(), VhostError> {
        let device = self.devices.iter_mut().find(|device| device.name() == name);
        let device = device.ok_or_else(|| unknown(name))?;
        device.enable_ring(index, on, &self.regions).or_else(|error| self.lose(error))
    }

    /// Notes that writes may be missing from every log: a running migration must fail.
    fn lose(&mut self, error: VhostError) -> Result<(), VhostError> {
        if let Some(logging) = &mut self.migration {
            logging.lost.get_or_insert_with(|| error.chain());
        }
        Err(error)
    }

    fn find(&self, name: &str) -> Result<&dyn Device, VhostError> {
        let device = self.devices.iter().find(|device| device.name() == name);
        device.map(|device| &**device).ok_or_else(|| unknown(name))
    }

    /// Does it with all, whatever one of them says; the first error.
    fn each(
        &mut self,
        mut act: impl FnMut(&mut dyn Device, &[VhostRegion]) -> Result<(), VhostError>,
    ) -> Result<(), VhostError> {
        let mut result = Ok(());
        for device in &mut self.devices {
            let done = act(&mut **device, &self.regions);
            result = result.and(done);
        }
        result
    }

    fn change_regions(&mut self, new: Vec<VhostRegion>) -> Result<(), VhostError> {
        let old = self.regions.clone();
        let both = [&old[..], &new].concat();
        // While a migration runs: a log that is long enough for both, then the memory, then a log
        // that is read as the new memory lies. What was logged before each step is read as the
        // memory lay then.
        self.exchange_log(&old, &both).or_else(|error| self.lose(error))?;
        self.regions.clone_from(&new);
        self.each(|device, _| device.change_memory(&old, &new))
            .and_then(|()| self.exchange_log(&new, &both))
            .or_else(|error| self.lose(error))
    }

    fn exchange_log(&mut self, runs: &[VhostRegion], sized_for: &[VhostRegion]) -> Result<(), VhostError> {
        let Some(logging) = &mut self.migration else { return Ok(()) };
        let log = RunLog::new(runs, sized_for, &logging.ram)
            .map_err(|cause| VhostError::of_memory("exchanging the log").because(cause))?;
        logging.retired.push(std::mem::replace(&mut logging.log, log));
        let log = Arc::clone(&logging.log.log);
        self.each(|device, _| device.log_into(&log))
    }

    pub(super) fn start_log(&mut self, ram: &[RamBlock]) -> Result<(), DirtyLogError> {
        if self.migration.is_some() {
            return Err(DirtyLogError::new("the vhost devices serve another migration"));
        }
        for device in &self.devices {
            device.blocker().map_err(DirtyLogError::from)?;
        }
        let log = RunLog::new(&self.regions, &self.regions, ram)?;
        let (shared, event) = (Arc::clone(&log.log), self.log_event.clone());
        self.migration = Some(Logging { ram: ram.to_vec(), log, retired: Vec::new(), lost: None });
        let regions = &self.regions;
        let mut devices = self.devices.iter_mut();
        devices
            .try_for_each(|device| device.log_on(&shared, event.as_deref(), regions))
            .map_err(DirtyLogError::from)
    }

    /// Ends the log: the guest runs on, or has moved.
    pub(super) fn stop_log(&mut self) {
        self.migration = None;
        for device in &mut self.devices {
            if let Err(error) = device.log_off(&self.regions) {
                // It goes on logging, which costs time and does no harm; or it is gone.
                tracing::warn!(error = error.chain(), "the log stays on");
            }
        }
    }

    /// Takes what back-ends that cannot log may have written since the last call: everything.
    pub(super) fn mark_unlogged(&mut self, bitmaps: &[Arc<DirtyBitmap>]) -> Result<(), DirtyLogError> {
        // Each is asked, also behind one that has.
        let any = self.devices.iter_mut().fold(false, |any, device| device.take_unlogged() | any);
        match &self.migration {
            Some(logging) if any => logging.log.mark_all(bitmaps),
            _ => Ok(()),
        }
    }

    /// Fails unless what the log says is all there is.
    pub(super) fn check_log(&self) -> Result<(), DirtyLogError> {
        if let Some(lost) = self.migration.as_ref().and_then(|logging| logging.lost.as_ref()) {
            return Err(DirtyLogError::new(format!("what vhost devices write is not known since {lost}")));
        }
        self.devices.iter().try_for_each(|device| device.check_connected()).map_err(DirtyLogError::from)
    }

    pub(super) fn check_stopped(&self) -> Result<(), DirtyLogError> {
        match self.devices.iter().find(|device| !device.is_stopped()) {
            Some(device) => Err(DirtyLogError::new(format!(
                "vhost device {} still runs: it must be stopped before the last sync",
                device.name()
            ))),
            None => Ok(()),
        }
    }
}

impl std::fmt::Debug for VhostDevices {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let group = self.group();
        let names: Vec<_> = group.devices.iter().map(|device| device.name().to_owned()).collect();
        f.debug_tuple("VhostDevices").field(&names).finish()
    }
}

fn unknown(name: &str) -> VhostError {
    VhostError::of_device(name, "there is none of this name")
}
