//! The command line's flags. Values are checked here, and applied elsewhere.

mod demo;
mod links;

use std::num::NonZeroU64;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use multifd_codecs::CodecChoice;
use multifd_engine::{SwitchoverAck, ZeroPages};
use multifd_transports::Endpoint;
use multifd_tune::Link;
use tracing_subscriber::filter::LevelFilter;

pub(crate) use self::demo::{Demo, DemoDestination};
use self::links::{Following, Resumption};
use crate::human;
use crate::sockets::{Sockets, SourceSockets};

const EXIT_CODES: &str = "Exit codes: 0 done; 1 failed, the source may run on; 2 wrong usage; \
    3 failed after the guest was handed over; 130 cancelled.\n\
    URIs: tcp:HOST:PORT (port 0: any free port), unix:PATH, file:PATH[,offset=N], fd:N (an inherited socket, pipe or file; \
    0 is standard input), fd:unix:PATH (a descriptor that is handed over there), exec:COMMAND, vsock:CID:PORT.";

/// Moves live guests between hosts, to and from disk; speaks QEMU's migration stream in both
/// directions.
#[derive(Debug, Parser)]
#[command(name = "multifd", version, after_help = EXIT_CODES)]
pub(crate) struct Flags {
    #[command(subcommand)]
    pub(crate) command: Command,
    #[command(flatten)]
    pub(crate) common: Common,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Move a live guest from this process to another on this machine, and compare every page
    Demo(Demo),
    /// The other process of the demo
    #[command(hide = true)]
    DemoDestination(DemoDestination),
    /// Show what is in a checkpoint or a recorded stream
    Inspect(Inspect),
    /// Be the destination of any QEMU or multifd source; write a checkpoint
    Receive(Receive),
    /// Be the source: a checkpoint goes to QEMU -incoming or to multifd receive
    Send(Send),
    /// Predict what a move of this memory will cost over a link, and what to set
    Tune(Tune),
    /// Make a test CA, and certificates and keys for both ends, under the names that QEMU uses
    TlsInit(TlsInit),
}

impl Command {
    /// Whether the command moves a guest, which a signal must not leave half moved.
    pub(crate) fn migrates(&self) -> bool {
        match self {
            Self::Demo(_) | Self::Receive(_) | Self::Send(_) => true,
            Self::DemoDestination(_) | Self::Inspect(_) | Self::Tune(_) | Self::TlsInit(_) => false,
        }
    }
}

/// Flags of every command.
#[derive(Debug, Args)]
pub(crate) struct Common {
    /// Parallel channels, 1 to 255; of a mapped-ram file: threads. Default: none for send, any
    /// number for receive
    #[arg(long, global = true, value_name = "N", value_parser = human::channels)]
    pub(crate) channels: Option<usize>,
    /// none, zlib or zstd, with a level as in zstd:3, on the parallel channels; to a multifd
    /// destination also lz4, and auto, which chooses for each packet by what is measured. For
    /// receive: refuse any other. For tune: only this and none
    #[arg(long, global = true, value_name = "CODEC", value_parser = codec)]
    pub(crate) codec: Option<CodecFlag>,
    /// Limit over all channels, such as 1Gbit/s, 100MiB/s or 512K; 0: unlimited
    #[arg(long, global = true, value_name = "RATE", value_parser = human::rate)]
    pub(crate) max_bandwidth: Option<Rate>,
    /// Longest time for which a live guest may be paused, such as 300ms. No effect on a checkpoint
    #[arg(long, global = true, value_name = "TIME", default_value = "300ms", value_parser = human::duration)]
    pub(crate) downtime_limit: Duration,
    /// Abort if the peer sends or takes nothing for this long; also the limit for connecting
    #[arg(long, global = true, value_name = "TIME", default_value = "60s", value_parser = human::duration)]
    pub(crate) timeout: Duration,
    /// Encrypt all channels by TLS, with ca-cert.pem, server-cert.pem, server-key.pem (receive),
    /// client-cert.pem, client-key.pem (send) of this directory
    #[arg(long, global = true, value_name = "DIR")]
    pub(crate) tls_dir: Option<PathBuf>,
    /// For send: the name that the destination's certificate must have. Default: the host of the
    /// URI
    #[arg(long, global = true, value_name = "NAME", requires = "tls_dir")]
    pub(crate) tls_hostname: Option<String>,
    /// With TLS: a revocation list past its next update is an error. Default: a warning, and it
    /// still counts
    #[arg(long, global = true, requires = "tls_dir")]
    pub(crate) tls_crl_strict: bool,
    /// Let the process open any file and start any program also once it reads what others wrote.
    /// Default: only its own files, and no programs, where the kernel can see to it; no sandbox
    /// with exec:
    #[arg(long, global = true)]
    pub(crate) no_sandbox: bool,
    /// One JSON object on stdout instead of a table
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// How progress is told on stderr; auto: a line that is rewritten on a terminal, else a line
    /// every few seconds; json: an event a second, one a line
    #[arg(long, global = true, value_enum, value_name = "HOW", default_value_t = ProgressKind::Auto)]
    pub(crate) progress: ProgressKind,
    /// Do not let the system write this process into a core dump, nor others of this user look into
    /// it: it holds the guest's RAM and keys. The RAM itself is never in one
    #[arg(long, global = true)]
    pub(crate) no_core_dump: bool,
    /// No progress
    #[arg(short, long, global = true)]
    pub(crate) quiet: bool,
    /// Log more to stderr; twice for still more
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub(crate) verbose: u8,
}

#[derive(Debug, Args)]
pub(crate) struct Receive {
    /// Where to listen, or the file to read
    pub(crate) uri: Endpoint,
    /// The checkpoint to write; must not exist
    #[arg(long, value_name = "DIR")]
    pub(crate) out: PathBuf,
    /// Read the pages of a mapped-ram file with direct I/O, without the page cache
    #[arg(long)]
    pub(crate) direct_io: bool,
    /// When to acknowledge the switch-over; auto: at once to machine types 8.1 to 11.0, to others
    /// when the source has nothing left to send and waits
    #[arg(long, value_enum, default_value_t = Ack::Auto)]
    pub(crate) switchover_ack: Ack,
    /// When the link breaks after the source has switched to post-copy, listen again at the same
    /// address, for this long each time. Default: fail, and leave the rest of the guest at the
    /// source
    #[arg(long, value_name = "TIME", value_parser = human::duration)]
    pub(crate) recover: Option<Duration>,
    /// When the link of a multifd source breaks before the guest is handed over, keep what has come
    /// and listen again at the same address, for this long each time: a source with --resume-for
    /// goes on where it was. Not shorter than --timeout. Default: fail
    #[arg(long, value_name = "TIME", value_parser = human::duration)]
    pub(crate) resume_for: Option<Duration>,
    /// How long the source may be silent between two rounds: for a QEMU that is held before the
    /// switch-over (pause-before-switchover), which cannot say that it is alive. Its host must
    /// answer --keepalive. Default: --timeout
    #[arg(long, value_name = "TIME", value_parser = human::duration)]
    pub(crate) hold_timeout: Option<Duration>,
    /// Refuse a guest with more RAM than this, such as 64G; 0: no limit. Default: what is free in
    /// the file system of --out, since a source decides how much of its RAM is not zero
    #[arg(long, value_name = "SIZE", value_parser = human::size)]
    pub(crate) max_ram: Option<u64>,
    /// Memory that the source can make this process use, all channels together, files in the page
    /// cache apart
    #[arg(long, value_name = "SIZE", default_value = "1G", value_parser = human::size)]
    pub(crate) max_memory: u64,
    /// Give up when the guest has not come whole after this time, however it comes. Default: never,
    /// as long as a byte comes within --timeout
    #[arg(long, value_name = "TIME", value_parser = human::duration)]
    pub(crate) deadline: Option<Duration>,
    /// Read all RAM again when the last page is there, and refuse a guest of which a page is not
    /// what was placed. It is paused meanwhile
    #[arg(long)]
    pub(crate) verify: bool,
    /// With TLS: accept a source whose certificate has this subject (CN=host,O=Example) or
    /// alternative name (host.example); * is any text. May be repeated. Default: every source with
    /// a certificate of the CA
    #[arg(long, value_name = "NAME", requires = "tls_dir")]
    pub(crate) tls_authz: Vec<String>,
    /// With TLS: accept sources without a certificate
    #[arg(long, requires = "tls_dir", conflicts_with = "tls_authz")]
    pub(crate) tls_no_client_auth: bool,
    #[command(flatten)]
    pub(crate) sockets: Sockets,
}

#[derive(Debug, Args)]
pub(crate) struct Send {
    /// The checkpoint
    pub(crate) dir: PathBuf,
    /// Where the destination listens, or the file to write
    pub(crate) uri: Endpoint,
    /// Do not ask the destination to confirm that the guest has arrived. Default for exec:, pipes
    /// and files
    #[arg(long)]
    pub(crate) no_return_path: bool,
    /// Ask the destination to confirm also behind exec:, whose command must pass on what it answers
    #[arg(long, conflicts_with = "no_return_path")]
    pub(crate) return_path: bool,
    /// Start the guest at the destination at once, and have its RAM follow while it runs (QEMU:
    /// capability postcopy-ram)
    #[arg(long, conflicts_with_all = ["mapped_ram", "no_return_path"])]
    pub(crate) postcopy: bool,
    #[command(flatten)]
    pub(crate) following: Following,
    #[command(flatten)]
    pub(crate) resumption: Resumption,
    /// To file: give each page a fixed place, written by --channels threads
    #[arg(long)]
    pub(crate) mapped_ram: bool,
    /// To a new file: write an image that virsh restore takes, with the domain of this one, which
    /// virsh save has written; with --mapped-ram in libvirt's format sparse, else raw
    #[arg(long, value_name = "IMAGE", conflicts_with = "postcopy")]
    pub(crate) libvirt_header: Option<PathBuf>,
    /// With --mapped-ram, write the pages past the page cache
    #[arg(long, requires = "mapped_ram")]
    pub(crate) direct_io: bool,
    /// How zero pages go, in QEMU's words. Default: what QEMU does for the machine type
    #[arg(long, value_enum, value_name = "HOW")]
    pub(crate) zero_page_detection: Option<ZeroPageDetection>,
    #[command(flatten)]
    pub(crate) proof: Proof,
    #[command(flatten)]
    pub(crate) sockets: SourceSockets,
}

/// What another multifd checks of what is sent.
#[derive(Debug, Args)]
pub(crate) struct Proof {
    /// Checksums of the parallel channels' packets, which a multifd destination compares before it
    /// places a page. Default: with a codec
    #[arg(long, overrides_with = "no_checksums")]
    checksums: bool,
    /// No such checksums
    #[arg(long, overrides_with = "checksums")]
    no_checksums: bool,
    /// A digest of all RAM, which a multifd destination compares with its own before the guest is
    /// handed over. Default: with a codec
    #[arg(long, overrides_with = "no_digest")]
    digest: bool,
    /// No such digest
    #[arg(long, overrides_with = "digest")]
    no_digest: bool,
}

impl Proof {
    pub(crate) fn checksums(&self) -> Option<bool> {
        (self.checksums || self.no_checksums).then_some(self.checksums)
    }

    pub(crate) fn digest(&self) -> Option<bool> {
        (self.digest || self.no_digest).then_some(self.digest)
    }
}

#[derive(Debug, Args)]
pub(crate) struct Inspect {
    /// A checkpoint's directory, or a file with a stream that QEMU wrote to exec: or file:, with
    /// mapped-ram or without. As file:PATH,offset=N: a stream within a file. -v adds the fields of
    /// every device
    pub(crate) path: PathBuf,
    /// Another one: show only in which fields of which devices they differ
    pub(crate) other: Option<PathBuf>,
    /// Only check the devices' state: rings within RAM, indices, vectors, features. The exit code
    /// is 1 if something is inconsistent
    #[arg(long, conflicts_with = "other")]
    pub(crate) check: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Tune {
    /// A checkpoint's directory, or a file with a stream that QEMU wrote to exec: or file:
    #[arg(required_unless_present = "pid", conflicts_with = "pid")]
    pub(crate) source: Option<PathBuf>,
    /// The memory of a live process, QEMU or another, which is not stopped
    #[arg(long, value_name = "PID")]
    pub(crate) pid: Option<u32>,
    /// Speed of a link, such as 1Gbit/s, or loopback: both ends on this machine. May be repeated.
    /// Default: 100Mbit/s, 1Gbit/s, 10Gbit/s and 25Gbit/s
    #[arg(long, value_name = "RATE", value_parser = human::link)]
    pub(crate) link: Vec<Link>,
    /// Parallel channels, 1 to 255; 0: none. May be repeated. Default: 1, 2, 4 and 8
    #[arg(long, value_name = "N", value_parser = human::channels)]
    pub(crate) channels: Vec<usize>,
    /// Cores available per end. Default: those of this machine
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub(crate) cores: Option<u16>,
    /// Distinct bytes of pages that the guest writes per second. Default: measured in a live
    /// process, otherwise 0
    #[arg(long, value_name = "RATE", value_parser = human::rate)]
    pub(crate) dirty_rate: Option<Rate>,
    /// Write a page with plots for a browser
    #[arg(long, value_name = "FILE")]
    pub(crate) html: Option<PathBuf>,
    /// A smaller sample and fewer levels: seconds instead of a minute
    #[arg(long)]
    pub(crate) quick: bool,
    /// Bytes of pages to sample, at least 4 MiB. Default: 256M, with --quick 32M
    #[arg(long, value_name = "SIZE", value_parser = human::sample)]
    pub(crate) sample: Option<u64>,
}

#[derive(Debug, Args)]
pub(crate) struct TlsInit {
    /// Where the files go. None of them may be there already
    pub(crate) dir: PathBuf,
    /// Name or address of the destination, as sources dial it. May be repeated
    #[arg(long, value_name = "NAME", required = true, num_args = 1..)]
    pub(crate) host: Vec<String>,
    /// Common name of the source
    #[arg(long, value_name = "NAME", default_value = "client")]
    pub(crate) client: String,
    /// How long the certificates are valid
    #[arg(long, value_name = "N", default_value_t = 365, value_parser = clap::value_parser!(u16).range(1..=3650))]
    pub(crate) days: u16,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ProgressKind {
    Auto,
    Json,
    Lines,
    None,
}

/// A codec, or the choice of one for each packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CodecFlag {
    Auto,
    Fixed(CodecChoice),
}

impl CodecFlag {
    /// The codec, where there is one.
    pub(crate) fn fixed(self) -> Option<CodecChoice> {
        match self {
            Self::Auto => None,
            Self::Fixed(choice) => Some(choice),
        }
    }

    /// What a QEMU would have to be set to.
    pub(crate) fn family(self) -> &'static str {
        self.fixed().map_or("none", |choice| choice.family().name())
    }
}

/// Bytes per second; `Rate(None)`: unlimited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Rate(pub(crate) Option<NonZeroU64>);

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum Ack {
    Auto,
    Always,
    Never,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum ZeroPageDetection {
    Multifd,
    Legacy,
    None,
}

impl Common {
    /// Bytes per second over all channels; `None`: unlimited.
    pub(crate) fn max_bandwidth(&self) -> Option<NonZeroU64> {
        self.max_bandwidth.and_then(|Rate(limit)| limit)
    }

    pub(crate) fn log_level(&self) -> Option<LevelFilter> {
        match (self.quiet, self.verbose) {
            (true, _) => None,
            (false, 0) => Some(LevelFilter::WARN),
            (false, 1) => Some(LevelFilter::DEBUG),
            (false, _) => Some(LevelFilter::TRACE),
        }
    }
}

impl From<Ack> for SwitchoverAck {
    fn from(ack: Ack) -> Self {
        match ack {
            Ack::Auto => Self::Auto,
            Ack::Always => Self::Always,
            Ack::Never => Self::Never,
        }
    }
}

impl From<ZeroPageDetection> for ZeroPages {
    fn from(detection: ZeroPageDetection) -> Self {
        match detection {
            ZeroPageDetection::Multifd => Self::Multifd,
            ZeroPageDetection::Legacy => Self::Legacy,
            ZeroPageDetection::None => Self::None,
        }
    }
}

fn codec(text: &str) -> Result<CodecFlag, String> {
    if text == "auto" {
        return Ok(CodecFlag::Auto);
    }
    text.parse::<CodecChoice>().map(CodecFlag::Fixed).map_err(|error| format!("{error}, or auto"))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_flags_are_consistent() {
        Flags::command().debug_assert();
    }

    #[test]
    fn common_flags_may_come_before_and_after_the_command() {
        for line in [
            "multifd --json -q send dir tcp:h:1 --channels 2",
            "multifd send --channels 2 dir tcp:h:1 --json -q",
        ] {
            let flags = Flags::try_parse_from(line.split(' ')).unwrap();
            assert!(flags.common.json && flags.common.quiet);
            assert_eq!(flags.common.channels, Some(2));
        }
    }

    #[test]
    fn the_limit_of_the_switch_over_is_one_of_its_own() {
        let line = "multifd demo --max-bandwidth 2KiB/s --max-switchover-bandwidth 1KiB/s";
        let flags = Flags::try_parse_from(line.split(' ')).unwrap();
        let Command::Demo(demo) = flags.command else { panic!("not a demo") };
        let limits = demo.convergence.limits(Duration::ZERO);
        assert_eq!(limits.max_switchover_bandwidth, NonZeroU64::new(1 << 10));
        assert_eq!(flags.common.max_bandwidth(), NonZeroU64::new(2 << 10));
    }

    #[test]
    fn a_source_takes_every_socket_flag() {
        let line = "multifd send d tcp:h:1 --bind 10.0.0.1 --channel-uri tcp:a:1 --channel-uri tcp:b:1 --keepalive 5s,2s \
            --user-timeout 9s --send-buffer 1M --receive-buffer 64K --mptcp --zero-copy-send --return-path";
        let flags = Flags::try_parse_from(line.split_whitespace()).unwrap();
        let Command::Send(send) = flags.command else { panic!("{flags:?}") };
        let options = send.sockets.options();
        assert_eq!(options.bind, Some([10, 0, 0, 1].into()));
        assert_eq!(options.keepalive.map(|keepalive| keepalive.timeout()), Some(Duration::from_secs(11)));
        assert_eq!(options.user_timeout, Some(Duration::from_secs(9)));
        assert_eq!((options.send_buffer, options.receive_buffer), (Some(1 << 20), Some(64 << 10)));
        assert!(options.mptcp && options.no_delay && send.return_path);
        assert_eq!(send.sockets.channel_uri.len(), 2);
        assert_eq!(send.sockets.zero_copy_send(), multifd_engine::ZeroCopySend::WhileItPays);
        assert!(Flags::try_parse_from("multifd receive u --out d --bind 10.0.0.1".split(' ')).is_err());
    }

    #[test]
    fn tune_takes_several_links_and_numbers_of_channels() {
        let line = "multifd tune dir --link 1Gbit/s --link loopback --channels 2 --channels 4 --cores 3 --downtime-limit 1s";
        let flags = Flags::try_parse_from(line.split(' ')).unwrap();
        let Command::Tune(tune) = flags.command else { panic!("{flags:?}") };
        assert_eq!(tune.channels, [2, 4]);
        let rates: Vec<_> = tune.link.iter().map(|link| link.rate.map(NonZeroU64::get)).collect();
        assert_eq!(rates, [Some(125_000_000), None]);
        assert_eq!(flags.common.downtime_limit, Duration::from_secs(1));
        for line in ["multifd tune", "multifd tune dir --pid 1", "multifd tune dir --link 0"] {
            assert!(Flags::try_parse_from(line.split(' ')).is_err(), "{line}");
        }
    }

    #[test]
    fn a_codec_is_one_or_the_choice_of_one() {
        let codec = |text: &str| {
            let flags = Flags::try_parse_from(["multifd", "send", "d", "tcp:h:1", "--codec", text]);
            flags.map(|flags| flags.common.codec.unwrap())
        };
        assert_eq!(codec("auto").unwrap(), CodecFlag::Auto);
        assert_eq!(codec("lz4").unwrap(), CodecFlag::Fixed(CodecChoice::Lz4));
        assert_eq!(codec("auto").unwrap().family(), "none");
        let error = codec("auto:3").unwrap_err().to_string();
        assert!(error.contains("auto:3") && error.contains("zstd[:0..20], or auto"), "{error}");
    }

    #[test]
    fn a_wrong_value_is_repeated() {
        let error =
            Flags::try_parse_from(["multifd", "send", "d", "tcp:h:1", "--codec", "zstd:99"]).unwrap_err();
        assert!(error.to_string().contains("zstd:99"), "{error}");
        assert_eq!(error.exit_code(), 2);
    }
}
