//! Settings of a source, and how it connects.

use std::num::NonZeroU64;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use multifd_codecs::{Codec, Uncompressed};
use multifd_transports::{Channel, DialOptions, Endpoint, SocketOptions, Stopper, TlsClient, blocking};
use multifd_wire::Configuration;

use super::channel::SendWorker;
use super::control::Control;
use super::main_stream::MainStream;
use super::mapped::{self, MappedFile};
use super::migration::{Migration, SyncPoints};
use super::outgoing::{OutgoingRam, ZeroPages};
use super::page_cache::PageCache;
use super::precopy::Precopy;
use super::return_path::ReturnPathReader;
use super::rounds::Rounds;
use super::shared::Shared;
use super::zero_copy::ZeroCopySend;
use crate::convergence::{AutoConverge, Convergence, Limits};
use crate::dirty::{DirtyLog, LogSet};
use crate::error::{Error, ErrorKind, Phase, Result};
use crate::mapped::CAPABILITY;
use crate::ram::{PAGE, RamBlock};
use crate::session::{Canceller, Counters, DEFAULT_TIMEOUT, ProgressReader, Session};
use crate::state::MigrationState;
use crate::workers::Crew;

const NOTHING_COMES_BACK: &str =
    "a return path was asked for, but nothing comes back over a pipe or from a file";

/// Most parallel channels: QEMU's limit.
const MAX_CHANNELS: usize = 255;

/// The sending end of a migration that has not been connected yet.
pub struct Source {
    settings: SourceBuilder,
    session: Arc<Session>,
    control: Control,
}

/// What connecting makes.
struct Parts {
    main: Arc<Channel>,
    shared: Arc<Shared>,
    return_path: Option<ReturnPathReader>,
    logs: LogSet,
}

/// Settings of a [`Source`]. Made by [`Source::builder`].
pub struct SourceBuilder {
    ram: Vec<RamBlock>,
    configuration: Configuration,
    uuid: [u8; 16],
    codec: Arc<dyn Codec>,
    channels: usize,
    max_bandwidth: Option<NonZeroU64>,
    zero_pages: Option<ZeroPages>,
    return_path: Option<bool>,
    mapped_ram: bool,
    direct_io: bool,
    switchover_start: bool,
    pause_before_switchover: bool,
    timeout: Duration,
    limits: Limits,
    auto_converge: Option<AutoConverge>,
    xbzrle_cache: Option<usize>,
    logs: Vec<Box<dyn DirtyLog>>,
    socket: SocketOptions,
    channel_endpoints: Vec<Endpoint>,
    zero_copy: ZeroCopySend,
    tls: Option<TlsClient>,
}

impl Source {
    /// A source for `ram`, in the order in which the blocks are announced, of a machine as `configuration` names it.
    pub fn builder(ram: Vec<RamBlock>, configuration: Configuration) -> SourceBuilder {
        SourceBuilder {
            ram,
            configuration,
            uuid: [0; 16],
            codec: Arc::new(Uncompressed),
            channels: 0,
            max_bandwidth: None,
            zero_pages: None,
            return_path: None,
            mapped_ram: false,
            direct_io: false,
            switchover_start: false,
            pause_before_switchover: false,
            timeout: DEFAULT_TIMEOUT,
            limits: Limits::default(),
            auto_converge: None,
            xbzrle_cache: None,
            logs: Vec::new(),
            socket: SocketOptions::default(),
            channel_endpoints: Vec::new(),
            zero_copy: ZeroCopySend::Off,
            tls: None,
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

    /// Starts the dirty logs, connects main and every channel, announces the RAM blocks. The destination may not be listening
    /// yet: dialling goes on for the timeout.
    ///
    /// # Errors
    /// `Transport` if there is no connection, or what broke the setup. Nothing has left the guest.
    pub fn connect(mut self, endpoint: &Endpoint) -> Result<Precopy> {
        self.session.enter(MigrationState::Setup)?;
        let crew = Crew::new(self.session.stop.clone());
        let convergence = Convergence::new(self.settings.auto_converge);
        match self.open(endpoint, &crew) {
            Ok(parts) => {
                let mut migration = self.migration(parts, crew);
                let result = migration.set_up(&self.settings.configuration);
                migration.caused(result)?;
                Ok(Precopy::new(migration, convergence))
            }
            Err(error) => {
                crew.stop().trip(error);
                self.session.note_end_of_failed();
                crew.join();
                Err(crew.stop().cause_or(Error::new(ErrorKind::Cancelled, Phase::Connect, "stopped")))
            }
        }
    }

    fn migration(&self, parts: Parts, crew: Crew) -> Migration {
        let Parts { main, shared, return_path, logs } = parts;
        Migration {
            main: MainStream::new(main),
            shared,
            control: self.control.clone(),
            crew,
            return_path,
            sync_points: SyncPoints::for_machine(&self.settings.configuration),
            switchover_start: self.settings.switchover_start,
            pause_before_switchover: self.settings.pause_before_switchover,
            logs,
            setup: Duration::ZERO,
            rounds: 0,
        }
    }

    fn open(&mut self, endpoint: &Endpoint, crew: &Crew) -> Result<Parts> {
        self.settings.check_endpoints(endpoint)?;
        let settings = &mut self.settings;
        settings.name_capabilities();
        let default_zero = ZeroPages::for_machine(&settings.configuration);
        let zero_pages = settings.zero_pages.unwrap_or(default_zero);
        // The logs first: what is read from now on may change, and they note it.
        let logs = LogSet::start(std::mem::take(&mut settings.logs), &settings.ram)?;
        let ram = OutgoingRam::new(std::mem::take(&mut settings.ram), zero_pages, settings.channels > 0)?;
        self.session.counters.ram_bytes.store(ram.total_bytes(), Ordering::Relaxed);
        let main = self.dial(endpoint, "main")?;
        let settings = &self.settings;
        settings.check_carrier(main.file().is_some())?;
        let mapped =
            settings.mapped_ram.then(|| MappedFile::new(&main, &ram, settings.direct_io)).transpose()?;
        let shared = Arc::new(Shared {
            session: Arc::clone(&self.session),
            ram,
            codec: Arc::clone(&settings.codec),
            uuid: settings.uuid,
            rounds: Rounds::new(&self.session.stop, settings.channels),
            mapped,
            pacer: Arc::clone(self.control.pacer()),
            packets: AtomicU64::new(0),
            cache: settings.xbzrle_cache.map(PageCache::new),
            peer_features: Arc::default(),
            zero_copy: settings.zero_copy,
        });
        // Before the others are dialled: a destination that refuses us says so here, and then nobody listens there any more.
        let return_path = match settings.wants_return_path(endpoint, &main)? {
            true => {
                Some(ReturnPathReader::start(Arc::clone(&main), Arc::clone(&shared.peer_features), crew)?)
            }
            false => None,
        };
        self.start_workers(endpoint, &shared, crew)?;
        Ok(Parts { main, shared, return_path, logs })
    }

    /// One for each parallel channel, or for each share of the pages in a file.
    fn start_workers(&self, endpoint: &Endpoint, shared: &Arc<Shared>, crew: &Crew) -> Result<()> {
        let settings = &self.settings;
        let endpoints = settings.channel_endpoints.iter().cycle().chain(std::iter::repeat(endpoint));
        for (id, endpoint) in endpoints.take(settings.channels).enumerate() {
            if settings.mapped_ram {
                MappedFile::start_worker(id, shared, crew)?;
            } else {
                let channel = self.dial(endpoint, &format!("channel {id}"))?;
                SendWorker::start(channel, u8::try_from(id).unwrap_or(u8::MAX), shared, crew)?;
            }
            Counters::add(&self.session.counters.channels, 1);
        }
        Ok(())
    }

    fn dial(&self, endpoint: &Endpoint, name: &str) -> Result<Arc<Channel>> {
        let stopper = Stopper::new();
        let options = DialOptions {
            deadline: self.session.timeout,
            stopper: stopper.clone(),
            socket: self.session.socket_options(&self.settings.socket),
            tls: self.settings.tls.clone(),
        };
        self.session.stop.on_trip(move || stopper.stop());
        let channel = blocking::dial(endpoint, &options)
            .map_err(|error| Error::transport(Phase::Connect, error).on(name.to_owned()))?;
        let channel = self.session.adopt(channel, Phase::Connect)?;
        self.session.close_on_stop(&channel);
        Ok(channel)
    }
}

impl SourceBuilder {
    /// The guest's uuid, which a QEMU destination compares with its own. Default: all zero, a guest without one.
    #[must_use]
    pub fn uuid(mut self, uuid: [u8; 16]) -> Self {
        self.uuid = uuid;
        self
    }

    /// How the parallel channels compress. Default: not at all. The destination must be set to the same.
    #[must_use]
    pub fn codec(mut self, codec: Arc<dyn Codec>) -> Self {
        self.codec = codec;
        self
    }

    /// Parallel channels, each a socket and a thread (a thread to a file with [`mapped_ram`](Self::mapped_ram)): 1..=255, and about 2 MiB of buffers each with a codec. 0, the default:
    /// everything goes on the main channel. A QEMU destination must be set to the same number.
    #[must_use]
    pub fn channels(mut self, channels: usize) -> Self {
        self.channels = channels;
        self
    }

    /// Bytes per second over all channels. Default: no limit.
    #[must_use]
    pub fn max_bandwidth(mut self, bytes_per_second: Option<NonZeroU64>) -> Self {
        self.max_bandwidth = bytes_per_second;
        self
    }

    /// How zero pages go. Default: as QEMU does for the machine type, [`ZeroPages::for_machine`].
    #[must_use]
    pub fn zero_pages(mut self, zero_pages: ZeroPages) -> Self {
        self.zero_pages = Some(zero_pages);
        self
    }

    /// Has the destination confirm that the guest has arrived. Without it, nobody knows whether it did. Default: yes over
    /// sockets; no to a command, which has to pass answers on if this is set, and over a pipe or to a file, which cannot.
    #[must_use]
    pub fn return_path(mut self, return_path: bool) -> Self {
        self.return_path = Some(return_path);
        self
    }

    /// Gives every page a fixed place in the file that it goes to, where [`channels`](Self::channels) threads write at a time, or
    /// the caller's if that is 0; a page that is sent again is written over. For a [`file`](Endpoint::File) only, without codec
    /// and xbzrle. Default: no.
    #[must_use]
    pub fn mapped_ram(mut self, mapped_ram: bool) -> Self {
        self.mapped_ram = mapped_ram;
        self
    }

    /// Writes the pages past the page cache (O_DIRECT), with [`mapped_ram`](Self::mapped_ram) only. Guest memory must begin at
    /// a multiple of the disk's block size. Default: no.
    #[must_use]
    pub fn direct_io(mut self, direct_io: bool) -> Self {
        self.direct_io = direct_io;
        self
    }

    /// Announces the switch-over to the destination's devices: QEMU 10.0 with machine types from 10.0 on. Default: no.
    #[must_use]
    pub fn switchover_start(mut self, switchover_start: bool) -> Self {
        self.switchover_start = switchover_start;
        self
    }

    /// Where writes to the guest's RAM are noted; any number of logs. Default: none, for a guest that stands still.
    #[must_use]
    pub fn dirty_log(mut self, log: impl DirtyLog + 'static) -> Self {
        self.logs.push(Box::new(log));
        self
    }

    /// How long the guest may stand still at the switch-over. Default: 300 ms.
    #[must_use]
    pub fn downtime_limit(mut self, limit: Duration) -> Self {
        self.limits.downtime_limit = limit;
        self
    }

    /// All limits by which rounds go on or end. Default: [`Limits::default`].
    #[must_use]
    pub fn limits(mut self, limits: Limits) -> Self {
        self.limits = limits;
        self
    }

    /// Says after each round how much to hold the vCPUs back, if the guest writes faster than its pages are sent: in
    /// [`RoundRecord::throttle_percent`](crate::RoundRecord). Default: it never says so.
    #[must_use]
    pub fn auto_converge(mut self, settings: AutoConverge) -> Self {
        self.auto_converge = Some(settings);
        self
    }

    /// Sends pages that are written again as differences, with a cache of so many bytes: a power of two, at least 4096. On the
    /// main channel to every destination, on parallel channels to another multifd. Default: no cache.
    #[must_use]
    pub fn xbzrle(mut self, cache_bytes: usize) -> Self {
        self.xbzrle_cache = Some(cache_bytes);
        self
    }

    /// Seals main and every channel, and refuses a destination whose certificate does not verify. Default: no.
    #[must_use]
    pub fn tls(mut self, tls: TlsClient) -> Self {
        self.tls = Some(tls);
        self
    }

    /// Has [`Precopy::stop_copy`] wait for [`Control::proceed`] before the guest's last RAM goes. Default: no.
    #[must_use]
    pub fn pause_before_switchover(mut self, pause: bool) -> Self {
        self.pause_before_switchover = pause;
        self
    }

    /// How long to wait for the destination: to listen, to take the next byte, to confirm. Default: 60 s.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// How sockets are tuned. Default: [`SocketOptions::default`], and a user timeout that is 10 s longer than the timeout:
    /// a destination that stands still is found by the one that says so, one that has vanished by either.
    #[must_use]
    pub fn socket_options(mut self, options: SocketOptions) -> Self {
        self.socket = options;
        self
    }

    /// Where the parallel channels connect to, one after the other and round again: other addresses of the destination, to
    /// use several networks. Default: where main does.
    #[must_use]
    pub fn channel_endpoints(mut self, endpoints: Vec<Endpoint>) -> Self {
        self.channel_endpoints = endpoints;
        self
    }

    /// Lets the kernel send pages straight from guest memory, on parallel channels without a codec over plain TCP. Default:
    /// off; the kernel's copy is cheap, and only a fast network card makes up for what this costs.
    #[must_use]
    pub fn zero_copy_send(mut self, zero_copy: ZeroCopySend) -> Self {
        self.zero_copy = zero_copy;
        self
    }

    /// Checks the settings. Nothing is connected yet.
    ///
    /// # Errors
    /// `ApiMisuse` that names the setting.
    pub fn build(self) -> Result<Source> {
        self.check().map_err(|problem| Error::new(ErrorKind::ApiMisuse, Phase::Setup, problem))?;
        let session = Session::new(self.timeout);
        let control = Control::new(&session, self.max_bandwidth, self.limits);
        Ok(Source { settings: self, session, control })
    }

    fn check_carrier(&self, file: bool) -> Result<()> {
        mapped::check_settings(self.mapped_ram, file, self.channels)
    }

    /// Mapped-ram belongs to the file that the guest goes to, not to the one that it may come from.
    fn name_capabilities(&mut self) {
        let capabilities = &mut self.configuration.capabilities;
        capabilities.retain(|capability| capability != CAPABILITY);
        capabilities.extend(self.mapped_ram.then(|| CAPABILITY.to_owned()));
    }

    /// What can be said before there is a connection.
    fn check_endpoints(&self, main: &Endpoint) -> Result<()> {
        match main {
            Endpoint::File { .. } => self.check_carrier(true)?,
            // It shows when it is open.
            Endpoint::Fd(_) | Endpoint::FdFrom(_) => {}
            _ => self.check_carrier(false)?,
        }
        let misuse = |detail| Err(Error::new(ErrorKind::ApiMisuse, Phase::Connect, detail));
        if self.return_path == Some(true) && matches!(main, Endpoint::File { .. }) {
            return misuse(NOTHING_COMES_BACK.to_owned());
        }
        let all = || std::iter::once(main).chain(&self.channel_endpoints);
        if self.channels > 0
            && !self.mapped_ram
            && let Some(single) = all().find(|endpoint| !endpoint.takes_several())
        {
            return misuse(format!(
                "{} parallel channels over {single}, which is one channel; they go over tcp, unix or vsock",
                self.channels
            ));
        }
        if self.tls.is_some()
            && let Some(other) = all().find(|endpoint| !endpoint.takes_several())
        {
            return misuse(format!("TLS over {other}, expected tcp, unix or vsock"));
        }
        let plain_tcp = |endpoint: &Endpoint| self.tls.is_none() && matches!(endpoint, Endpoint::Tcp { .. });
        match all().find(|endpoint| !plain_tcp(endpoint)).filter(|_| self.zero_copy != ZeroCopySend::Off) {
            Some(other) => misuse(format!("zero-copy send over {other}, expected plain TCP")),
            None => Ok(()),
        }
    }

    fn wants_return_path(&self, endpoint: &Endpoint, main: &Channel) -> Result<bool> {
        if self.return_path == Some(true) && !main.is_two_way() {
            return Err(Error::new(ErrorKind::ApiMisuse, Phase::Connect, NOTHING_COMES_BACK).on(main.peer()));
        }
        // Most commands store or pass on, and say nothing.
        let answers = main.is_two_way() && !matches!(endpoint, Endpoint::Exec(_));
        Ok(self.return_path.unwrap_or(answers))
    }

    fn check(&self) -> Result<(), String> {
        if self.channels > MAX_CHANNELS {
            return Err(format!("{} channels, expected 0..={MAX_CHANNELS}", self.channels));
        }
        if self.channels == 0 && self.codec.id() != multifd_codecs::CodecId::NONE {
            return Err(format!(
                "codec {} without parallel channels, which alone are compressed",
                self.codec.name()
            ));
        }
        if self.zero_copy != ZeroCopySend::Off
            && (self.channels == 0 || self.codec.id() != multifd_codecs::CodecId::NONE)
        {
            return Err(format!(
                "zero-copy send with {} channels and codec {}, expected at least 1 channel and none",
                self.channels,
                self.codec.name()
            ));
        }
        if self.mapped_ram && self.codec.id() != multifd_codecs::CodecId::NONE {
            return Err(format!(
                "mapped-ram excludes compression, codec {} was asked for",
                self.codec.name()
            ));
        }
        if self.direct_io && !self.mapped_ram {
            return Err("direct I/O needs mapped-ram: a plain stream is not aligned".to_owned());
        }
        if !self.channel_endpoints.is_empty() && (self.channels == 0 || self.mapped_ram) {
            return Err("addresses for parallel channels, but there are none".to_owned());
        }
        if self.mapped_ram && self.xbzrle_cache.is_some() {
            return Err("mapped-ram excludes xbzrle".to_owned());
        }
        if self.timeout.is_zero() {
            return Err("timeout is 0, expected more".to_owned());
        }
        if let Some(bytes) = self.xbzrle_cache.filter(|bytes| *bytes < PAGE || !bytes.is_power_of_two()) {
            return Err(format!("xbzrle-cache-size {bytes}, expected a power of two, at least {PAGE}"));
        }
        self.auto_converge.map_or(Ok(()), |settings| settings.check())
    }
}
