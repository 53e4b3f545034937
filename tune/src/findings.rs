//! All that is found, as `--json` shows it, and as the table and the page read it.

use serde::Serialize;
use serde_json::Value;

#[derive(Clone, Debug, Serialize)]
pub(super) struct Findings {
    /// What was looked at: `checkpoint DIR`, `stream FILE`, `process 4711 (qemu-system-x86)`.
    pub(super) source: String,
    /// Bytes of all RAM blocks.
    pub(super) ram_bytes: u64,
    pub(super) sample: SampleFacts,
    pub(super) pages: PageKinds,
    pub(super) machine: Machine,
    /// By codec and level, in the order none, zlib 1.., zstd 1...
    pub(super) codecs: Vec<CodecFacts>,
    /// Where pages were seen twice.
    pub(super) xbzrle: Option<XbzrleFacts>,
    pub(super) dirty: DirtyFacts,
    pub(super) downtime_limit_ms: u64,
    /// For each link, number of channels, codec and level.
    pub(super) predictions: Vec<Prediction>,
    /// For each link, in the order of `predictions`.
    pub(super) advice: Vec<Advice>,
    pub(super) curves: Curves,
    /// What a reader should know beside that.
    pub(super) notes: Vec<String>,
}

/// What was read to find out.
#[derive(Clone, Copy, Debug, Serialize)]
pub(super) struct SampleFacts {
    pub(super) pages: u64,
    pub(super) bytes: u64,
    /// Of all pages that may hold data, 0.0 to 1.0.
    pub(super) share: f64,
}

/// Shares of all pages of the guest, 0.0 to 1.0; together 1.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(super) struct PageKinds {
    pub(super) zero: f64,
    /// Equal to another page of the sample.
    pub(super) duplicate: f64,
    /// Encrypted, compressed already, or random.
    pub(super) incompressible: f64,
    pub(super) text: f64,
    /// Code, heap, tables.
    pub(super) other: f64,
}

/// What this machine takes for the parts of a move, in seconds on one core.
#[derive(Clone, Copy, Debug, Serialize)]
pub(super) struct Machine {
    /// That each end may use.
    pub(super) cores: usize,
    /// Sending a byte through a tcp socket, reading it from guest memory included.
    pub(super) send_byte_s: f64,
    pub(super) receive_byte_s: f64,
    /// Finding a byte of guest memory that this process has just mapped.
    pub(super) look_byte_s: f64,
    /// Storing a byte that has arrived in memory that the host has yet to find.
    pub(super) land_byte_s: f64,
    /// The same by page faults, as QEMU does.
    pub(super) fault_byte_s: f64,
    /// Making a byte of memory that the guest never touched, as QEMU does when it looks for zeros.
    pub(super) touch_byte_s: f64,
}

/// One codec at one level, as measured on the sample.
#[derive(Clone, Debug, Serialize)]
pub(super) struct CodecFacts {
    /// As `--codec` takes it: `none`, `zlib:1`, `zstd:3`.
    pub(super) codec: String,
    /// Bytes of pages that are not zero to a byte of payload.
    pub(super) ratio: f64,
    /// Half the width of the 95 % interval of `ratio`.
    pub(super) ratio_error: f64,
    /// Bytes of pages per second on one core; none: no limit of its own.
    pub(super) encode_bytes_per_s: Option<f64>,
    pub(super) decode_bytes_per_s: Option<f64>,
    /// Bytes of pages that it was measured on.
    pub(super) measured_bytes: u64,
}

/// What xbzrle makes of pages that were written again.
#[derive(Clone, Copy, Debug, Serialize)]
pub(super) struct XbzrleFacts {
    /// Pages that were seen in two versions.
    pub(super) pages: u64,
    /// Share of them that goes as a difference, 0.0 to 1.0.
    pub(super) encoded: f64,
    /// Bytes on the wire to a byte of rewritten page, all of them.
    pub(super) size: f64,
}

#[derive(Clone, Copy, Debug, Serialize)]
pub(super) struct DirtyFacts {
    pub(super) origin: DirtyOrigin,
    /// Distinct bytes of pages written in a second.
    pub(super) bytes_per_s: u64,
    /// Bytes of pages that are written at all.
    pub(super) working_set_bytes: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum DirtyOrigin {
    /// By `--dirty-rate`.
    Given,
    /// In a live process.
    Measured,
    /// A guest that stands still.
    Still,
    /// It was written while it was recorded, nobody knows how fast.
    Unknown,
}

/// One move that could be made.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Prediction {
    /// As it was typed: `1Gbit/s`, `loopback`.
    pub(super) link: String,
    pub(super) link_bytes_per_s: Option<u64>,
    pub(super) channels: usize,
    pub(super) codec: String,
    pub(super) total_ms: u64,
    pub(super) wire_bytes: u64,
    pub(super) rounds: u64,
    pub(super) downtime_ms: u64,
    pub(super) cpu_source_s: f64,
    pub(super) cpu_destination_s: f64,
    /// The guest can be stopped within the downtime limit.
    pub(super) converges: bool,
    pub(super) bottleneck: Bottleneck,
    /// The same with QEMU at both ends.
    pub(super) qemu_total_ms: u64,
    pub(super) qemu_converges: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Bottleneck {
    DestinationCpu,
    DirtyRate,
    Link,
    SourceCpu,
}

/// `zstd` of `zstd:3`
pub(super) fn family(codec: &str) -> &str {
    codec.split(':').next().unwrap_or(codec)
}

/// What to set for a link.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Advice {
    pub(super) link: String,
    /// The best, as an index into `predictions`.
    pub(super) best: usize,
    /// The best with another codec.
    pub(super) runner_up: Option<usize>,
    /// The move without compression, with the channels that suit it best.
    pub(super) plain: usize,
    /// One sentence: why, and at which price.
    pub(super) reason: String,
    /// Of `multifd send`.
    pub(super) flags: String,
    /// For the monitors of both QEMUs, in this order.
    pub(super) qmp: Vec<Value>,
}

/// What the plots show.
#[derive(Clone, Debug, Default, Serialize)]
pub(super) struct Curves {
    /// Seconds of the whole move over bytes per second of the link, from 10 Mbit/s to 100 Gbit/s; x rises.
    pub(super) total_by_link: Vec<Curve>,
    /// Seconds of downtime over distinct bytes written per second, at the first link that was asked for; a curve ends where the
    /// move no longer converges.
    pub(super) downtime_by_dirty_rate: Vec<Curve>,
}

#[derive(Clone, Debug, Serialize)]
pub(super) struct Curve {
    pub(super) codec: String,
    pub(super) points: Vec<(f64, f64)>,
}
