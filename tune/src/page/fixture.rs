//! Findings to draw, of imagined guests.

use multifd_codecs::CodecChoice;
use serde_json::{Map, Value, json};

use crate::findings::*;

type Row = (CodecChoice, f64, f64, Option<f64>, Option<f64>);

/// Of a guest of 8 GiB: `(codec, ratio, its error, MB/s of encoding, MB/s of decoding)`.
const CODECS: [Row; 20] = [
    (CodecChoice::None, 1.0, 0.0, None, None),
    (CodecChoice::zlib::<1>(), 2.52, 0.05, Some(118.0), Some(402.0)),
    (CodecChoice::zlib::<2>(), 2.58, 0.05, Some(102.0), Some(405.0)),
    (CodecChoice::zlib::<3>(), 2.63, 0.05, Some(81.0), Some(410.0)),
    (CodecChoice::zlib::<4>(), 2.70, 0.05, Some(74.0), Some(412.0)),
    (CodecChoice::zlib::<5>(), 2.77, 0.05, Some(55.0), Some(415.0)),
    (CodecChoice::zlib::<6>(), 2.81, 0.06, Some(39.0), Some(418.0)),
    (CodecChoice::zlib::<7>(), 2.82, 0.06, Some(33.0), Some(418.0)),
    (CodecChoice::zlib::<8>(), 2.83, 0.06, Some(24.0), Some(419.0)),
    (CodecChoice::zlib::<9>(), 2.83, 0.06, Some(21.0), Some(419.0)),
    (CodecChoice::zstd::<1>(), 2.79, 0.06, Some(520.0), Some(1390.0)),
    (CodecChoice::zstd::<2>(), 2.88, 0.06, Some(431.0), Some(1320.0)),
    (CodecChoice::zstd::<3>(), 2.98, 0.06, Some(287.0), Some(1300.0)),
    (CodecChoice::zstd::<4>(), 3.00, 0.06, Some(241.0), Some(1290.0)),
    (CodecChoice::zstd::<5>(), 3.06, 0.07, Some(142.0), Some(1250.0)),
    (CodecChoice::zstd::<7>(), 3.15, 0.07, Some(92.0), Some(1330.0)),
    (CodecChoice::zstd::<9>(), 3.19, 0.07, Some(61.0), Some(1360.0)),
    (CodecChoice::zstd::<12>(), 3.22, 0.07, Some(33.0), Some(1370.0)),
    (CodecChoice::zstd::<15>(), 3.31, 0.08, Some(14.0), Some(1400.0)),
    (CodecChoice::zstd::<19>(), 3.52, 0.09, Some(3.1), Some(1250.0)),
];

/// Bytes of pages that are not zero.
const HELD: f64 = 5.1e9;

/// What four cores send without a codec, in bytes per second.
const SENT: f64 = 5.8e9;

const LIMIT_S: f64 = 0.3;

const LINKS: [(&str, Option<u64>); 4] = [
    ("100Mbit/s", Some(12_500_000)),
    ("1Gbit/s", Some(125_000_000)),
    ("10Gbit/s", Some(1_250_000_000)),
    ("25Gbit/s", Some(3_125_000_000)),
];

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "of small, positive numbers")]
fn whole(value: f64) -> u64 {
    value as u64
}

/// Bytes of pages that get across in a second.
fn pace(codec: &Row, link: f64, cores: f64) -> f64 {
    let encode = codec.3.map_or(f64::INFINITY, |speed| speed * 1e6 * cores * 0.92);
    (link * codec.1).min(encode).min(SENT / 4.0 * cores)
}

/// A server with a database, as it was measured in a live QEMU; four links, all codecs.
pub(crate) fn realistic() -> Findings {
    let mut predictions = Vec::new();
    let mut advice = Vec::new();
    for (name, rate) in LINKS {
        let first = predictions.len();
        for channels in [1, 2, 4, 8] {
            predictions.extend(CODECS.iter().map(|codec| prediction(name, rate, channels, codec)));
        }
        advice.push(advise(name, &predictions, first));
    }
    Findings {
        source: "process 4711 (qemu-system-x86)".into(),
        ram_bytes: 8 << 30,
        sample: SampleFacts { pages: 65_536, bytes: 256 << 20, share: 0.0503 },
        pages: PageKinds { zero: 0.394, duplicate: 0.021, incompressible: 0.007, text: 0.083, other: 0.495 },
        machine: Machine {
            cores: 4,
            send_byte_s: 0.52e-9,
            receive_byte_s: 0.61e-9,
            land_byte_s: 0.31e-9,
            fault_byte_s: 0.62e-9,
            touch_byte_s: 0.11e-9,
            look_byte_s: 0.09e-9,
        },
        codecs: CODECS.iter().map(facts).collect(),
        xbzrle: Some(XbzrleFacts { pages: 4096, encoded: 0.871, size: 0.214 }),
        dirty: DirtyFacts { origin: DirtyOrigin::Measured, bytes_per_s: 42_000_000, working_set_bytes: 910 << 20 },
        downtime_limit_ms: 300,
        predictions,
        advice,
        curves: Curves { total_by_link: CODECS.iter().map(total).collect(), downtime_by_dirty_rate: CODECS.iter().map(downtime).collect() },
        notes: vec![
            "Incompressible pages are 0.7 % of the guest: its disks are not encrypted, or their pages are not in its cache.".into(),
            "The dirty rate was measured for 2.0 s; a guest may be busier at another time.".into(),
        ],
    }
}

/// No link, no codec, no curve, all zero.
pub(crate) fn empty() -> Findings {
    Findings {
        source: String::new(),
        ram_bytes: 0,
        sample: SampleFacts { pages: 0, bytes: 0, share: 0.0 },
        pages: PageKinds::default(),
        machine: Machine {
            cores: 0,
            send_byte_s: 0.0,
            receive_byte_s: 0.0,
            land_byte_s: 0.0,
            fault_byte_s: 0.0,
            touch_byte_s: 0.0,
            look_byte_s: 0.0,
        },
        codecs: Vec::new(),
        xbzrle: None,
        dirty: DirtyFacts { origin: DirtyOrigin::Still, bytes_per_s: 0, working_set_bytes: 0 },
        downtime_limit_ms: 0,
        predictions: Vec::new(),
        advice: Vec::new(),
        curves: Curves::default(),
        notes: Vec::new(),
    }
}

/// A checkpoint and one link; none is nearly the only setting; names that try to break out of their
/// element.
pub(crate) fn hostile() -> Findings {
    let name = "</title></style><script>alert(1)</script><img src=x onerror=\"alert('2')\"> & \u{202e}\u{0} \u{1b}[31m ";
    let mut findings = realistic();
    findings.source = format!("checkpoint /{}", name.repeat(3));
    findings.codecs.truncate(2);
    findings.advice.truncate(1);
    findings.predictions.truncate(3);
    findings.curves.total_by_link.truncate(2);
    findings.curves.downtime_by_dirty_rate.truncate(2);
    findings.dirty = DirtyFacts { origin: DirtyOrigin::Still, bytes_per_s: 0, working_set_bytes: 0 };
    findings.xbzrle = None;
    for advice in &mut findings.advice {
        *advice = Advice {
            link: name.into(),
            best: 0,
            runner_up: Some(1),
            plain: 0,
            reason: name.into(),
            flags: name.into(),
            qmp: vec![QmpCommand { execute: name.into(), arguments: Map::new() }],
        };
    }
    findings.notes.push(name.into());
    for prediction in &mut findings.predictions {
        prediction.link = name.into();
    }
    findings
}

fn facts(codec: &Row) -> CodecFacts {
    CodecFacts {
        codec: codec.0,
        ratio: codec.1,
        ratio_error: codec.2,
        encode_bytes_per_s: codec.3.map(|speed| speed * 1e6),
        decode_bytes_per_s: codec.4.map(|speed| speed * 1e6),
        measured_bytes: 256 << 20,
    }
}

fn prediction(name: &str, rate: Option<u64>, channels: usize, codec: &Row) -> Prediction {
    let link = rate.map_or(f64::INFINITY, |rate| rate as f64);
    let cores = channels.min(4) as f64;
    let pace = pace(codec, link, cores);
    let total = HELD / pace * 1.2 + 0.2;
    let cpu = codec.3.map_or(0.0, |speed| HELD * 1.2 / speed / 1e6) + HELD * 0.6e-9;
    let waits = pace > link * codec.1 * 0.99;
    Prediction {
        link: name.into(),
        link_bytes_per_s: rate,
        channels,
        codec: codec.0,
        total_ms: whole(total * 1e3),
        wire_bytes: whole(HELD / codec.1 * 1.2),
        rounds: 3 + u64::from(pace < 2e8) * 6,
        downtime_ms: whole(30.0 + 42e6 / pace * 200.0),
        cpu_source_s: cpu,
        cpu_destination_s: cpu / 3.0,
        converges: pace > 42e6,
        bottleneck: if waits { Bottleneck::Link } else { Bottleneck::SourceCpu },
        qemu_total_ms: whole(total * 1.21e3),
        qemu_converges: true,
    }
}

fn advise(name: &str, predictions: &[Prediction], first: usize) -> Advice {
    let all = || predictions.iter().enumerate().skip(first);
    let best = all().min_by_key(|(_, prediction)| (prediction.total_ms, prediction.channels)).unwrap();
    let others = all().filter(|(_, prediction)| prediction.codec != best.1.codec);
    let runner_up = others.min_by_key(|(_, prediction)| (prediction.total_ms, prediction.channels)).unwrap();
    let plain = all().filter(|(_, prediction)| prediction.codec == CodecChoice::None);
    let plain = plain.min_by_key(|(_, prediction)| (prediction.total_ms, prediction.channels)).unwrap();
    let method = best.1.codec.family();
    let mut parameters = json!({ "multifd-channels": best.1.channels, "multifd-compression": method.name(), "downtime-limit": 300 });
    if let Some(level) = best.1.codec.level() {
        parameters[format!("multifd-{method}-level")] = json!(level);
    }
    Advice {
        link: name.into(),
        best: best.0,
        runner_up: Some(runner_up.0),
        plain: plain.0,
        reason: format!(
            "{} at {} channels moves {:.1} s faster than no compression, and costs {:.0} s of CPU more on the source.",
            best.1.codec,
            best.1.channels,
            (plain.1.total_ms - best.1.total_ms) as f64 / 1e3,
            best.1.cpu_source_s - plain.1.cpu_source_s,
        ),
        flags: format!("--channels {} --codec {} --downtime-limit 300ms", best.1.channels, best.1.codec),
        qmp: vec![
            command(
                "migrate-set-capabilities",
                json!({ "capabilities": [{ "capability": "multifd", "state": true }] }),
            ),
            command("migrate-set-parameters", parameters),
        ],
    }
}

fn command(execute: &str, arguments: Value) -> QmpCommand {
    let Value::Object(arguments) = arguments else { panic!("{arguments}") };
    QmpCommand { execute: execute.to_owned(), arguments }
}

fn total(codec: &Row) -> Curve {
    // 25 links to a decade.
    let links = (0..=100).map(|step| 1.25e6 * f64::powf(10.0, f64::from(step) / 25.0));
    let point = |link: f64| (link, HELD / pace(codec, link, 4.0) * 1.1 + 0.2);
    Curve { codec: codec.0, points: links.map(point).collect() }
}

/// Over the first link: what is left when the guest stops takes longer the faster the guest writes.
fn downtime(codec: &Row) -> Curve {
    let pace = pace(codec, 12.5e6, 4.0);
    let rates = (0..=60).map(|step| 1e6 * f64::powf(10.0, f64::from(step) / 20.0));
    let point = |rate: f64| {
        let share = rate / pace;
        (rate, 0.012 + (LIMIT_S - 0.012) * (share * share).min(1.0))
    };
    let converging = rates.filter(|rate| rate / pace < 0.97);
    Curve { codec: codec.0, points: converging.map(point).collect() }
}
