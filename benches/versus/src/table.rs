//! Medians, ratios, and how they are printed.

use std::time::Duration;

use serde_json::{Value, json};

use crate::moves::Cost;
use crate::scenario::{Scenario, Way};

/// All runs of one scenario, by way, in the order of the ways.
pub(crate) struct Results<'a> {
    pub(crate) scenario: &'a Scenario,
    pub(crate) costs: Vec<(Way, Vec<Cost>)>,
}

impl Results<'_> {
    /// The median of what `read` finds in the runs of `way`, in seconds or bytes.
    pub(crate) fn median(&self, way: Way, read: impl Fn(&Cost) -> f64) -> Option<f64> {
        let (_, costs) = self.costs.iter().find(|(found, _)| *found == way)?;
        median(costs.iter().map(read))
    }

    /// QEMU's time as a multiple of the time of `way`.
    pub(crate) fn ratio(&self, way: Way) -> Option<f64> {
        let ours = self.median(way, seconds)?;
        Some(self.median(Way::QemuToQemu, seconds)? / ours)
    }

    /// A table for people.
    pub(crate) fn print(&self) {
        let Scenario { name, target, .. } = self.scenario;
        println!("\n{name}");
        if self.scenario.live.is_some() {
            return self.print_live();
        }
        println!(
            "  {:<18} {:>9} {:>7} {:>15} {:>10} {:>17}",
            "", "time", "ratio", "cpu s (src+dst)", "wire MiB", "memory MiB"
        );
        for (way, _) in &self.costs {
            self.print_way(*way);
        }
        if let (Some(target), Some(reached)) = (target, self.ratio(Way::OursToOurs)) {
            let verdict = if reached >= *target { "reached" } else { "missed" };
            println!("  target: {target:.1}, {verdict} with {reached:.2}");
        }
    }

    fn print_live(&self) {
        println!(
            "  {:<18} {:>9} {:>11} {:>9} {:>7} {:>10}",
            "", "time", "downtime", "ratio", "rounds", "wire MiB"
        );
        for (way, _) in &self.costs {
            let median = |read: &dyn Fn(&Cost) -> f64| self.median(*way, read).unwrap_or_default();
            println!(
                "  {:<18} {:>7.3} s {:>8.1} ms {:>9.2} {:>7} {:>10.0}",
                way.name(),
                median(&seconds),
                median(&downtime) * 1e3,
                self.median(Way::QemuToQemu, downtime).unwrap_or_default() / median(&downtime),
                median(&|cost| cost.rounds as f64),
                median(&|cost| cost.wire_bytes as f64) / 1_048_576.0,
            );
        }
    }

    fn print_way(&self, way: Way) {
        let median = |read: &dyn Fn(&Cost) -> f64| self.median(way, read).unwrap_or_default();
        let mib = |bytes: f64| bytes / 1_048_576.0;
        print!(
            "  {:<18} {:>7.3} s {:>7.2}",
            way.name(),
            median(&seconds),
            self.ratio(way).unwrap_or_default()
        );
        if matches!(way, Way::PumpMapping | Way::PumpFile) {
            return println!();
        }
        let both = |pair: [Duration; 2]| pair.map(|time| time.as_secs_f64());
        let [source, destination] = [0, 1].map(|side: usize| {
            median(&move |cost: &Cost| both(cost.cpu).get(side).copied().unwrap_or_default())
        });
        let [memory_source, memory_destination] = [0, 1].map(|side: usize| {
            mib(median(&move |cost: &Cost| cost.private_bytes.get(side).copied().unwrap_or_default() as f64))
        });
        println!(
            " {:>15} {:>10.0} {:>17}",
            format!("{source:.2} + {destination:.2}"),
            mib(median(&|cost| cost.wire_bytes as f64)),
            format!("{memory_source:.1} + {memory_destination:.1}"),
        );
    }

    /// Everything, for programs.
    pub(crate) fn json(&self) -> Value {
        let ways = self.costs.iter().map(|(way, costs)| {
            let runs: Vec<Value> = costs.iter().map(run).collect();
            json!({
                "way": way.name(),
                "median_s": self.median(*way, seconds),
                "ratio": self.ratio(*way),
                "runs": runs,
            })
        });
        json!({
            "scenario": self.scenario.name,
            "target": self.scenario.target,
            "ways": ways.collect::<Vec<_>>(),
        })
    }
}

pub(crate) fn median(values: impl Iterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}

pub(crate) fn seconds(cost: &Cost) -> f64 {
    cost.total.as_secs_f64()
}

fn downtime(cost: &Cost) -> f64 {
    cost.downtime.as_secs_f64()
}

/// One run, for programs.
pub(crate) fn run(cost: &Cost) -> Value {
    let [source, destination] = cost.cpu.map(|time| time.as_secs_f64());
    let [memory_source, memory_destination] = cost.private_bytes;
    json!({
        "total_s": seconds(cost),
        "cpu_source_s": source,
        "cpu_destination_s": destination,
        "wire_bytes": cost.wire_bytes,
        "downtime_s": downtime(cost),
        "rounds": cost.rounds,
        "memory_source_bytes": memory_source,
        "memory_destination_bytes": memory_destination,
    })
}
