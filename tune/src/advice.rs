//! The best setting for a link, and how to make it in either program.

use std::num::NonZeroU64;

use multifd_codecs::CodecChoice;
use serde_json::{Map, Value, json};

use crate::config::Link;
use crate::findings::{Advice, Bottleneck, Prediction, QmpCommand};
use crate::units::show_bytes;

/// A move that is less than 5 % faster is not worth more cores: predictions are not more exact.
const WORTH: f64 = 0.95;

/// Limits that the caller sets for a move.
#[derive(Clone, Copy, Debug)]
pub(super) struct Constraints {
    pub(super) downtime_ms: u64,
    /// Bytes per second.
    pub(super) max_bandwidth: Option<NonZeroU64>,
}

/// Longest `downtime-limit` that QEMU accepts, in ms (docs/wire.md).
const QEMU_DOWNTIME_LIMIT: u64 = 2_000_000;

/// The advice for `link`. `all` are the predictions for all links; `None`: none without compression
/// is for this one.
pub(super) fn advise(link: &Link, all: &[Prediction], limits: Constraints) -> Option<Advice> {
    let here = |(_, prediction): &(usize, &Prediction)| prediction.link == link.name;
    let candidates = || all.iter().enumerate().filter(here);
    let best = best_of(candidates())?;
    let chosen = all.get(best)?;
    let other_family = |(_, other): &(usize, &Prediction)| other.codec.family() != chosen.codec.family();
    let runner_up = best_of(candidates().filter(other_family));
    let plain = best_of(candidates().filter(|(_, other)| other.codec == CodecChoice::None))?;
    Some(Advice {
        link: link.name.clone(),
        best,
        runner_up,
        plain,
        reason: reason(chosen, all.get(plain)?, runner_up.and_then(|index| all.get(index))),
        flags: flags(chosen, limits),
        qmp: qmp(chosen, link, limits),
    })
}

/// The fastest that converges; among equally fast ones, the one that takes the least CPU time, then
/// the fewest channels. Where none converges, the one with the shortest downtime.
fn best_of<'p>(candidates: impl Iterator<Item = (usize, &'p Prediction)> + Clone) -> Option<usize> {
    let converging = || candidates.clone().filter(|(_, prediction)| prediction.converges);
    let Some(fastest) = converging().map(|(_, prediction)| prediction.total_ms).min() else {
        return candidates.min_by_key(|(_, prediction)| prediction.downtime_ms).map(|(index, _)| index);
    };
    let good = converging().filter(|(_, prediction)| fastest as f64 >= prediction.total_ms as f64 * WORTH);
    let cost = |prediction: &Prediction| prediction.cpu_source_s + prediction.cpu_destination_s;
    good.min_by(|(_, a), (_, b)| cost(a).total_cmp(&cost(b)).then(a.channels.cmp(&b.channels)))
        .map(|(index, _)| index)
}

fn reason(best: &Prediction, plain: &Prediction, runner_up: Option<&Prediction>) -> String {
    let cpu = |prediction: &Prediction| prediction.cpu_source_s + prediction.cpu_destination_s;
    let price = |of: &Prediction, than: &Prediction| {
        let more = cpu(of) - cpu(than);
        format!("{:.1} CPU seconds {}", more.abs(), if more < 0.0 { "less" } else { "more" })
    };
    let limit = match best.bottleneck {
        Bottleneck::DestinationCpu => "the destination's cores are the limit",
        Bottleneck::DirtyRate => "the guest writes faster than its pages are sent",
        Bottleneck::Link => "the link is the limit",
        Bottleneck::SourceCpu => "the source's cores are the limit",
    };
    let mut text = if !best.converges {
        format!(
            "no setting moves this guest within its downtime limit ({limit}): {} is nearest, with {} of downtime; raise \
             the limit, throttle the guest (auto-converge), or move it when it writes less",
            best.codec,
            time(best.downtime_ms)
        )
    } else if best.codec == CodecChoice::None {
        let other = runner_up.map_or(String::new(), |other| {
            let time = total(other.converges, other.total_ms);
            format!(": {} would take {time}, and {}", other.codec, price(other, best))
        });
        format!("do not compress{other}; {limit}")
    } else if !plain.converges {
        format!(
            "{} takes {}, without compression the move does not converge; {limit}",
            best.codec,
            time(best.total_ms)
        )
    } else {
        format!(
            "{} takes {}, without compression {}; it costs {} on both ends together; {limit}",
            best.codec,
            time(best.total_ms),
            time(plain.total_ms),
            price(best, plain)
        )
    };
    if best.converges && plain.converges && best.codec != CodecChoice::None {
        let saved = plain.wire_bytes.saturating_sub(best.wire_bytes);
        text.push_str(&format!("; {} less on the wire", show_bytes(saved)));
    }
    text
}

fn flags(best: &Prediction, limits: Constraints) -> String {
    let mut flags = format!("--channels {}", best.channels);
    if best.channels > 0 {
        flags.push_str(&format!(" --codec {}", best.codec));
    }
    if let Some(limit) = limits.max_bandwidth {
        flags.push_str(&format!(" --max-bandwidth {limit}B/s"));
    }
    flags
}

/// Commands for both QEMUs: before `migrate` at the source, before `migrate-incoming` at the
/// destination.
///
/// QEMU's default `max-bandwidth` is 128 MiB/s, less than a fast link.
fn qmp(best: &Prediction, link: &Link, limits: Constraints) -> Vec<QmpCommand> {
    let multifd = best.channels > 0;
    let mut parameters = Map::new();
    let mut set = |name: &str, value: Value| parameters.insert(name.to_owned(), value);
    let bandwidth = limits.max_bandwidth.into_iter().chain(link.rate).min();
    set("max-bandwidth", json!(bandwidth.map_or(0, NonZeroU64::get)));
    set("downtime-limit", json!(limits.downtime_ms.clamp(1, QEMU_DOWNTIME_LIMIT)));
    if multifd {
        let name = best.codec.family().name();
        set("multifd-channels", json!(best.channels));
        set("multifd-compression", json!(name));
        if let Some(level) = best.codec.level() {
            set(&format!("multifd-{name}-level"), json!(level));
        }
    }
    let capability = json!([{ "capability": "multifd", "state": multifd }]);
    let capabilities = Map::from_iter([("capabilities".to_owned(), capability)]);
    vec![
        QmpCommand { execute: "migrate-set-capabilities".to_owned(), arguments: capabilities },
        QmpCommand { execute: "migrate-set-parameters".to_owned(), arguments: parameters },
    ]
}

/// The time of a move, `never` if it does not converge.
pub(super) fn total(converges: bool, ms: u64) -> String {
    if converges { time(ms) } else { "never".to_owned() }
}

/// `870 ms`, `12.3 s`.
pub(super) fn time(ms: u64) -> String {
    match ms {
        0..1000 => format!("{ms} ms"),
        1000..100_000 => format!("{:.1} s", ms as f64 / 1e3),
        _ => format!("{:.0} s", ms as f64 / 1e3),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Constraints = Constraints { downtime_ms: 300, max_bandwidth: None };

    fn link() -> Link {
        Link { name: "1Gbit/s".to_owned(), rate: NonZeroU64::new(125_000_000) }
    }

    fn prediction(codec: CodecChoice, channels: usize, total_ms: u64, core_s: f64) -> Prediction {
        Prediction {
            link: "1Gbit/s".to_owned(),
            link_bytes_per_s: Some(125_000_000),
            channels,
            codec,
            total_ms,
            wire_bytes: total_ms * 119_000,
            rounds: 2,
            downtime_ms: 3,
            cpu_source_s: core_s / 2.0,
            cpu_destination_s: core_s / 2.0,
            converges: true,
            bottleneck: Bottleneck::Link,
            qemu_total_ms: total_ms,
            qemu_converges: true,
        }
    }

    #[test]
    fn the_fastest_wins_unless_it_costs_cores_for_nothing() {
        let all = [
            prediction(CodecChoice::None, 2, 3800, 0.4),
            prediction(CodecChoice::zlib::<1>(), 2, 1450, 1.8),
            prediction(CodecChoice::zstd::<3>(), 2, 1180, 1.7),
            prediction(CodecChoice::zstd::<1>(), 2, 1200, 1.2),
            prediction(CodecChoice::zstd::<1>(), 4, 1200, 1.2),
        ];
        let advice = advise(&link(), &all, LIMITS).unwrap();
        assert_eq!((advice.best, advice.runner_up, advice.plain), (3, Some(1), 0));
        assert_eq!(advice.flags, "--channels 2 --codec zstd:1");
        assert!(advice.reason.contains("1.2 s, without compression 3.8 s"), "{}", advice.reason);
        let text = serde_json::to_string(&advice.qmp).unwrap();
        for part in [r#""multifd-zstd-level":1"#, r#""multifd-channels":2"#, r#""max-bandwidth":125000000"#] {
            assert!(text.contains(part), "{part} in {text}");
        }
    }

    #[test]
    fn a_fast_link_is_advised_not_to_compress() {
        let all =
            [prediction(CodecChoice::None, 2, 230, 0.4), prediction(CodecChoice::zstd::<1>(), 2, 590, 1.2)];
        let advice = advise(&link(), &all, LIMITS).unwrap();
        assert_eq!((advice.best, advice.runner_up), (0, Some(1)));
        assert!(advice.reason.starts_with("do not compress: zstd:1 would take 590 ms"), "{}", advice.reason);
        assert!(!advice.qmp[1].to_string().contains("level"));
    }

    #[test]
    fn a_guest_that_does_not_converge_is_named_as_such() {
        let busy = |codec, downtime_ms| Prediction {
            converges: false,
            downtime_ms,
            bottleneck: Bottleneck::DirtyRate,
            ..prediction(codec, 2, 9000, 1.0)
        };
        let advice =
            advise(&link(), &[busy(CodecChoice::None, 900), busy(CodecChoice::zstd::<1>(), 500)], LIMITS)
                .unwrap();
        assert_eq!(advice.best, 1);
        assert!(
            advice.reason.contains("no setting") && advice.reason.contains("500 ms"),
            "{}",
            advice.reason
        );
    }

    #[test]
    fn the_limits_of_the_caller_are_part_of_the_advice() {
        let limits = Constraints { downtime_ms: 0, max_bandwidth: NonZeroU64::new(50_000_000) };
        let advice = advise(&link(), &[prediction(CodecChoice::None, 2, 230, 0.4)], limits).unwrap();
        assert_eq!(advice.flags, "--channels 2 --codec none --max-bandwidth 50000000B/s");
        assert_eq!(advice.qmp[1].arguments["max-bandwidth"], 50_000_000);
        assert_eq!(advice.qmp[1].arguments["downtime-limit"], 1, "QEMU takes 1 to 2000000");
    }

    #[test]
    fn without_channels_there_is_nothing_to_compress_with() {
        let advice = advise(&link(), &[prediction(CodecChoice::None, 0, 230, 0.4)], LIMITS).unwrap();
        assert_eq!(advice.flags, "--channels 0");
        assert_eq!(advice.qmp[0].arguments["capabilities"][0]["state"], false);
        assert_eq!(advice.runner_up, None);
        let elsewhere = Link { name: "10Gbit/s".to_owned(), ..link() };
        assert!(advise(&elsewhere, &[prediction(CodecChoice::None, 0, 230, 0.4)], LIMITS).is_none());
    }
}
