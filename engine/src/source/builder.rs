//! Settings of a source.

use std::num::NonZeroU64;
use std::sync::Arc;
use std::time::Duration;

use multifd_codecs::{Codec, Uncompressed};
use multifd_transports::{Endpoint, SocketOptions, TlsClient};
use multifd_wire::Configuration;

use super::control::Control;
use super::outgoing::ZeroPages;
use super::zero_copy::ZeroCopySend;
use crate::convergence::{AutoConverge, Limits};
use crate::dirty::DirtyLog;
use crate::error::{Error, ErrorKind, Phase, Result};
use crate::ram::{PAGE, RamBlock};
use crate::session::{Canceller, DEFAULT_TIMEOUT, ProgressReader, Session};

/// Most parallel channels: QEMU's limit.
const MAX_CHANNELS: usize = 255;

/// The sending end of a migration that has not been connected yet.
pub struct Source {
    pub(super) settings: SourceBuilder,
    pub(super) session: Arc<Session>,
    pub(super) control: Control,
}

/// Settings of a [`Source`]. Made by [`Source::builder`].
pub struct SourceBuilder {
    pub(super) ram: Vec<RamBlock>,
    pub(super) configuration: Configuration,
    pub(super) uuid: [u8; 16],
    pub(super) codec: Arc<dyn Codec>,
    pub(super) channels: usize,
    pub(super) max_bandwidth: Option<NonZeroU64>,
    pub(super) zero_pages: Option<ZeroPages>,
    pub(super) return_path: Option<bool>,
    pub(super) mapped_ram: bool,
    pub(super) direct_io: bool,
    pub(super) switchover_start: bool,
    pub(super) pause_before_switchover: bool,
    pub(super) timeout: Duration,
    pub(super) limits: Limits,
    pub(super) auto_converge: Option<AutoConverge>,
    pub(super) xbzrle_cache: Option<usize>,
    pub(super) logs: Vec<Box<dyn DirtyLog>>,
    pub(super) socket: SocketOptions,
    pub(super) channel_endpoints: Vec<Endpoint>,
    pub(super) zero_copy: ZeroCopySend,
    pub(super) tls: Option<TlsClient>,
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

    /// Parallel channels, each a socket and a thread, and about 2 MiB of buffers with a codec: 1..=255. To a file with
    /// [`mapped_ram`](Self::mapped_ram) each is a thread. 0, the default: everything goes on the main channel. A QEMU destination
    /// must be set to the same number.
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
    /// Needs feature `tls-aws-lc` or `tls-ring`.
    #[must_use]
    pub fn tls(mut self, tls: TlsClient) -> Self {
        self.tls = Some(tls);
        self
    }

    /// Has [`Precopy::stop_copy`](super::Precopy::stop_copy) wait for [`Control::proceed`] before the guest's last RAM goes. Default: no.
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
