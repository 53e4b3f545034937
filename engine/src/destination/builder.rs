//! What a destination is made from.

use std::sync::Arc;
use std::time::Duration;

use multifd_codecs::Codecs;
use multifd_transports::{Channel, Endpoint, Listener, SocketOptions, ThreadHook, TlsServer};

use super::sharing::Sharing;
use super::{Destination, IncomingRam, SwitchoverAck};
use crate::config::{DestinationConfig, own};
use crate::error::{Error, ErrorKind, Phase, Result};
use crate::run::session::Session;
use crate::stream::dialect;

/// Settings of a [`Destination`], and the objects that it works with. Made by
/// [`Destination::builder`].
pub struct DestinationBuilder {
    config: DestinationConfig,
    ram: Box<dyn IncomingRam>,
    codecs: Codecs,
    tls: Option<TlsServer>,
    hook: ThreadHook,
    sharing: Option<Arc<dyn Sharing>>,
}

impl Destination {
    /// A destination whose pages go to what `ram` provides.
    pub fn builder(ram: impl IncomingRam + 'static) -> DestinationBuilder {
        DestinationBuilder {
            config: DestinationConfig::default(),
            ram: Box::new(ram),
            codecs: Codecs::default(),
            tls: None,
            hook: ThreadHook::default(),
            sharing: None,
        }
    }
}

impl DestinationBuilder {
    /// Takes all settings at once: those that were set before are gone.
    #[must_use]
    pub fn config(mut self, config: DestinationConfig) -> Self {
        self.config = config;
        self
    }

    /// The codecs that may come in. Default: none, zlib, zstd, and lz4 of other multifds. Which one
    /// it is, the packets say.
    #[must_use]
    pub fn codecs(mut self, codecs: Codecs) -> Self {
        self.codecs = codecs;
        self
    }

    /// Takes encrypted connections only, and refuses a source whose certificate does not verify.
    /// Default: plain ones only. Needs feature `tls-aws-lc` or `tls-ring`.
    #[must_use]
    pub fn tls(mut self, tls: TlsServer) -> Self {
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

    /// Back-ends of vhost-user devices, which fault on the guest's memory as the guest does when it
    /// comes by post-copy: see docs/vhost.md. Without this, a back-end cannot be given such memory
    /// before all of it is here.
    #[cfg(feature = "vhost")]
    #[must_use]
    pub fn vhost_postcopy(mut self, back_ends: &crate::vhost::VhostPostcopy) -> Self {
        self.sharing = Some(back_ends.sharing());
        self
    }

    /// Number of parallel channels: see [`DestinationConfig::channels`].
    #[must_use]
    pub fn channels(mut self, channels: usize) -> Self {
        self.config.channels = Some(channels);
        self
    }

    /// Pages past the page cache: see [`DestinationConfig::direct_io`].
    #[must_use]
    pub fn direct_io(mut self, direct_io: bool) -> Self {
        self.config.direct_io = direct_io;
        self
    }

    /// Whether the source may switch to post-copy: see [`DestinationConfig::postcopy`].
    #[must_use]
    pub fn postcopy(mut self, postcopy: bool) -> Self {
        self.config.postcopy = postcopy;
        self
    }

    /// Threads that hear of page faults in a post-copy: see [`DestinationConfig::fault_threads`].
    #[must_use]
    pub fn fault_threads(mut self, threads: usize) -> Self {
        self.config.fault_threads = threads;
        self
    }

    /// How long to wait for the source when the link of a post-copy is gone: see
    /// [`DestinationConfig::recover`].
    #[must_use]
    pub fn recover(mut self, limit: Duration) -> Self {
        self.config.recover = Some(limit);
        self
    }

    /// When to acknowledge the switch-over unasked: see [`DestinationConfig::switchover_ack`].
    #[must_use]
    pub fn switchover_ack(mut self, ack: SwitchoverAck) -> Self {
        self.config.switchover_ack = ack;
        self
    }

    /// Most bytes of devices' sections: see [`DestinationConfig::max_device_state`].
    #[must_use]
    pub fn max_device_state(mut self, bytes: usize) -> Self {
        self.config.max_device_state = Some(bytes);
        self
    }

    /// How long to wait for the source: see [`DestinationConfig::timeout`].
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.config.timeout = timeout;
        self
    }

    /// How long a source that cannot say that it is held may be silent between two rounds: see
    /// [`DestinationConfig::hold_timeout`].
    #[must_use]
    pub fn hold_timeout(mut self, limit: Duration) -> Self {
        self.config.hold_timeout = Some(limit);
        self
    }

    /// Limit on guest RAM: see [`DestinationConfig::max_ram`].
    #[must_use]
    pub fn max_ram(mut self, bytes: u64) -> Self {
        self.config.max_ram = Some(bytes);
        self
    }

    /// Limit on memory beside guest RAM: see [`DestinationConfig::max_memory`].
    #[must_use]
    pub fn max_memory(mut self, bytes: u64) -> Self {
        self.config.max_memory = Some(bytes);
        self
    }

    /// Limit on the time of the whole migration: see [`DestinationConfig::deadline`].
    #[must_use]
    pub fn deadline(mut self, deadline: Option<Duration>) -> Self {
        self.config.deadline = deadline;
        self
    }

    /// Device state over parallel channels: see [`DestinationConfig::device_packets`].
    #[must_use]
    pub fn device_packets(mut self, take: bool) -> Self {
        self.config.device_packets = take;
        self
    }

    /// RAM read again at the end: see [`DestinationConfig::verify`].
    #[must_use]
    pub fn verify(mut self, verify: bool) -> Self {
        self.config.verify = verify;
        self
    }

    /// How sockets are tuned: see [`DestinationConfig::socket`].
    #[must_use]
    pub fn socket_options(mut self, options: SocketOptions) -> Self {
        self.config.socket = options;
        self
    }

    /// Opens the listening socket. The source may connect from now on.
    ///
    /// # Errors
    /// `ApiMisuse` that names the setting or a codec with a reserved id, `Transport` if the address
    /// cannot be listened on.
    pub fn listen(self, endpoint: &Endpoint) -> Result<Destination> {
        self.codecs.iter().try_for_each(|codec| dialect::check_codec(&**codec, Phase::Accept))?;
        // Before a command is started or a file opened. What a descriptor is, shows when it is
        // open.
        let unknown = matches!(endpoint, Endpoint::Fd(_) | Endpoint::FdFrom(_));
        let is_file = matches!(endpoint, Endpoint::File { .. });
        self.check(endpoint, unknown || endpoint.takes_several(), is_file)?;
        let session = Session::new(self.config.timeout);
        let listener = Listener::bind_with(endpoint, &session.socket_options(&self.config.socket))
            .map_err(|error| Error::transport(Phase::Accept, error))?
            .tls(self.tls.clone());
        self.check(endpoint, listener.takes_several(), listener.reads_file())?;
        Ok(self.served_by(listener, session))
    }

    /// Receives over connections that the caller has made, instead of listening: main and one
    /// connection for each parallel channel that the source has, in any order, since each says by
    /// its first bytes what it is. They are sockets of any family, or one pipe or file for main
    /// alone; [`Channel`] is made from any of them, close-on-exec or not. There are no strangers
    /// among them, so a connection that fails or is something else ends the migration. Socket
    /// options are left as they are. With [`tls`](Self::tls) they are plain sockets, on each of
    /// which the source shakes hands.
    ///
    /// # Errors
    /// `ApiMisuse` that names the setting: TLS over what is no socket, or another number of
    /// channels.
    pub fn over(mut self, main: Channel, channels: Vec<Channel>) -> Result<Destination> {
        self.codecs.iter().try_for_each(|codec| dialect::check_codec(&**codec, Phase::Accept))?;
        let misuse = |problem: String| Error::new(ErrorKind::ApiMisuse, Phase::Accept, problem);
        let tls = self.tls.is_some();
        let is_file = main.file_handle().is_some();
        self.config.channels = own::count(self.config.channels, &main, &channels, tls).map_err(misuse)?;
        let endpoint = Endpoint::Fd(main.descriptor_number().unwrap_or(-1));
        let one_plain = !tls && channels.is_empty();
        self.check(&endpoint, !one_plain, is_file)?;
        let connections = std::iter::once(main).chain(channels).collect();
        let session = Session::new(self.config.timeout);
        let listener = Listener::of_connections(connections, endpoint).tls(self.tls.clone());
        Ok(self.served_by(listener, session))
    }

    fn served_by(self, listener: Listener, session: Arc<Session>) -> Destination {
        let listener = Arc::new(listener.opening_len(super::channels::accept::opening_len));
        let Self { config, ram, codecs, tls, hook, sharing } = self;
        Destination { listener, session, config, ram: Some(ram), codecs, tls, hook, sharing }
    }

    fn check(&self, endpoint: &Endpoint, takes_several: bool, is_file: bool) -> Result<()> {
        self.config
            .check(endpoint, self.tls.is_some(), takes_several, is_file)
            .map_err(|problem| Error::new(ErrorKind::ApiMisuse, Phase::Accept, problem))
    }
}
