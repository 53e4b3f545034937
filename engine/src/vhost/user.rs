//! A device in a vhost-user process.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use vhost::vhost_user::message::{FrontendReq, VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost::vhost_user::{Error as UserError, Frontend};
use vhost::{
    Error, Result, VhostBackend, VhostUserDirtyLogRegion, VhostUserMemoryRegionBase,
    VhostUserMemoryRegionInfo, VringConfigData,
};
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;

use super::back_end_state;
use super::front_end::{DEFAULT_TIMEOUT, VhostFrontEnd};
use super::message::Connection;
use super::postcopy::{self, BackEnd};
use super::region::VhostRegion;
use super::shared_log::SharedLog;
use super::state::Inflight;

/// Most regions of one SET_MEM_TABLE, by the protocol.
pub(super) const TABLE: usize = 8;

/// A vhost-user back-end, over the connection of a [`Frontend`].
///
/// The embedder has made the connection, and negotiated protocol features: that is what
/// [`Frontend`] is for. This one says what a migration has to say, and waits for every answer, but
/// not for ever. Only one of the two may be at it at a time. After a missing answer the connection
/// cannot be used any more; every call fails with that.
#[derive(Debug)]
pub struct VhostUser {
    connection: Arc<Connection>,
    features: VhostUserProtocolFeatures,
    /// The same back-end as one that takes part in a post-copy.
    postcopy: OnceLock<Arc<BackEnd>>,
}

impl VhostUser {
    /// Uses the connection of `front_end`, on which `features` have been negotiated: LOG_SHMFD for
    /// a log, REPLY_ACK for errors that say what was refused, RARP, MQ, CONFIGURE_MEM_SLOTS,
    /// INFLIGHT_SHMFD, DEVICE_STATE as there are.
    ///
    /// # Errors
    /// The process has no descriptors left.
    pub fn new(front_end: &Frontend, features: VhostUserProtocolFeatures) -> io::Result<Self> {
        let acks = features.contains(VhostUserProtocolFeatures::REPLY_ACK);
        let connection = Arc::new(Connection::over(front_end, acks, DEFAULT_TIMEOUT)?);
        Ok(Self { connection, features, postcopy: OnceLock::new() })
    }

    /// The longest wait for an answer. Default: 10 s. GET_VRING_BASE is answered only when the
    /// requests in flight are done, and is part of the downtime. In a post-copy, it does not count
    /// while a thread of the back-end's waits for a page of the guest's.
    #[must_use]
    pub fn timeout(self, timeout: Duration) -> Self {
        self.connection.set_timeout(timeout);
        self
    }

    /// The back-end as one that takes part in a post-copy. `None`: it does already.
    pub(super) fn join_postcopy(&self, name: &str) -> Option<Arc<BackEnd>> {
        let faults = self.has(VhostUserProtocolFeatures::PAGEFAULT);
        let back_end = Arc::new(BackEnd::new(name, Arc::clone(&self.connection), faults));
        self.postcopy.set(Arc::clone(&back_end)).ok().map(|()| back_end)
    }

    /// True while the back-end's memory has missing pages.
    fn has_missing_pages(&self) -> bool {
        self.postcopy.get().is_some_and(|back_end| back_end.is_listening())
    }

    fn has(&self, feature: VhostUserProtocolFeatures) -> bool {
        self.features.contains(feature)
    }

    fn tell(&self, request: FrontendReq, body: &[u8], fds: &[RawFd]) -> Result<()> {
        self.connection.tell(request, body, fds).map_err(failed)
    }

    fn tell_ring(&self, request: FrontendReq, index: usize, value: u32) -> Result<()> {
        self.tell(request, &ring_state(index, value)?, &[])
    }

    fn tell_event(&self, request: FrontendReq, index: usize, event: &EventFd) -> Result<()> {
        // Bits 0-7: the ring. Bit 8 would say that no descriptor comes along.
        let index = u8::try_from(index).map_err(|_| Error::InvalidQueue)?;
        self.tell(request, &u64::from(index).to_ne_bytes(), &[event.as_raw_fd()])
    }

    /// One region at a time: what stays keeps its mapping, and the log of it.
    fn change_slots(&self, old: &[VhostRegion], new: &[VhostRegion]) -> Result<()> {
        let (old, new) = (infos(old), infos(new));
        let missing_in = |others: &[VhostUserMemoryRegionInfo], info: &VhostUserMemoryRegionInfo| {
            !others.iter().any(|other| region_bytes(other) == region_bytes(info))
        };
        let slot = |info| [&0_u64.to_ne_bytes()[..], &region_bytes(info)].concat();
        for info in old.iter().filter(|info| missing_in(&new, info)) {
            self.tell(FrontendReq::REM_MEM_REG, &slot(info), &[])?;
        }
        for info in new.iter().filter(|info| missing_in(&old, info)) {
            self.tell(FrontendReq::ADD_MEM_REG, &slot(info), &[mappable(info)?])?;
        }
        Ok(())
    }
}

impl VhostFrontEnd for VhostUser {
    fn timeout(&self) -> Duration {
        self.connection.timeout()
    }

    fn protocol_features(&self) -> u64 {
        self.features.bits()
    }

    fn log_obstacle(&self) -> Option<&'static str> {
        (!self.has(VhostUserProtocolFeatures::LOG_SHMFD)).then_some("VHOST_USER_PROTOCOL_F_LOG_SHMFD")
    }

    fn ring_limit(&self) -> Result<Option<u64>> {
        match self.has(VhostUserProtocolFeatures::MQ) {
            true => self.connection.ask_u64(FrontendReq::GET_QUEUE_NUM).map(Some).map_err(failed),
            false => Ok(None),
        }
    }

    fn share_log(&self, log: &SharedLog) -> Result<()> {
        let region = VhostUserDirtyLogRegion {
            mmap_size: log.len(),
            mmap_offset: 0,
            mmap_handle: log.file().as_raw_fd(),
        };
        self.set_log_base(0, Some(region))
    }

    fn change_memory(&self, old: &[VhostRegion], new: &[VhostRegion]) -> Result<()> {
        // What it has by a post-copy is all that it is told of.
        if let Some(back_end) = self.postcopy.get()
            && back_end.shares(new).map_err(failed)?
        {
            return Ok(());
        }
        postcopy::refuse_missing(new).map_err(failed)?;
        let slots = self.has(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS);
        if slots && (!old.is_empty() || new.len() > TABLE) {
            return self.change_slots(old, new);
        }
        self.set_mem_table(&infos(new)).map(drop)
    }

    fn stops_for_memory(&self) -> bool {
        !self.has(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS) || self.has_missing_pages()
    }

    fn ring_address(&self, _: GuestAddress, host: u64) -> u64 {
        host
    }

    fn switch_ring(&self, index: usize, on: bool) -> Result<()> {
        // Without protocol features, the kick starts a ring. GET_VRING_BASE stops it in both cases.
        match on && !self.features.is_empty() {
            true => self.tell_ring(FrontendReq::SET_VRING_ENABLE, index, 1),
            false => Ok(()),
        }
    }

    fn set_ring_base(&self, index: usize, base: u32) -> Result<()> {
        self.tell_ring(FrontendReq::SET_VRING_BASE, index, base)
    }

    fn check_connected(&self) -> Result<()> {
        self.connection.check().map_err(failed)
    }

    fn send_rarp(&self, mac: [u8; 6]) -> Result<bool> {
        if !self.has(VhostUserProtocolFeatures::RARP) {
            return Ok(false);
        }
        let [a, b, c, d, e, f] = mac;
        self.tell(FrontendReq::SEND_RARP, &[a, b, c, d, e, f, 0, 0], &[]).map(|()| true)
    }

    fn save_state(&self) -> Result<Option<Vec<u8>>> {
        if !self.has(VhostUserProtocolFeatures::DEVICE_STATE) {
            return Ok(None);
        }
        back_end_state::save(&self.connection).map(Some).map_err(failed)
    }

    fn load_state(&self, state: &[u8]) -> Result<()> {
        if !self.has(VhostUserProtocolFeatures::DEVICE_STATE) {
            return Err(UserError::InactiveOperation(VhostUserProtocolFeatures::DEVICE_STATE).into());
        }
        back_end_state::load(&self.connection, state).map_err(failed)
    }

    fn share_inflight(&self, inflight: &Inflight) -> Result<()> {
        if !self.has(VhostUserProtocolFeatures::INFLIGHT_SHMFD) {
            return Err(UserError::InactiveOperation(VhostUserProtocolFeatures::INFLIGHT_SHMFD).into());
        }
        let mut body = [inflight.len.to_ne_bytes(), inflight.offset.to_ne_bytes()].concat();
        body.extend(inflight.rings.to_ne_bytes());
        body.extend(inflight.ring_size.to_ne_bytes());
        // The structure's own padding.
        body.extend([0; 4]);
        self.tell(FrontendReq::SET_INFLIGHT_FD, &body, &[inflight.file.as_raw_fd()])
    }
}

impl VhostBackend for VhostUser {
    fn get_features(&self) -> Result<u64> {
        self.connection.ask_u64(FrontendReq::GET_FEATURES).map_err(failed)
    }

    fn set_features(&self, features: u64) -> Result<()> {
        self.tell(FrontendReq::SET_FEATURES, &features.to_ne_bytes(), &[])
    }

    fn set_owner(&self) -> Result<()> {
        self.tell(FrontendReq::SET_OWNER, &[], &[])
    }

    fn reset_owner(&self) -> Result<()> {
        self.tell(FrontendReq::RESET_OWNER, &[], &[])
    }

    fn set_mem_table(
        &self,
        regions: &[VhostUserMemoryRegionInfo],
    ) -> Result<Option<Vec<VhostUserMemoryRegionBase>>> {
        let (body, fds) = table(regions)?;
        self.tell(FrontendReq::SET_MEM_TABLE, &body, &fds).map(|()| None)
    }

    fn set_log_base(&self, _: u64, region: Option<VhostUserDirtyLogRegion>) -> Result<()> {
        let region = region.ok_or(Error::LogAddress)?;
        let body = [region.mmap_size.to_ne_bytes(), region.mmap_offset.to_ne_bytes()].concat();
        // Answered always, by a body of 0, 8 or 16 bytes that says nothing; a back-end that refuses
        // hangs up.
        self.connection.ask(FrontendReq::SET_LOG_BASE, &body, &[region.mmap_handle]).map(drop).map_err(failed)
    }

    fn set_log_fd(&self, fd: RawFd) -> Result<()> {
        self.tell(FrontendReq::SET_LOG_FD, &[], &[fd])
    }

    fn set_vring_num(&self, index: usize, size: u16) -> Result<()> {
        self.tell_ring(FrontendReq::SET_VRING_NUM, index, size.into())
    }

    fn set_vring_addr(&self, index: usize, config: &VringConfigData) -> Result<()> {
        let mut body = ring_state(index, config.flags)?;
        for address in
            [config.desc_table_addr, config.used_ring_addr, config.avail_ring_addr, config.get_log_addr()]
        {
            body.extend(address.to_ne_bytes());
        }
        self.tell(FrontendReq::SET_VRING_ADDR, &body, &[])
    }

    fn set_vring_base(&self, index: usize, base: u16) -> Result<()> {
        self.set_ring_base(index, base.into())
    }

    fn get_vring_base(&self, index: usize) -> Result<u32> {
        let request = FrontendReq::GET_VRING_BASE;
        let body = self.connection.ask(request, &ring_state(index, 0)?, &[]).map_err(failed)?;
        let base = body.last_chunk().filter(|_| body.len() == 8).map(|base| u32::from_ne_bytes(*base));
        base.ok_or(UserError::InvalidMessage.into())
    }

    fn set_vring_call(&self, index: usize, event: &EventFd) -> Result<()> {
        self.tell_event(FrontendReq::SET_VRING_CALL, index, event)
    }

    fn set_vring_kick(&self, index: usize, event: &EventFd) -> Result<()> {
        self.tell_event(FrontendReq::SET_VRING_KICK, index, event)
    }

    fn set_vring_err(&self, index: usize, event: &EventFd) -> Result<()> {
        self.tell_event(FrontendReq::SET_VRING_ERR, index, event)
    }
}

/// Bit 30 of the virtio features: protocol features can be negotiated.
pub(super) const PROTOCOL_FEATURES: u64 = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();

/// SET_MEM_TABLE: its body and its descriptors.
pub(super) fn table(regions: &[VhostUserMemoryRegionInfo]) -> Result<(Vec<u8>, Vec<RawFd>)> {
    let count = u32::try_from(regions.len()).ok().filter(|_| (1..=TABLE).contains(&regions.len()));
    let count = count.ok_or(Error::InvalidGuestMemory)?;
    let mut body = [count.to_ne_bytes(), [0; 4]].concat();
    regions.iter().for_each(|info| body.extend(region_bytes(info)));
    let fds = regions.iter().map(mappable).collect::<Result<Vec<_>>>()?;
    Ok((body, fds))
}

pub(super) fn infos(regions: &[VhostRegion]) -> Vec<VhostUserMemoryRegionInfo> {
    regions.iter().map(VhostRegion::info).collect()
}

pub(super) fn region_bytes(info: &VhostUserMemoryRegionInfo) -> Vec<u8> {
    let fields = [info.guest_phys_addr, info.memory_size, info.userspace_addr, info.mmap_offset];
    fields.map(u64::to_ne_bytes).concat()
}

/// The descriptor that the back-end maps.
fn mappable(info: &VhostUserMemoryRegionInfo) -> Result<RawFd> {
    if info.mmap_handle >= 0 { Ok(info.mmap_handle) } else { Err(Error::InvalidGuestMemoryRegion) }
}

fn ring_state(index: usize, value: u32) -> Result<Vec<u8>> {
    let index = u32::try_from(index).map_err(|_| Error::InvalidQueue)?;
    Ok([index.to_ne_bytes(), value.to_ne_bytes()].concat())
}

fn failed(error: io::Error) -> Error {
    UserError::SocketError(error).into()
}
