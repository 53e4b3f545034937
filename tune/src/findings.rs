//! Everything that is found, as it is serialised.

use std::fmt;

use multifd_codecs::CodecChoice;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// The findings about one guest. The JSON of `multifd tune --json` is this, beside `status` and
/// `error`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Findings {
    /// The sampled guest: `checkpoint DIR`, `stream FILE`, `process 4711 (qemu-system-x86)`.
    pub source: String,
    /// Bytes of all RAM blocks.
    pub ram_bytes: u64,
    /// What was read of it.
    pub sample: SampleFacts,
    /// Kinds of its pages.
    pub pages: PageKinds,
    /// Costs on this machine.
    pub machine: Machine,
    /// Codecs at their levels, in the order none, zlib:1.., zstd:1...
    pub codecs: Vec<CodecFacts>,
    /// The effect of xbzrle, where pages were seen in two versions.
    pub xbzrle: Option<XbzrleFacts>,
    /// What the guest writes.
    pub dirty: DirtyFacts,
    /// The configured downtime limit, in ms.
    pub downtime_limit_ms: u64,
    /// A prediction for each link, number of channels, codec and level.
    pub predictions: Vec<Prediction>,
    /// An advice for each link, in the order of `predictions`.
    pub advice: Vec<Advice>,
    /// Predictions over ranges of links and dirty rates.
    pub curves: Curves,
    /// Limits of these findings, in sentences.
    pub notes: Vec<String>,
}

/// Size of the sample.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[non_exhaustive]
pub struct SampleFacts {
    /// Pages read.
    pub pages: u64,
    /// Bytes of these pages.
    pub bytes: u64,
    /// Share of the pages that may hold data, 0.0 to 1.0.
    pub share: f64,
}

/// Shares of all pages of the guest by kind, 0.0 to 1.0; together 1.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
#[non_exhaustive]
pub struct PageKinds {
    /// All bytes are zero.
    pub zero: f64,
    /// Equal to another page of the sample.
    pub duplicate: f64,
    /// Encrypted, compressed already, or random.
    pub incompressible: f64,
    /// Mostly printable characters.
    pub text: f64,
    /// Anything else: code, heap, tables.
    pub other: f64,
}

/// Costs of the parts of a move on this machine, in seconds per byte on one core.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Machine {
    /// Cores available per end.
    pub cores: usize,
    /// Seconds to send one byte through a TCP socket, with reading it from guest memory.
    pub send_byte_s: f64,
    /// Seconds to receive one byte from a TCP socket.
    pub receive_byte_s: f64,
    /// Seconds to access one byte of guest memory that this process has just mapped.
    pub look_byte_s: f64,
    /// Seconds to store one received byte into memory not yet populated on the host, through the
    /// block's file.
    pub land_byte_s: f64,
    /// Seconds for the same through the mapping: by page faults, as QEMU does.
    pub fault_byte_s: f64,
    /// Seconds to allocate one byte of memory that the guest never touched, as QEMU does by looking
    /// for zeros.
    pub touch_byte_s: f64,
}

/// Measurements of one codec at one level on the sample.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[non_exhaustive]
pub struct CodecFacts {
    /// The codec and its level.
    pub codec: CodecChoice,
    /// Bytes of pages that are not zero per byte of payload.
    pub ratio: f64,
    /// Half the width of the 95 % interval of `ratio`.
    pub ratio_error: f64,
    /// Bytes of pages encoded per second on one core; `None`: the codec costs nothing.
    pub encode_bytes_per_s: Option<f64>,
    /// Bytes of pages decoded per second on one core; `None`: the codec costs nothing.
    pub decode_bytes_per_s: Option<f64>,
    /// Bytes of pages that were encoded to measure this.
    pub measured_bytes: u64,
}

/// The effect of xbzrle on pages that are written again.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[non_exhaustive]
pub struct XbzrleFacts {
    /// Pages seen in two versions.
    pub pages: u64,
    /// Share of them that is sent as a delta, 0.0 to 1.0.
    pub encoded: f64,
    /// Bytes on the wire per byte of rewritten page, over all of these pages.
    pub size: f64,
}

/// What the guest writes.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[non_exhaustive]
pub struct DirtyFacts {
    /// Where the rate is from.
    pub origin: DirtyOrigin,
    /// Distinct bytes of pages written per second.
    pub bytes_per_s: u64,
    /// Bytes of the pages that are written at all.
    pub working_set_bytes: u64,
}

/// Where a dirty rate is from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum DirtyOrigin {
    /// The configuration.
    Given,
    /// Pages of a live process that changed.
    Measured,
    /// A guest that is paused or at rest.
    Still,
    /// A stream of a guest that was running, which does not say how fast it wrote.
    Unknown,
}

/// The predicted cost of one possible move.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Prediction {
    /// Name of the link: `1Gbit/s`, `loopback`.
    pub link: String,
    /// Bits on the wire, in bytes per second; `None`: loopback.
    pub link_bytes_per_s: Option<u64>,
    /// Parallel channels; 0: the main channel alone.
    pub channels: usize,
    /// The codec and its level.
    pub codec: CodecChoice,
    /// Milliseconds of the whole move.
    pub total_ms: u64,
    /// Bytes on the wire.
    pub wire_bytes: u64,
    /// Rounds, with the last one.
    pub rounds: u64,
    /// Milliseconds for which the guest is paused.
    pub downtime_ms: u64,
    /// Seconds on cores of the source.
    pub cpu_source_s: f64,
    /// Seconds on cores of the destination.
    pub cpu_destination_s: f64,
    /// The guest can be paused within the downtime limit.
    pub converges: bool,
    /// What the move waits for most.
    pub bottleneck: Bottleneck,
    /// Milliseconds of the same move with QEMU at both ends.
    pub qemu_total_ms: u64,
    /// The same move converges with QEMU at both ends.
    pub qemu_converges: bool,
}

/// The part that a move waits for most.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Bottleneck {
    /// Cores of the destination.
    DestinationCpu,
    /// The guest, which writes faster than its pages are sent.
    DirtyRate,
    /// The link, or the bandwidth limit.
    Link,
    /// Cores of the source.
    SourceCpu,
}

/// The settings for a link.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Advice {
    /// Name of the link.
    pub link: String,
    /// Index in `predictions` of the best setting.
    pub best: usize,
    /// Index of the best setting with a codec of another family.
    pub runner_up: Option<usize>,
    /// Index of the best setting without compression.
    pub plain: usize,
    /// Why, and at which price, in one sentence.
    pub reason: String,
    /// Flags of `multifd send`.
    pub flags: String,
    /// Commands for the monitors of both QEMUs, in this order.
    pub qmp: Vec<QmpCommand>,
}

/// A command for a QEMU's monitor. Displayed with its name first, as people write it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct QmpCommand {
    /// Name of the command.
    pub execute: String,
    /// Its arguments by name.
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub arguments: Map<String, Value>,
}

/// Predictions over ranges, for plots: with the most channels that were configured.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Curves {
    /// Seconds of the whole move by bytes per second of the link, from 10 Mbit/s to 100 Gbit/s; x
    /// rises.
    pub total_by_link: Vec<Curve>,
    /// Seconds of downtime by distinct bytes written per second, over the first configured link; a
    /// curve ends where the move no longer converges.
    pub downtime_by_dirty_rate: Vec<Curve>,
}

/// One line of a plot.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Curve {
    /// The codec and its level.
    pub codec: CodecChoice,
    /// Points as (x, y).
    pub points: Vec<(f64, f64)>,
}

impl fmt::Display for QmpCommand {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{{\"execute\": {}", Value::from(self.execute.as_str()))?;
        if !self.arguments.is_empty() {
            write!(f, ", \"arguments\": {}", Value::from(self.arguments.clone()))?;
        }
        f.write_str("}")
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::page::fixture;

    #[test]
    fn findings_come_back_from_their_json() {
        for findings in [fixture::realistic(), fixture::empty(), fixture::hostile()] {
            let json = serde_json::to_value(&findings).unwrap();
            let back: Findings = serde_json::from_value(json.clone()).unwrap();
            assert_eq!(serde_json::to_value(back).unwrap(), json);
        }
    }

    #[test]
    fn a_codec_is_text_in_json() {
        let json = serde_json::to_value(fixture::realistic()).unwrap();
        assert_eq!(json["codecs"][0]["codec"], "none");
        assert_eq!(json["codecs"][1]["codec"], "zlib:1");
    }

    #[test]
    fn a_command_begins_with_its_name_and_loses_nothing() {
        let commands = [
            json!({ "execute": "query-migrate" }),
            json!({ "execute": "migrate-set-parameters", "arguments": { "a": "<\"b\">", "c": 7 } }),
        ];
        for json in commands {
            let command: QmpCommand = serde_json::from_value(json.clone()).unwrap();
            assert!(command.to_string().starts_with("{\"execute\": \""), "{command}");
            assert_eq!(serde_json::from_str::<Value>(&command.to_string()).unwrap(), json);
        }
    }
}
