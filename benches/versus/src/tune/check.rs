//! One link: what was said, what was found, and whether that is close enough.

use multifd_tests::Compression;
use multifd_tune::Prediction;
use serde_json::{Value, json};

use crate::moves::Cost;
use crate::table;

/// How far a prediction may be from what is measured: bytes on the wire, time of our move, time of
/// QEMU's. As the tuner aims at.
const WIRE: f64 = 0.03;
const TIME: f64 = 0.20;
const QEMU_TIME: f64 = 0.25;

/// How much longer than the fastest codec the advised one may take.
const ADVICE: f64 = 0.10;

pub(super) struct Check<'s> {
    pub(super) link: &'static str,
    pub(super) rows: Vec<Row<'s>>,
    pub(super) advised: Compression,
    /// What is predicted of the advised one.
    pub(super) best: &'s Prediction,
    pub(super) by_qemu: Measured,
}

/// One codec, ours to ours.
pub(super) struct Row<'s> {
    pub(super) codec: Compression,
    pub(super) predicted: &'s Prediction,
    pub(super) measured: Measured,
}

/// All runs of one move.
#[derive(Default)]
pub(super) struct Measured(pub(super) Vec<Cost>);

/// A figure as it was said and as it was found.
#[derive(Clone, Copy)]
struct Pair {
    predicted: f64,
    measured: f64,
    bound: f64,
}

impl Check<'_> {
    /// A table for people.
    pub(super) fn print(&self) {
        println!("\n{}", self.link);
        println!("  {:<8} {:>32} {:>32}", "", "wire MiB: said, found, error", "time s: said, found, error");
        for row in &self.rows {
            let [wire, time] = [row.wire(), row.time()];
            let [said, found] = [wire.predicted, wire.measured].map(|bytes| bytes / 1_048_576.0);
            println!(
                "  {:<8} {said:>12.1} {found:>9.1} {:>+7.1} % {:>12.3} {:>9.3} {:>+7.1} %{}{}",
                row.codec,
                wire.error() * 100.0,
                time.predicted,
                time.measured,
                time.error() * 100.0,
                verdict("wire ", wire.missed()),
                verdict("time ", time.missed()),
            );
        }
        let behind = self.behind();
        println!(
            "  fastest: {}; advised: {}, {:.1} % slower{}",
            self.fastest(),
            self.advised,
            behind * 100.0,
            verdict("", behind > ADVICE),
        );
        let time = self.qemu_time();
        println!(
            "  qemu by the advice: {:.3} s said, {:.3} s found, {:+.1} %{}",
            time.predicted,
            time.measured,
            time.error() * 100.0,
            verdict("", time.missed()),
        );
    }

    /// What is out of its bound.
    pub(super) fn missed(&self) -> Vec<String> {
        let link = self.link;
        let mut missed = Vec::new();
        for row in &self.rows {
            for (what, pair) in [("wire", row.wire()), ("time", row.time())] {
                missed.extend(pair.missed().then(|| format!("{link} {} {what}", row.codec)));
            }
        }
        missed.extend((self.behind().is_nan() || self.behind() > ADVICE).then(|| format!("{link} advice")));
        missed.extend(self.qemu_time().missed().then(|| format!("{link} qemu")));
        missed
    }

    /// Everything, for programs.
    pub(super) fn json(&self) -> Value {
        let rows = self.rows.iter().map(|row| {
            json!({
                "codec": row.codec.to_string(),
                "wire_bytes": row.wire().json(),
                "total_s": row.time().json(),
                "runs": row.measured.json(),
            })
        });
        json!({
            "link": self.link,
            "codecs": rows.collect::<Vec<_>>(),
            "fastest": self.fastest().to_string(),
            "advised": self.advised.to_string(),
            "advised_slower": self.behind(),
            "qemu_total_s": self.qemu_time().json(),
            "qemu_runs": self.by_qemu.json(),
            "missed": self.missed(),
        })
    }

    fn fastest(&self) -> Compression {
        let by_time = self.rows.iter().min_by(|a, b| a.measured.seconds().total_cmp(&b.measured.seconds()));
        by_time.map_or(self.advised, |row| row.codec)
    }

    /// How much longer the advised codec takes than the fastest, as a share of the fastest's time.
    fn behind(&self) -> f64 {
        let seconds = |codec| {
            let row = self.rows.iter().find(|row| row.codec == codec);
            row.map_or(f64::NAN, |row| row.measured.seconds())
        };
        seconds(self.advised) / seconds(self.fastest()) - 1.0
    }

    fn qemu_time(&self) -> Pair {
        Pair {
            predicted: self.best.qemu_total_ms as f64 / 1e3,
            measured: self.by_qemu.seconds(),
            bound: QEMU_TIME,
        }
    }
}

impl Row<'_> {
    fn wire(&self) -> Pair {
        let measured = self.measured.median(|cost| cost.wire_bytes as f64);
        Pair { predicted: self.predicted.wire_bytes as f64, measured, bound: WIRE }
    }

    fn time(&self) -> Pair {
        let measured = self.measured.seconds();
        Pair { predicted: self.predicted.total_ms as f64 / 1e3, measured, bound: TIME }
    }
}

impl Measured {
    fn median(&self, read: impl Fn(&Cost) -> f64) -> f64 {
        table::median(self.0.iter().map(read)).unwrap_or(f64::NAN)
    }

    fn seconds(&self) -> f64 {
        self.median(table::seconds)
    }

    fn json(&self) -> Vec<Value> {
        self.0.iter().map(table::run).collect()
    }
}

impl Pair {
    /// Positive: it was less than predicted.
    fn error(self) -> f64 {
        self.predicted / self.measured - 1.0
    }

    fn missed(self) -> bool {
        // What was not measured is no number, and missed.
        self.error().is_nan() || self.error().abs() > self.bound
    }

    fn json(self) -> Value {
        json!({ "predicted": self.predicted, "measured": self.measured, "error": self.error(), "missed": self.missed() })
    }
}

fn verdict(what: &str, missed: bool) -> String {
    if missed { format!(", {what}missed") } else { String::new() }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use multifd_tests::Outcome;

    use super::*;

    fn measured(wire_bytes: u64, millis: [u64; 3]) -> Measured {
        let cost = |millis| Cost { wire_bytes, total: Duration::from_millis(millis), ..Cost::default() };
        Measured(millis.map(cost).to_vec())
    }

    #[test]
    fn what_is_out_of_its_bound_is_missed() -> Outcome {
        let printed = super::super::said::tests::prediction("none", [1000, 1000, 1000]);
        let predicted: Prediction = serde_json::from_value(printed)?;
        let row = |codec, measured| Row { codec, predicted: &predicted, measured };
        let plain = row(Compression::None, measured(980, [1100, 5000, 10]));
        let zlib = row(Compression::Zlib(1), measured(960, [1300, 1300, 1300]));
        let zstd = row(Compression::Zstd(3), measured(1025, [950, 950, 950]));
        let mut check = Check {
            link: "1Gbit/s",
            rows: vec![plain, zlib, zstd],
            advised: Compression::None,
            best: &predicted,
            by_qemu: measured(0, [790, 790, 790]),
        };
        let wire_and_time = ["1Gbit/s zlib:1 wire", "1Gbit/s zlib:1 time"];
        assert_eq!(check.fastest(), Compression::Zstd(3));
        assert_eq!(check.missed(), [&wire_and_time[..], &["1Gbit/s advice", "1Gbit/s qemu"]].concat());
        check.advised = Compression::Zstd(3);
        check.by_qemu = measured(0, [810, 810, 810]);
        assert_eq!(check.missed(), wire_and_time);
        Ok(())
    }
}
