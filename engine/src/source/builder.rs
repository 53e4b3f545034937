//! What a source is made from.

use std::num::NonZeroU64;
use std::sync::Arc;
use std::time::Duration;

use multifd_codecs::{Codec, Uncompressed};
use multifd_transports::{Endpoint, SocketOptions, ThreadHook, TlsClient};
use multifd_wire::{BlockName, Configuration};

use super::control::Control;
use super::outgoing::{RamNotes, ZeroPages};
use super::zero_copy::ZeroCopySend;
use crate::config::{SourceConfig, Surroundings};
use crate::convergence::{AutoConverge, Limits};
use crate::dirty::{DirtyLog, Unwritten};
use crate::error::{Error, ErrorKind, Phase, Result};
use crate::guest::{RamBlock, RamChanges};
use crate::run::session::{Canceller, ProgressReader, Session};
use crate::stream::dialect;
use crate::stream::sections::EarlySections;
use crate::stream::vm_state::VmState;

/// The sending end of a migration that has not been connected yet.
pub struct Source {
    pub(super) config: SourceConfig,
    pub(super) guest: Guest,
    pub(super) codec: Arc<dyn Codec>,
    pub(super) tls: Option<TlsClient>,
    pub(super) hook: ThreadHook,
    pub(super) session: Arc<Session>,
    pub(super) control: Control,
}

/// The guest that is to be moved.
pub(super) struct Guest {
    pub(super) ram: Vec<RamBlock>,
    pub(super) configuration: Configuration,
    pub(super) uuid: [u8; 16],
    pub(super) early: EarlySections,
    vm: Option<VmState>,
    pub(super) logs: Vec<Box<dyn DirtyLog>>,
    pub(super) unwritten: Unwritten,
    pub(super) notes: RamNotes,
}

impl Guest {
    fn check(&self) -> Result<(), String> {
        RamBlock::check_all(&self.ram)?;
        self.unwritten.check_names(&self.ram)?;
        if let Some(name) =
            self.notes.paged.iter().find(|name| self.ram.iter().all(|block| block.name() != *name))
        {
            return Err(format!("paged block {name}, which is none of the RAM blocks"));
        }
        match self.configuration.machine.len() {
            1..=BlockName::MAX_LEN => Ok(()),
            len => Err(format!("the machine's name has {len} bytes, expected 1..={}", BlockName::MAX_LEN)),
        }
    }
}

/// Settings of a [`Source`], and the objects that it works with. Made by [`Source::builder`].
pub struct SourceBuilder {
    config: SourceConfig,
    guest: Guest,
    codec: Arc<dyn Codec>,
    tls: Option<TlsClient>,
    hook: ThreadHook,
}

impl Source {
    /// A source for `ram`, in the order in which the blocks are announced, of a machine as
    /// `configuration` names it.
    pub fn builder(ram: Vec<RamBlock>, configuration: Configuration) -> SourceBuilder {
        SourceBuilder {
            config: SourceConfig::default(),
            guest: Guest {
                ram,
                configuration,
                uuid: [0; 16],
                early: EarlySections::default(),
                vm: None,
                logs: Vec::new(),
                unwritten: Unwritten::default(),
                notes: RamNotes::default(),
            },
            codec: Arc::new(Uncompressed),
            tls: None,
            hook: ThreadHook::default(),
        }
    }

    /// Ends the migration from another thread, the dialling included.
    pub fn canceller(&self) -> Canceller {
        Canceller::new(&self.session)
    }

    /// Steers the migration from other threads.
    pub fn control(&self) -> Control {
        self.control.clone()
    }

    /// Tells how far it has come, from any thread.
    pub fn progress(&self) -> ProgressReader {
        ProgressReader::new(&self.session)
    }
}

impl SourceBuilder {
    /// Takes all settings at once: those that were set before are gone.
    #[must_use]
    pub fn config(mut self, config: SourceConfig) -> Self {
        self.config = config;
        self
    }

    /// The guest's uuid, which a QEMU destination compares with its own. Default: all zero, a guest
    /// without one.
    #[must_use]
    pub fn uuid(mut self, uuid: [u8; 16]) -> Self {
        self.guest.uuid = uuid;
        self
    }

    /// Where writes to the guest's RAM are noted; any number of logs, which together cover all of
    /// it but what [`read_only_block`](Self::read_only_block) names: what is written elsewhere
    /// would be lost.
    #[must_use]
    pub fn dirty_log(mut self, log: impl DirtyLog + 'static) -> Self {
        self.guest.logs.push(Box::new(log));
        self
    }

    /// Says that no vCPU and no device writes to this block while it migrates, so that it needs no
    /// dirty log: firmware, a ROM.
    #[must_use]
    pub fn read_only_block(mut self, name: BlockName) -> Self {
        self.guest.unwritten.blocks.push(name);
        self
    }

    /// Says that the guest is paused for all of the migration, its devices too, so that no block
    /// needs a dirty log: a checkpoint that is sent, a guest that is moved cold.
    #[must_use]
    pub fn paused_guest(mut self) -> Self {
        self.guest.unwritten.guest_paused = true;
        self
    }

    /// What the VMM does to the memory that is no write: parts of blocks that are not there now, or
    /// come and go meanwhile (virtio-mem, balloon, free page reporting), and blocks that are
    /// resized. Default: nothing.
    #[must_use]
    pub fn ram_changes(mut self, changes: &RamChanges) -> Self {
        self.guest.notes.changes = Some(changes.clone());
        self
    }

    /// Says that pages of this block which are not there are fetched by the handler of a
    /// userfaultfd when they are read, for as long as the migration runs: memory that is restored
    /// on demand, or paged by another process. The kernel reads for the engine, so the handler must
    /// serve the kernel's faults, too (a userfaultfd without UFFD_USER_MODE_ONLY). Without this,
    /// such a block is refused: what is not there is not zero.
    #[must_use]
    pub fn paged_block(mut self, name: BlockName) -> Self {
        self.guest.notes.paged.push(name);
        self
    }

    /// Compares all of RAM with what was sent, when the guest is paused: see
    /// [`SourceConfig::audit`].
    #[must_use]
    pub fn audit(mut self, audit: bool) -> Self {
        self.config.audit = audit;
        self
    }

    /// The codec of each packet by what is measured: see [`SourceConfig::auto_codec`].
    #[must_use]
    pub fn auto_codec(mut self, auto_codec: bool) -> Self {
        self.config.auto_codec = auto_codec;
        self
    }

    /// A checksum for each packet: see [`SourceConfig::checksums`].
    #[must_use]
    pub fn checksums(mut self, checksums: impl Into<Option<bool>>) -> Self {
        self.config.checksums = checksums.into();
        self
    }

    /// A digest of all RAM, compared at the end: see [`SourceConfig::digest`].
    #[must_use]
    pub fn digest(mut self, digest: impl Into<Option<bool>>) -> Self {
        self.config.digest = digest.into();
        self
    }

    /// Device sections that go before the end of RAM, where the devices' source had them. Default:
    /// none.
    #[must_use]
    pub fn early_sections(mut self, early: EarlySections) -> Self {
        self.guest.early = early;
        self
    }

    /// What the destination must know of the VM before it can provide memory for it, as bytes that
    /// only the embedder understands: [`IncomingRam::configure`](crate::IncomingRam::configure)
    /// gets them before the list of RAM blocks. For a multifd destination; a QEMU refuses the
    /// migration. `name`: 1..=255 bytes. Default: none.
    #[must_use]
    pub fn vm_state(mut self, name: &str, version: u32, state: &[u8]) -> Self {
        self.guest.vm = Some(VmState { name: name.to_owned(), version, bytes: state.to_vec() });
        self
    }

    /// How the parallel channels compress. Default: not at all. The destination must be set to the
    /// same.
    #[must_use]
    pub fn codec(mut self, codec: Arc<dyn Codec>) -> Self {
        self.codec = codec;
        self
    }

    /// Encrypts main and every channel, and refuses a destination whose certificate does not
    /// verify. Default: no. Needs feature `tls-aws-lc` or `tls-ring`.
    #[must_use]
    pub fn tls(mut self, tls: TlsClient) -> Self {
        self.tls = Some(tls);
        self
    }

    /// Called on each thread that the migration makes, before the thread does anything else, with
    /// its name: for affinity, a cgroup, a seccomp filter. The threads are listed in
    /// docs/embedding.md. A hook that panics ends the migration.
    #[must_use]
    pub fn thread_hook(mut self, on_start: impl Fn(&str) + Send + Sync + 'static) -> Self {
        self.hook = ThreadHook::new(on_start);
        self
    }

    /// Number of parallel channels: see [`SourceConfig::channels`].
    #[must_use]
    pub fn channels(mut self, channels: usize) -> Self {
        self.config.channels = channels;
        self
    }

    /// Addresses of their own for the parallel channels: see [`SourceConfig::channel_endpoints`].
    #[must_use]
    pub fn channel_endpoints(mut self, endpoints: Vec<Endpoint>) -> Self {
        self.config.channel_endpoints = endpoints;
        self
    }

    /// Pages at fixed places of a file: see [`SourceConfig::mapped_ram`].
    #[must_use]
    pub fn mapped_ram(mut self, mapped_ram: bool) -> Self {
        self.config.mapped_ram = mapped_ram;
        self
    }

    /// Pages past the page cache: see [`SourceConfig::direct_io`].
    #[must_use]
    pub fn direct_io(mut self, direct_io: bool) -> Self {
        self.config.direct_io = direct_io;
        self
    }

    /// Pages straight from guest memory: see [`SourceConfig::zero_copy`].
    #[must_use]
    pub fn zero_copy_send(mut self, zero_copy: ZeroCopySend) -> Self {
        self.config.zero_copy = zero_copy;
        self
    }

    /// How zero pages go: see [`SourceConfig::zero_pages`].
    #[must_use]
    pub fn zero_pages(mut self, zero_pages: ZeroPages) -> Self {
        self.config.zero_pages = Some(zero_pages);
        self
    }

    /// Pages that are written again as differences: see [`SourceConfig::xbzrle_cache`].
    #[must_use]
    pub fn xbzrle(mut self, cache_bytes: usize) -> Self {
        self.config.xbzrle_cache = Some(cache_bytes);
        self
    }

    /// Bytes per second over all channels while the guest runs: see
    /// [`SourceConfig::max_bandwidth`].
    #[must_use]
    pub fn max_bandwidth(mut self, bytes_per_second: Option<NonZeroU64>) -> Self {
        self.config.max_bandwidth = bytes_per_second;
        self
    }

    /// Longest downtime at the switch-over. Default: 300 ms.
    #[must_use]
    pub fn downtime_limit(mut self, limit: Duration) -> Self {
        self.config.limits.downtime_limit = limit;
        self
    }

    /// All limits by which rounds go on or end: see [`SourceConfig::limits`].
    #[must_use]
    pub fn limits(mut self, limits: Limits) -> Self {
        self.config.limits = limits;
        self
    }

    /// How much to hold the vCPUs back: see [`SourceConfig::auto_converge`].
    #[must_use]
    pub fn auto_converge(mut self, settings: AutoConverge) -> Self {
        self.config.auto_converge = Some(settings);
        self
    }

    /// Whether the destination confirms: see [`SourceConfig::return_path`].
    #[must_use]
    pub fn return_path(mut self, return_path: bool) -> Self {
        self.config.return_path = Some(return_path);
        self
    }

    /// Whether the guest may be handed over before its RAM: see [`SourceConfig::postcopy`].
    #[must_use]
    pub fn postcopy(mut self, postcopy: bool) -> Self {
        self.config.postcopy = postcopy;
        self
    }

    /// A connection for pages that the guest waits for: see [`SourceConfig::postcopy_preempt`].
    #[must_use]
    pub fn postcopy_preempt(mut self, preempt: bool) -> Self {
        self.config.postcopy_preempt = preempt;
        self
    }

    /// Connections for pages that the guest waits for: see
    /// [`SourceConfig::postcopy_urgent_channels`].
    #[must_use]
    pub fn postcopy_urgent_channels(mut self, channels: usize) -> Self {
        self.config.postcopy_urgent_channels = channels;
        self
    }

    /// Bytes per second of a post-copy: see [`SourceConfig::max_postcopy_bandwidth`].
    #[must_use]
    pub fn max_postcopy_bandwidth(mut self, bytes_per_second: Option<NonZeroU64>) -> Self {
        self.config.max_postcopy_bandwidth = bytes_per_second;
        self
    }

    /// How long to connect again when the link breaks: see [`SourceConfig::resume_for`].
    #[must_use]
    pub fn resume_for(mut self, limit: Option<Duration>) -> Self {
        self.config.resume_for = limit;
        self
    }

    /// Everything again to a destination that knows nothing: see [`SourceConfig::resume_anew`].
    #[must_use]
    pub fn resume_anew(mut self, anew: bool) -> Self {
        self.config.resume_anew = anew;
        self
    }

    /// Announcement of the switch-over: see [`SourceConfig::switchover_start`].
    #[must_use]
    pub fn switchover_start(mut self, switchover_start: bool) -> Self {
        self.config.switchover_start = switchover_start;
        self
    }

    /// A wait for the caller before the switch-over: see [`SourceConfig::pause_before_switchover`].
    #[must_use]
    pub fn pause_before_switchover(mut self, pause: bool) -> Self {
        self.config.pause_before_switchover = pause;
        self
    }

    /// How long to wait for the destination: see [`SourceConfig::timeout`].
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.config.timeout = timeout;
        self
    }

    /// How sockets are tuned: see [`SourceConfig::socket`].
    #[must_use]
    pub fn socket_options(mut self, options: SocketOptions) -> Self {
        self.config.socket = options;
        self
    }

    /// Checks the settings. Nothing is connected yet.
    ///
    /// # Errors
    /// `ApiMisuse` that names the setting.
    pub fn build(self) -> Result<Source> {
        let Self { config, mut guest, codec, tls, hook } = self;
        guest.notes.audit = config.audit;
        guest.notes.guest_paused = guest.unwritten.guest_paused;
        let around = Surroundings { codec: &*codec, tls: tls.is_some(), endpoint: None, opened: None };
        config.check(around).map_err(|problem| Error::new(ErrorKind::ApiMisuse, Phase::Setup, problem))?;
        guest.check().map_err(|problem| Error::new(ErrorKind::ApiMisuse, Phase::Setup, problem))?;
        if let Some(vm) = guest.vm.take() {
            let section =
                vm.encode().map_err(|problem| Error::new(ErrorKind::ApiMisuse, Phase::Setup, problem))?;
            guest.early.before_ram.splice(0..0, section);
        }
        dialect::check_codec(&*codec, Phase::Setup)?;
        let session = Session::new(config.timeout);
        let control = Control::new(&session, &config);
        Ok(Source { config, guest, codec, tls, hook, session, control })
    }
}
