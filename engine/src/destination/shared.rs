//! What the receiving threads share.

use std::hash::{BuildHasher as _, RandomState};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::time::Duration;

use multifd_codecs::{Codec, CodecId, Codecs};
use multifd_transports::{Channel, Listener};
use multifd_wire::{DeviceStatePacket, MigrationId, PacketFlags, Wishes};

use super::channels::sync::ChannelSync;
use super::place::BlockSinks;
use super::postcopy::serving::Serving;
use super::refusals::Refusals;
use super::sharing::Sharing;
use crate::config::DestinationConfig;
use crate::error::{Error, ErrorKind, Phase, Result};
use crate::os::memory::most_kept;
use crate::run::budget::{Budget, Share};
use crate::run::session::Session;
use crate::run::stop::{Monitor, StopSwitch, lock};

/// Device state that came over a parallel channel, for the device that knows what it means.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct DevicePacket {
    /// The device: idstr and instance id of its section.
    pub device: DeviceStatePacket,
    /// Opaque.
    pub data: Vec<u8>,
}

pub(crate) struct DestinationShared {
    pub(crate) session: Arc<Session>,
    pub(crate) channels: ChannelSync,
    pub(crate) refusals: Refusals,
    pub(crate) codecs: Codecs,
    pub(crate) limits: ReceiveLimits,
    /// Threads that hear of page faults, if the guest runs here before its RAM is here.
    pub(crate) fault_threads: usize,
    /// Other processes that have the guest's memory mapped, if the guest runs here before its RAM
    /// is here.
    pub(crate) sharing: Option<Arc<dyn Sharing>>,
    listener: Mutex<Arc<Listener>>,
    /// Connections are accepted until the end: a source that may switch to post-copy makes one for
    /// urgent pages when it does.
    keeps_listening: AtomicBool,
    /// HELLO was said: the source may send packets of the multifd dialect.
    dialect: AtomicBool,
    /// All that is placed is read again at the end.
    pub(crate) verifies: bool,
    /// What the source wishes to be checked. Set before there is memory for its pages.
    wishes: OnceLock<Wishes>,
    /// What the source was told that this migration is known by.
    id: OnceLock<MigrationId>,
    /// By which the source has authenticated itself, if it has.
    certificate: OnceLock<Option<Vec<u8>>>,
    /// One for each connection that may carry urgent pages.
    urgent: Arc<()>,
    facts: Monitor<Facts>,
}

/// A connection that may carry urgent pages, as long as this lives.
pub(crate) struct UrgentCandidate(#[expect(dead_code, reason = "counted, not read")] Arc<()>);

/// Most connections that may carry urgent pages. A source makes up to 8 for each link, strangers
/// the others.
const MAX_URGENT: usize = 24;

/// What a source may make this end use.
pub(crate) struct ReceiveLimits {
    /// Bytes of guest RAM.
    pub(crate) ram: Option<u64>,
    /// Memory beside it.
    pub(crate) memory: Budget,
    /// Most bytes of the devices' sections that are kept, and of device state over channels.
    pub(crate) device_state: usize,
    /// Device state over parallel channels is taken.
    pub(crate) device_packets: bool,
    /// How long it may be silent between two rounds, where that is longer than the timeout.
    pub(crate) hold: Option<Duration>,
}

impl ReceiveLimits {
    pub(crate) fn of(config: &DestinationConfig) -> Self {
        Self {
            ram: config.max_ram,
            memory: Budget::new(config.max_memory.unwrap_or_else(|| most_kept() as u64)),
            device_state: config.max_device_state.unwrap_or_else(most_kept),
            device_packets: config.device_packets,
            hold: config.hold_timeout,
        }
    }
}

/// What is learnt while the stream comes in.
#[derive(Default)]
struct Facts {
    sinks: Option<Arc<BlockSinks>>,
    /// From LISTEN on.
    serving: Weak<Serving>,
    codec: Option<Arc<dyn Codec>>,
    uuid: Option<[u8; 16]>,
    device_packets: Vec<DevicePacket>,
    /// Bytes of all that were announced.
    device_bytes: usize,
    device_memory: Vec<Share>,
    /// The migration has ended: there will be no `serving`.
    over: bool,
}

impl DestinationShared {
    pub(crate) fn new(
        session: &Arc<Session>,
        codecs: Codecs,
        config: &DestinationConfig,
        listener: &Arc<Listener>,
        sharing: Option<Arc<dyn Sharing>>,
    ) -> Arc<Self> {
        Arc::new(Self {
            session: Arc::clone(session),
            channels: ChannelSync::new(&session.stop, config.channels),
            limits: ReceiveLimits::of(config),
            fault_threads: config.fault_threads,
            sharing,
            refusals: Refusals::default(),
            codecs,
            listener: Mutex::new(Arc::clone(listener)),
            id: OnceLock::new(),
            certificate: OnceLock::new(),
            urgent: Arc::default(),
            keeps_listening: AtomicBool::new(false),
            dialect: AtomicBool::new(false),
            verifies: config.verify,
            wishes: OnceLock::new(),
            facts: Monitor::new(Facts::default(), &session.stop),
        })
    }

    fn stop(&self) -> &StopSwitch {
        &self.session.stop
    }

    /// Other processes fault no more: no page is missing, or none will ever be.
    pub(crate) fn end_sharing(&self) {
        if let Some(sharing) = &self.sharing {
            sharing.end();
        }
    }

    /// Main has reached a sync point: waits for the channels. A source has made all of its
    /// connections before the first, which are accepted now at the latest, and none is after that.
    ///
    /// # Errors
    /// As [`ChannelSync::flush`].
    pub(crate) fn sync_point(&self) -> Result<()> {
        let limit = self.session.timeout;
        if self.keeps_listening() {
            let whole_pages = self.session.counters.main.pages_normal.load(Ordering::Relaxed) > 0;
            return self.channels.flush_past_urgent(limit, whole_pages);
        }
        let listener = self.listener();
        listener.close();
        if !listener.wait_closed(limit) {
            let detail = format!("the last connections were not accepted within {limit:?}");
            return Err(Error::new(ErrorKind::Deadline, Phase::Accept, detail));
        }
        self.channels.flush(limit)?;
        if self.channels.is_full() && !self.channels.is_early() {
            self.stop_accepting();
        }
        Ok(())
    }

    /// Accepts connections until the end, however long they are silent.
    pub(crate) fn keep_listening(&self) {
        self.keeps_listening.store(true, Ordering::Relaxed);
        self.listener().keep_silent();
    }

    /// Connections are accepted until the end.
    pub(crate) fn keeps_listening(&self) -> bool {
        self.keeps_listening.load(Ordering::Relaxed)
    }

    /// All channels are here, or none can be of use any more.
    pub(crate) fn stop_accepting(&self) {
        stop_accepting(&self.listener());
    }

    /// As [`stop_accepting`](Self::stop_accepting), and returns when the address is free.
    pub(crate) fn end_accepting(&self) {
        self.stop_accepting();
        if !self.listener().wait_closed(self.session.timeout) {
            tracing::warn!(endpoint = %self.listener().endpoint(), "still listening");
        }
    }

    fn listener(&self) -> Arc<Listener> {
        Arc::clone(&lock(&self.listener))
    }

    /// Connections come on another listener from now on.
    pub(crate) fn listen_to(&self, listener: Arc<Listener>) {
        *lock(&self.listener) = listener;
    }

    /// LISTEN: pages come for `serving` from now on.
    pub(crate) fn serve(&self, serving: &Arc<Serving>) {
        self.facts.modify_and_notify(|facts| facts.serving = Arc::downgrade(serving));
    }

    /// Waits for LISTEN, which may never come.
    pub(crate) fn serving(&self) -> Result<Arc<Serving>> {
        let serving = self.facts.wait(self.stop(), None, |facts| {
            let serving = facts.serving.upgrade();
            (serving.is_some() || facts.over).then_some(serving)
        });
        serving.flatten().ok_or_else(|| Error::stopped(Phase::Active))
    }

    /// What pages come for, if LISTEN has come.
    pub(crate) fn serving_now(&self) -> Option<Arc<Serving>> {
        self.facts.read(|facts| facts.serving.upgrade())
    }

    /// Nothing is served any more, or ever was: the migration has ended.
    pub(crate) fn end_of_service(&self) {
        self.facts.modify_and_notify(|facts| facts.over = true);
    }

    /// Counts a connection that may carry urgent pages.
    pub(crate) fn urgent_candidate(&self) -> Result<UrgentCandidate> {
        let candidate = Arc::clone(&self.urgent);
        if Arc::strong_count(&self.urgent) <= MAX_URGENT + 1 {
            return Ok(UrgentCandidate(candidate));
        }
        let detail = format!("more than {MAX_URGENT} connections that may carry urgent pages");
        Err(Error::misbehaved(Phase::Accept, detail))
    }

    /// From now on the source may send packets of the multifd dialect.
    pub(crate) fn speak_dialect(&self) {
        self.dialect.store(true, Ordering::Relaxed);
    }

    /// True if packets of the multifd dialect may come.
    pub(crate) fn speaks_dialect(&self) -> bool {
        self.dialect.load(Ordering::Relaxed)
    }

    /// The source wishes these checks. The first word counts: one that came between pages would be
    /// too late.
    pub(crate) fn heed(&self, wishes: Wishes) {
        self.wishes.get_or_init(|| wishes);
    }

    /// What the source wishes to be checked.
    pub(crate) fn wishes(&self) -> Wishes {
        self.wishes.get().copied().unwrap_or_default()
    }

    /// What the source is to be told that this migration is known by.
    pub(crate) fn make_id(&self) -> MigrationId {
        // The keys are random: told apart, not kept secret.
        let random = |half: u8| RandomState::new().hash_one(half).to_be_bytes();
        *self.id.get_or_init(|| {
            let mut id = [0; MigrationId::LEN];
            id.iter_mut().zip(random(0).into_iter().chain(random(1))).for_each(|(to, from)| *to = from);
            MigrationId(id)
        })
    }

    /// What the source was told, if it was.
    pub(crate) fn id(&self) -> Option<MigrationId> {
        self.id.get().copied()
    }

    /// Main is there: the client at its other end is the source.
    pub(crate) fn note_source(&self, main: &Channel) {
        // There is only one main.
        let _ = self.certificate.set(main.client_certificate().map(<[u8]>::to_vec));
    }

    /// Checks that a connection that comes later is of the client that main was: another of the
    /// same CA is not the source.
    pub(crate) fn check_client(&self, channel: &Channel) -> Result<()> {
        let expected = self.certificate.get().and_then(Option::as_deref);
        if expected == channel.client_certificate() {
            return Ok(());
        }
        let detail = "another certificate than that of the source: it is another's";
        Err(Error::misbehaved(Phase::Accept, detail).on(channel.peer()))
    }

    /// Main has read the list of blocks: pages can land.
    pub(crate) fn publish(&self, sinks: Arc<BlockSinks>) {
        self.facts.modify_and_notify(|facts| facts.sinks = Some(sinks));
    }

    /// Waits for the list of blocks, which a channel's first page may overtake.
    pub(crate) fn sinks(&self) -> Result<Arc<BlockSinks>> {
        let timeout = self.session.timeout;
        self.facts.wait(self.stop(), Some(timeout), |facts| facts.sinks.clone()).ok_or_else(|| {
            Error::new(
                ErrorKind::Deadline,
                Phase::Setup,
                format!("pages, but no list of RAM blocks in {timeout:?}"),
            )
        })
    }

    /// The codec of a packet with pages: known here, and the same for the whole migration, unless
    /// the source has announced that it mixes them.
    pub(crate) fn codec(&self, flags: PacketFlags) -> Result<Arc<dyn Codec>> {
        let mixed = self.wishes().mixed;
        self.facts.modify_silently(|facts| match &facts.codec {
            Some(codec) if codec.id() == flags.codec() => Ok(Arc::clone(codec)),
            Some(codec) if !mixed => Err(Error::misbehaved(
                Phase::Active,
                format!(
                    "packet with codec {:#x} after packets with {} ({:#x})",
                    flags.codec().value(),
                    codec.name(),
                    codec.id().value()
                ),
            )),
            first => {
                let of_dialect = flags.codec().is_reserved();
                let found = self.codecs.get(flags.codec()).filter(|_| !of_dialect || self.speaks_dialect());
                let codec = found.ok_or_else(|| {
                    let known: Vec<_> = self.codecs.iter().map(|codec| codec.name()).collect();
                    let name = flags.codec().name().map(|name| format!(" ({name})")).unwrap_or_default();
                    let (seen, known) = (flags.codec().value(), known.join(", "));
                    let detail = format!("packet with codec {seen:#x}{name}; known here: {known}");
                    Error::incompatible(Phase::Active, detail)
                })?;
                // The migration's codec is what is not none, if anything is.
                if first.as_ref().is_none_or(|first| first.id() == CodecId::NONE) {
                    facts.codec = Some(Arc::clone(codec));
                }
                Ok(Arc::clone(codec))
            }
        })
    }

    pub(crate) fn codec_in_use(&self) -> Option<Arc<dyn Codec>> {
        self.facts.read(|facts| facts.codec.clone())
    }

    /// Every channel of a migration says the same uuid.
    pub(crate) fn on_uuid(&self, uuid: [u8; 16]) -> Result<()> {
        let known = self.facts.modify_silently(|facts| *facts.uuid.get_or_insert(uuid));
        if known == uuid {
            return Ok(());
        }
        let (seen, expected) = (u128::from_be_bytes(uuid), u128::from_be_bytes(known));
        Err(Error::misbehaved(Phase::Setup, format!("uuid {seen:032x}, other channels said {expected:032x}")))
    }

    pub(crate) fn uuid(&self) -> Option<[u8; 16]> {
        self.facts.read(|facts| facts.uuid)
    }

    /// A packet of device state is about to come, on any channel: asked before there is memory for
    /// it.
    pub(crate) fn expect_device_packet(&self, device: &DeviceStatePacket) -> Result<()> {
        if !self.limits.device_packets {
            let detail = format!(
                "device {} sends state over parallel channels, which is not taken here (a checkpoint cannot hold it)",
                device.idstr.escape_default()
            );
            return Err(Error::incompatible(Phase::Device, detail));
        }
        let len = DeviceStatePacket::LEN + device.payload_len as usize;
        let mut share = self.limits.memory.share();
        share.grow_to(len, Phase::Device, "device state on channels")?;
        self.facts.modify_silently(|facts| {
            // Small packets cost more than what is in them.
            facts.device_bytes += len;
            facts.device_memory.push(share);
            let most = self.limits.device_state;
            if facts.device_bytes <= most {
                return Ok(());
            }
            let bytes = facts.device_bytes;
            let detail = format!("{bytes} bytes of device state on channels, expected at most {most}");
            Err(Error::misbehaved(Phase::Device, detail))
        })
    }

    pub(crate) fn on_device_packet(&self, packet: DevicePacket) {
        self.facts.modify_silently(|facts| facts.device_packets.push(packet));
    }

    pub(crate) fn take_device_packets(&self) -> Vec<DevicePacket> {
        self.facts.modify_silently(|facts| std::mem::take(&mut facts.device_packets))
    }
}

/// New connections are refused by the system, those that have not said yet what they are are
/// closed.
pub(crate) fn stop_accepting(listener: &Listener) {
    listener.close();
    listener.stopper().stop();
}
