//! Settings of a source.

use std::num::NonZeroU64;
use std::time::Duration;

use multifd_codecs::{Codec, CodecId};
use multifd_transports::{Endpoint, SocketOptions};
use multifd_wire::Wishes;
use serde::Serialize;

use super::parameter;
use super::rule::{self, Feature};
use crate::convergence::{AutoConverge, Limits, OnStall};
use crate::run::session::DEFAULT_TIMEOUT;
use crate::source::{ZeroCopySend, ZeroPages};
use crate::stream::dialect::MAX_URGENT_CHANNELS;

/// How a source moves its guest: plain data. What is an object (the guest's RAM, dirty logs, the
/// codec, TLS credentials) is the [`SourceBuilder`](crate::SourceBuilder)'s.
///
/// ```
/// let mut config = multifd_engine::SourceConfig::default();
/// config.channels = 4;
/// config.limits.downtime_limit = std::time::Duration::from_millis(100);
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct SourceConfig {
    /// Parallel channels, each a socket and a thread, and about 2 MiB of buffers with a codec:
    /// 1..=255. To a file with `mapped_ram` each is a thread. 0, the default: everything goes on
    /// the main channel. A QEMU destination must be set to the same number.
    pub channels: usize,
    /// Where the parallel channels connect to, one after the other and round again: other addresses
    /// of the destination, to use several networks. Default: none, where main connects to.
    pub channel_endpoints: Vec<Endpoint>,
    /// Gives every page a fixed place in the file that it goes to, where `channels` threads write
    /// at a time, or the caller's if that is 0; a page that is sent again is written over. For a
    /// [`file`](Endpoint::File) only. Default: no.
    pub mapped_ram: bool,
    /// Writes the pages past the page cache (O_DIRECT). Guest memory must begin at a multiple of
    /// the disk's block size. Default: no.
    pub direct_io: bool,
    /// Has the kernel send pages straight from guest memory, on parallel channels over plain TCP.
    /// Default: off; the kernel's copy is cheap, and only a fast network card makes up for what
    /// this costs.
    pub zero_copy: ZeroCopySend,
    /// How zero pages go. Default: `None`, as QEMU does for the machine type,
    /// [`ZeroPages::for_machine`].
    pub zero_pages: Option<ZeroPages>,
    /// Sends pages that are written again as differences, with a cache of this many bytes: a power
    /// of two, at least 4096. On the main channel to every destination, on parallel channels to
    /// another multifd. Default: no cache.
    pub xbzrle_cache: Option<usize>,
    /// Bytes per second over all channels while the guest runs. Default: no limit. At the
    /// switch-over, while the guest is paused, [`Limits::max_switchover_bandwidth`] holds instead.
    pub max_bandwidth: Option<NonZeroU64>,
    /// By what rounds go on or end. Default: [`Limits::default`].
    pub limits: Limits,
    /// Says after each round how much to hold the vCPUs back, if the guest writes faster than its
    /// pages are sent: in [`RoundRecord::throttle_percent`](crate::RoundRecord). Default: never.
    pub auto_converge: Option<AutoConverge>,
    /// Has the destination confirm that the guest has arrived. Without it, it is not known whether
    /// it did. Default: `None`, yes over sockets; no to a command, which has to pass answers on if
    /// this is set, and over a pipe or to a file, which cannot.
    pub return_path: Option<bool>,
    /// Allows [`Precopy::switch_to_postcopy`](crate::Precopy::switch_to_postcopy): the destination
    /// must allow it, too (QEMU's capability `postcopy-ram`). Over sockets, with a return path.
    /// Parallel channels and their codec serve to the end where the destination is multifd, too; to
    /// a QEMU, and xbzrle everywhere, up to the switch. A QEMU before 10.1 takes no migration that
    /// has both. Default: no.
    pub postcopy: bool,
    /// Gives the pages that the guest waits for in a post-copy a connection of their own, so that
    /// they do not queue behind others (QEMU's capability `postcopy-preempt`, from 7.1 on, which
    /// the destination must have on). Default: no.
    pub postcopy_preempt: bool,
    /// Connections for the pages that the guest waits for in a post-copy, to another multifd:
    /// 0..=8. With parallel channels they are there without `postcopy_preempt`, too, made when the
    /// guest is handed over; without parallel channels only with it. 0: such pages go on the main
    /// channel. To a QEMU there is one, with `postcopy_preempt`. Default: 1.
    pub postcopy_urgent_channels: usize,
    /// Bytes per second of a post-copy's background stream. Pages that the guest waits for count,
    /// but never wait. Default: no limit.
    pub max_postcopy_bandwidth: Option<NonZeroU64>,
    /// For tests of a VMM and its dirty logs: keeps a digest of what was sent of each page (8 bytes
    /// a page, 2 MiB for a GiB of guest), and compares all of RAM with them when the guest is
    /// paused and its last RAM has gone. Pages that have changed without a dirty bit end the
    /// migration with [`MissedPages`](crate::MissedPages), and the guest runs on. Costs a copy of
    /// each page that is sent, and downtime: all of RAM is read, on all cores. A switch to
    /// post-copy compares nothing, since it does not wait for the last RAM. Default: no.
    pub audit: bool,
    /// Chooses the codec of each packet of the parallel channels by what is measured: how long a
    /// codec takes, what it saves, how long the channel waits for its link. Between two multifd
    /// ends, among none, lz4 and zstd at three levels; towards a QEMU, which is set to one codec,
    /// none. Changes are in the decision log. Not beside a codec. Default: no.
    pub auto_codec: bool,
    /// Gives each packet of the parallel channels a checksum, which another multifd looks at before
    /// it places a page of it: what was changed on the way ends the migration, and names channel,
    /// packet and block. TLS sees the same, and what was changed on purpose, too. Costs a copy of
    /// each page and a hash of it, at both ends. Not with zero-copy send. Default: where a codec
    /// reads the pages anyway; pages that go as they are in memory would cost the source twice the
    /// CPU time (docs/performance.md).
    pub checksums: Option<bool>,
    /// Keeps a digest of all RAM as its pages are sent, 8 bytes a page, and has another multifd,
    /// which keeps one as they are placed, compare them when the last page is there, before the
    /// guest is handed over. Up to a switch to post-copy, and not with zero-copy send. Costs as
    /// `checksums`, together not more than one of them. Default: as `checksums`.
    pub digest: Option<bool>,
    /// When a connection breaks or stalls before the guest is handed over, connects again for this
    /// long, and goes on where it was: another multifd keeps what has come
    /// ([`DestinationConfig::resume_for`](crate::DestinationConfig::resume_for)), and only what it
    /// has not, or what is newer, goes again. The guest runs on meanwhile; in the last round it is
    /// paused, and waits. Each time that a new link has moved pages counts anew. Over sockets that
    /// the engine dials, with a return path. Default: `None`, a link that breaks ends the
    /// migration.
    pub resume_for: Option<Duration>,
    /// With `resume_for`: sends everything again to a destination that knows nothing of the
    /// migration, because its process has ended and another listens there. Default: no, that ends
    /// the migration.
    pub resume_anew: bool,
    /// Announces the switch-over to the destination's devices: QEMU 10.0 with machine types from
    /// 10.0 on. Default: no.
    pub switchover_start: bool,
    /// Has [`Precopy::stop_copy`](crate::Precopy::stop_copy) wait for
    /// [`Control::proceed`](crate::Control::proceed) before the guest's last RAM goes. Default: no.
    pub pause_before_switchover: bool,
    /// How long to wait for the destination: to listen, to take the next byte, to confirm. Default:
    /// 60 s.
    pub timeout: Duration,
    /// How sockets are tuned. Default: [`SocketOptions::default`], and a user timeout that is 10 s
    /// longer than `timeout`: `timeout` detects a stalled peer, TCP's user timeout one that has
    /// vanished.
    pub socket: SocketOptions,
}

/// What a source's settings are checked against, as far as it is known: `None` is checked later.
#[derive(Clone, Copy)]
pub(crate) struct Surroundings<'a> {
    pub(crate) codec: &'a dyn Codec,
    pub(crate) tls: bool,
    /// Where main goes to.
    pub(crate) endpoint: Option<&'a Endpoint>,
    /// What main is, when it is connected.
    pub(crate) opened: Option<Opened>,
}

/// What a main channel is.
#[derive(Clone, Copy)]
pub(crate) struct Opened {
    pub(crate) file: bool,
    pub(crate) two_way: bool,
}

impl Default for SourceConfig {
    fn default() -> Self {
        Self {
            channels: 0,
            channel_endpoints: Vec::new(),
            mapped_ram: false,
            direct_io: false,
            zero_copy: ZeroCopySend::Off,
            zero_pages: None,
            xbzrle_cache: None,
            max_bandwidth: None,
            limits: Limits::default(),
            auto_converge: None,
            return_path: None,
            postcopy: false,
            postcopy_preempt: false,
            postcopy_urgent_channels: 1,
            max_postcopy_bandwidth: None,
            audit: false,
            auto_codec: false,
            checksums: None,
            digest: None,
            resume_for: None,
            resume_anew: false,
            switchover_start: false,
            pause_before_switchover: false,
            timeout: DEFAULT_TIMEOUT,
            socket: SocketOptions::default(),
        }
    }
}

impl SourceConfig {
    /// What another multifd is to check.
    pub(crate) fn wishes(&self, codec: &dyn Codec) -> Wishes {
        // What the kernel sends later may have another content than what was hashed.
        let known = self.zero_copy == ZeroCopySend::Off;
        let read = self.auto_codec || codec.id() != CodecId::NONE;
        Wishes {
            checksums: self.checksums.unwrap_or(read) && self.channels > 0 && known,
            digest: self.digest.unwrap_or(read) && known,
            mixed: self.channels > 0 && read,
        }
    }

    /// The one place that knows what may be combined: with each other, with the codec and TLS, and
    /// with where it goes to.
    pub(crate) fn check(&self, around: Surroundings<'_>) -> Result<(), String> {
        self.check_values()?;
        if self.auto_codec && around.codec.id() != CodecId::NONE {
            return Err(format!("codec {} beside the choice of one for each packet", around.codec.name()));
        }
        if let Some(rule) = rule::broken(|feature| self.has(feature, around)) {
            return Err(rule.to_string());
        }
        self.check_file(around)?;
        self.check_postcopy(around)?;
        self.check_resumption(around)?;
        self.check_sockets(around)
    }

    fn check_values(&self) -> Result<(), String> {
        if self.timeout.is_zero() {
            return Err("timeout is 0, expected more".to_owned());
        }
        let checked = || {
            if self.channels > 0 {
                parameter::MULTIFD_CHANNELS.check(self.channels as u64)?;
            }
            if let Some(bytes) = self.xbzrle_cache {
                parameter::XBZRLE_CACHE_SIZE.check(bytes as u64)?;
            }
            self.auto_converge.map_or(Ok(()), |settings| settings.check())
        };
        checked().map_err(|error| error.to_string())
    }

    fn has(&self, feature: Feature, around: Surroundings<'_>) -> bool {
        match feature {
            Feature::Audit => self.audit,
            Feature::ChannelAddresses => !self.channel_endpoints.is_empty(),
            Feature::Channels => self.channels > 0 && !self.mapped_ram,
            Feature::Compression => self.auto_codec || around.codec.id() != CodecId::NONE,
            Feature::DirectIo => self.direct_io,
            Feature::MappedRam => self.mapped_ram,
            Feature::Postcopy => self.postcopy,
            Feature::PostcopyPreempt => self.postcopy_preempt,
            Feature::Tls => around.tls,
            Feature::Xbzrle => self.xbzrle_cache.is_some(),
            Feature::ZeroCopySend => self.zero_copy != ZeroCopySend::Off,
        }
    }

    /// What may go to a file, and what to nothing else.
    fn check_file(&self, around: Surroundings<'_>) -> Result<(), String> {
        let one_way = around.is_file() == Some(true) || around.opened.is_some_and(|opened| !opened.two_way);
        match around.is_file() {
            Some(false) if self.mapped_ram => {
                Err("mapped-ram goes to file: only, where pages have fixed places".to_owned())
            }
            Some(true) if self.channels > 0 && !self.mapped_ram => {
                let text = "parallel channels to a file need mapped-ram, where pages have fixed places";
                Err(text.to_owned())
            }
            _ if self.return_path == Some(true) && one_way => {
                let text = "a return path was asked for, but nothing comes back over a pipe or from a file";
                Err(text.to_owned())
            }
            _ => Ok(()),
        }
    }

    /// A post-copy is a conversation.
    fn check_postcopy(&self, around: Surroundings<'_>) -> Result<(), String> {
        if self.limits.on_stall == OnStall::Postcopy && !self.postcopy {
            return Err("post-copy at a stall was asked for, but post-copy is not allowed".to_owned());
        }
        if self.postcopy_urgent_channels > MAX_URGENT_CHANNELS {
            return Err(format!(
                "{} channels for pages that are asked for, expected 0..={MAX_URGENT_CHANNELS}",
                self.postcopy_urgent_channels
            ));
        }
        if !self.postcopy {
            return Ok(());
        }
        if self.return_path == Some(false) {
            return Err("post-copy needs a return path, over which pages are asked for".to_owned());
        }
        match (around.opened, around.endpoint) {
            (Some(Opened { two_way: false, .. }), _) | (None, Some(Endpoint::File { .. })) => {
                Err("post-copy over a pipe or to a file, where nothing can be asked for".to_owned())
            }
            _ => Ok(()),
        }
    }

    /// What is connected again must be dialled, and answer.
    fn check_resumption(&self, around: Surroundings<'_>) -> Result<(), String> {
        match (self.resume_for, around.endpoint) {
            (None, _) if self.resume_anew => {
                Err("a new beginning at a destination that knows nothing was asked for, but no new link"
                    .to_owned())
            }
            (None, _) => Ok(()),
            (Some(Duration::ZERO), _) => Err("a new link within no time, expected more".to_owned()),
            _ if self.return_path == Some(false) => {
                Err("a new link for a broken one needs a return path, over which is told what has come"
                    .to_owned())
            }
            (_, Some(endpoint)) if !endpoint.takes_several() => {
                Err(format!("a new link for a broken one over {endpoint}, which cannot be connected again"))
            }
            (_, None) if around.opened.is_some() => Err(
                "a new link for a broken one over connections of the caller's, which only the caller makes"
                    .to_owned(),
            ),
            _ => Ok(()),
        }
    }

    /// What goes over some kinds of connections only.
    fn check_sockets(&self, around: Surroundings<'_>) -> Result<(), String> {
        let Some(main) = around.endpoint else { return Ok(()) };
        let all = || std::iter::once(main).chain(&self.channel_endpoints);
        let single = all().find(|endpoint| !endpoint.takes_several());
        if let Some(single) = single.filter(|_| self.has(Feature::Channels, around)) {
            return Err(format!(
                "{} parallel channels over {single}, which is one channel; they go over tcp, unix or vsock",
                self.channels
            ));
        }
        if let Some(single) = single.filter(|_| around.tls) {
            return Err(format!("TLS over {single}, expected tcp, unix or vsock"));
        }
        let other = all().find(|endpoint| !matches!(endpoint, Endpoint::Tcp { .. }));
        match other.filter(|_| self.has(Feature::ZeroCopySend, around)) {
            Some(other) => Err(format!("zero-copy send over {other}, expected plain TCP")),
            None => Ok(()),
        }
    }
}

impl Surroundings<'_> {
    /// Whether main is a file. What a descriptor is, shows when it is open.
    pub(crate) fn is_file(&self) -> Option<bool> {
        if let Some(opened) = self.opened {
            return Some(opened.file);
        }
        match self.endpoint? {
            Endpoint::File { .. } => Some(true),
            Endpoint::Fd(_) | Endpoint::FdFrom(_) => None,
            _ => Some(false),
        }
    }
}

#[cfg(test)]
mod tests {
    use multifd_codecs::{Uncompressed, Zlib};

    use super::*;

    fn says(config: &SourceConfig, codec: &dyn Codec, endpoint: Option<&str>) -> String {
        let endpoint = endpoint.map(|uri| uri.parse::<Endpoint>().unwrap());
        let around = Surroundings { codec, tls: false, endpoint: endpoint.as_ref(), opened: None };
        config.check(around).err().unwrap_or_default()
    }

    #[test]
    fn the_defaults_go_everywhere() {
        for endpoint in [None, Some("tcp:h:1"), Some("file:f"), Some("exec:cat"), Some("fd:7")] {
            assert_eq!(says(&SourceConfig::default(), &Uncompressed, endpoint), "");
        }
    }

    #[test]
    fn what_does_not_fit_is_named_before_anything_is_opened() {
        let channels = SourceConfig { channels: 4, ..SourceConfig::default() };
        let zlib = Zlib::default();
        assert_eq!(says(&channels, &zlib, Some("tcp:h:1")), "");
        assert!(says(&channels, &zlib, Some("exec:cat")).contains("over exec:cat, which is one channel"));
        assert!(says(&channels, &zlib, Some("file:f")).contains("need mapped-ram"));
        assert!(says(&SourceConfig::default(), &zlib, None).contains("needs parallel channels"));
        let many = SourceConfig { channels: 256, ..SourceConfig::default() };
        assert_eq!(says(&many, &zlib, None), "multifd-channels 256, expected 1..=255");
        let cache = SourceConfig { xbzrle_cache: Some(5000), ..SourceConfig::default() };
        assert!(says(&cache, &Uncompressed, None).starts_with("xbzrle-cache-size 5000, expected a power"));
        let mapped = SourceConfig { mapped_ram: true, ..channels };
        assert_eq!(says(&mapped, &Uncompressed, Some("file:f")), "");
        // What a descriptor is, is not known yet.
        assert_eq!(says(&mapped, &Uncompressed, Some("fd:7")), "");
        assert!(says(&mapped, &Uncompressed, Some("unix:s")).contains("mapped-ram goes to file: only"));
    }

    #[test]
    fn a_postcopy_needs_a_return_path() {
        let postcopy = SourceConfig { postcopy: true, ..SourceConfig::default() };
        assert_eq!(says(&postcopy, &Uncompressed, Some("tcp:h:1")), "");
        assert!(says(&postcopy, &Uncompressed, Some("file:f")).contains("where nothing can be asked for"));
        let mute = SourceConfig { return_path: Some(false), ..postcopy.clone() };
        assert!(says(&mute, &Uncompressed, None).contains("post-copy needs a return path"));
        let mapped = SourceConfig { mapped_ram: true, ..postcopy.clone() };
        assert!(says(&mapped, &Uncompressed, Some("file:f")).contains("a file runs no guest"));
        let preempt = SourceConfig { postcopy: false, postcopy_preempt: true, ..postcopy.clone() };
        assert!(says(&preempt, &Uncompressed, None).contains("needs post-copy"));
        let limits = Limits { on_stall: OnStall::Postcopy, ..Limits::default() };
        let stall = SourceConfig { limits, ..SourceConfig::default() };
        assert!(says(&stall, &Uncompressed, None).contains("post-copy is not allowed"));
        assert_eq!(says(&SourceConfig { limits, ..postcopy }, &Uncompressed, None), "");
    }

    #[test]
    fn the_choice_of_a_codec_needs_channels_and_no_other_codec() {
        let auto = SourceConfig { auto_codec: true, channels: 2, ..SourceConfig::default() };
        assert_eq!(says(&auto, &Uncompressed, Some("tcp:h:1")), "");
        assert!(says(&auto, &Zlib::default(), None).starts_with("codec zlib beside the choice of one"));
        let single = SourceConfig { channels: 0, ..auto.clone() };
        assert!(says(&single, &Uncompressed, None).contains("compression needs parallel channels"));
        let zero_copy = SourceConfig { zero_copy: ZeroCopySend::WhileItPays, ..auto };
        assert!(says(&zero_copy, &Uncompressed, None).contains("zero-copy send excludes compression"));
    }

    #[test]
    fn it_is_shown_as_json() {
        let config = SourceConfig {
            channels: 2,
            channel_endpoints: vec!["tcp:[::1]:7".parse().unwrap()],
            ..SourceConfig::default()
        };
        let json = serde_json::to_value(config).unwrap();
        assert_eq!(json["channels"], 2);
        assert_eq!(json["channel_endpoints"][0], "tcp:[::1]:7");
        assert_eq!(json["limits"]["on_stall"], "continue");
        assert_eq!(json["socket"]["no_delay"], true);
    }
}
