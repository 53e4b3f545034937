//! The question: which guest, over which links, with which settings.

use std::num::{NonZeroU64, NonZeroUsize};
use std::path::PathBuf;
use std::time::Duration;

use multifd_codecs::CodecChoice;

/// What to predict. [`Config::new`] has the defaults.
#[derive(Clone, Debug)]
pub struct Config {
    /// The guest whose memory is sampled.
    pub source: Source,
    /// Links to predict for; not empty. Default: 100 Mbit/s, 1, 10 and 25 Gbit/s.
    pub links: Vec<Link>,
    /// Numbers of parallel channels to predict for, 0: the main channel alone. Default: 1, 2, 4, 8.
    pub channels: Vec<usize>,
    /// The only codec to measure beside none. Default: every level of zlib and zstd.
    pub codec: Option<CodecChoice>,
    /// Cores available per end. Default: those of this machine.
    pub cores: Option<NonZeroUsize>,
    /// Distinct bytes of pages that the guest writes per second; 0: it writes nothing. Default:
    /// measured in a live process; otherwise the guest counts as paused.
    pub dirty_rate: Option<u64>,
    /// Longest downtime, as for a move. Default: 300 ms.
    pub downtime_limit: Duration,
    /// Bytes per second over all channels, as for a move. Default: no limit.
    pub max_bandwidth: Option<NonZeroU64>,
    /// A smaller sample and fewer levels: seconds instead of a minute. Default: no.
    pub quick: bool,
    /// Bytes of pages to sample. Default: 256 MiB, 32 MiB with `quick`.
    pub sample: Option<u64>,
    /// Whether the channels will be encrypted, whose cost is not predicted: the findings say so.
    /// Default: no.
    pub tls: bool,
}

/// The guest whose memory is sampled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A checkpoint's directory, or a file with a stream, also as `file:PATH,offset=N`.
    Path(PathBuf),
    /// A live process, QEMU or another, by its number.
    Process(u32),
}

/// What connects the two ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// Name in predictions and advice: `1Gbit/s`, `loopback`.
    pub name: String,
    /// Bits on the wire, in bytes per second; `None`: both ends are on this machine and share its
    /// cores.
    pub rate: Option<NonZeroU64>,
}

/// How far the measurement is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Parts done of `total`: bytes while memory is read, codecs while they are measured.
    pub done: u64,
    /// All parts of this step.
    pub total: u64,
    /// The codec that is being measured.
    pub codec: Option<CodecChoice>,
}

/// Links between hosts today, by name and in bytes per second.
const LINKS: [(&str, u64); 4] = [
    ("100Mbit/s", 12_500_000),
    ("1Gbit/s", 125_000_000),
    ("10Gbit/s", 1_250_000_000),
    ("25Gbit/s", 3_125_000_000),
];

const CHANNELS: [usize; 4] = [1, 2, 4, 8];

impl Config {
    /// The defaults for this guest.
    pub fn new(source: Source) -> Self {
        Self {
            source,
            links: LINKS
                .map(|(name, rate)| Link { name: name.to_owned(), rate: NonZeroU64::new(rate) })
                .to_vec(),
            channels: CHANNELS.to_vec(),
            codec: None,
            cores: None,
            dirty_rate: None,
            downtime_limit: Duration::from_millis(300),
            max_bandwidth: None,
            quick: false,
            sample: None,
            tls: false,
        }
    }
}
