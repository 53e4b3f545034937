//! Post-copy beside QEMU's: how long threads wait for pages while the rest comes, and how soon a
//! guest at rest runs.
//!
//! Not like for like, and said with each table: QEMU's threads are vCPUs under emulation, ours are
//! threads of a process; QEMU loads the devices of a PC, ours takes their state and loads nothing.

pub(crate) mod destination;
mod guest;
mod latency;
mod moves;
mod resume;

use std::time::Duration;

use multifd_tests::skip::newest_qemu;
use multifd_tests::{During as _, Network, Outcome};
use serde_json::{Value, json};

use self::destination::Faulting;
use self::moves::{Cost, Stage};
use self::resume::{AtRest, Start};
use crate::scenario::Way;
use crate::table::median;

/// A comparison of its own kind.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Scenario {
    /// Faults at random while RAM comes, over a link of so many Mbit/s or over loopback.
    Faults(Option<u32>),
    /// A guest at rest is started.
    Resume,
}

/// In the order in which they run.
pub(crate) const ALL: [Scenario; 3] =
    [Scenario::Faults(None), Scenario::Faults(Some(1000)), Scenario::Resume];

const WAYS: [Way; 4] = [Way::QemuToQemu, Way::OursToOurs, Way::QemuToOurs, Way::OursToQemu];

impl Scenario {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Faults(None) => "postcopy",
            Self::Faults(Some(_)) => "postcopy-1g",
            Self::Resume => "resume",
        }
    }

    /// Runs and prints it. `ram_mib`: of the guest whose threads fault; `rest_mib`: of the guest at
    /// rest.
    pub(crate) fn run(self, ram_mib: u32, rest_mib: u32, repeat: u32, flags: &Faulting) -> Outcome<Value> {
        println!("\n{}", self.name());
        if let Err(why) = newest_qemu() {
            return Ok(self.skipped(&why));
        }
        match self {
            Self::Faults(None) => self.faults(Stage::new(ram_mib, flags, None)?, repeat),
            Self::Faults(Some(mbit)) => match Network::new() {
                Ok(network) => self.faults(Stage::new(ram_mib, flags, Some((network, mbit)))?, repeat),
                Err(failure) => Ok(self.skipped(&format!("no such link here: {failure}"))),
            },
            Self::Resume => resume(rest_mib, repeat),
        }
    }

    fn skipped(self, why: &str) -> Value {
        println!("  skipped: {why}");
        json!({ "scenario": self.name(), "skipped": why })
    }

    fn faults(self, stage: Stage, repeat: u32) -> Outcome<Value> {
        let Stage { ram_mib, vcpus, .. } = stage;
        println!(
            "  {ram_mib} MiB with content, a page in 4 touched at random by {vcpus} threads; a channel for pages that are asked for\n  \
             at both ends. qemu's threads are vCPUs (tcg), and it loads a PC's devices; ours load none, and come from a checkpoint.\n  \
             Latencies are the destination's own, read off its powers of two."
        );
        let mut costs: Vec<(Way, Vec<Cost>)> = WAYS.map(|way| (way, Vec::new())).to_vec();
        for _ in 0..repeat.max(1) {
            for (way, runs) in &mut costs {
                runs.push(stage.once(*way).during(way.name())?);
            }
        }
        print_faults(&costs);
        let runs = |runs: &[Cost]| runs.iter().map(run_of).collect::<Vec<_>>();
        let ways = costs.iter().map(|(way, costs)| json!({ "way": way.name(), "runs": runs(costs) }));
        let ways = ways.collect::<Vec<_>>();
        Ok(json!({ "scenario": self.name(), "ram_mib": ram_mib, "threads": vcpus, "ways": ways }))
    }
}

fn run_of(cost: &Cost) -> Value {
    json!({
        "p50_us": cost.latency.quantile(0.5),
        "p99_us": cost.latency.quantile(0.99),
        "faults": cost.latency.count(),
        "downtime_s": cost.downtime.as_secs_f64(),
        "total_s": cost.total.as_secs_f64(),
    })
}

/// What is read off a run: its name, how, and the part of QEMU's that is aimed at.
type Column = (&'static str, fn(&Cost) -> f64, f64);

const COLUMNS: [Column; 4] = [
    ("p50 µs", |cost| cost.latency.quantile(0.5), 0.5),
    ("p99 µs", |cost| cost.latency.quantile(0.99), 0.5),
    ("downtime ms", |cost| ms(cost.downtime), 1.0),
    ("total ms", |cost| ms(cost.total), 0.7),
];

fn print_faults(costs: &[(Way, Vec<Cost>)]) {
    print!("  {:<18}", "");
    COLUMNS.iter().for_each(|(name, ..)| print!(" {name:>18}"));
    println!(" {:>8}   (in brackets: of qemu's)", "faults");
    let of = |runs: &[Cost], read: &dyn Fn(&Cost) -> f64| median(runs.iter().map(read)).unwrap_or_default();
    let qemu = costs.first().map_or(&[][..], |(_, runs)| runs);
    for (way, runs) in costs {
        print!("  {:<18}", way.name());
        for (_, read, _) in COLUMNS {
            let (here, theirs) = (of(runs, &read), of(qemu, &read));
            print!(" {:>18}", format!("{here:.1} ({:.2})", here / theirs));
        }
        println!(" {:>8.0}", of(runs, &|cost| cost.latency.count() as f64));
    }
    let Some((_, ours)) = costs.iter().find(|(way, _)| way.is_ours()) else { return };
    for (name, read, aim) in COLUMNS {
        let part = of(ours, &read) / of(qemu, &read);
        let verdict = if part <= aim { "reached" } else { "missed" };
        println!("  target: {name} at most {aim} of qemu's, {verdict} with {part:.2}");
    }
}

fn resume(ram_mib: u32, repeat: u32) -> Outcome<Value> {
    let guest = AtRest::new(ram_mib)?;
    println!(
        "  {ram_mib} MiB of RAM, an eighth of it touched, in files that are in memory, into the same qemu. From the command"
    );
    println!(
        "  until the guest runs: by qemu when all of RAM is loaded, by multifd send --postcopy before, and its RAM follows."
    );
    let (mut qemu, mut ours): (Vec<Start>, Vec<Start>) = (Vec::new(), Vec::new());
    for _ in 0..repeat.max(1) {
        qemu.push(guest.by_qemu().during("qemu, mapped-ram")?);
        ours.push(guest.by_ours().during("multifd send --postcopy")?);
    }
    let of = |runs: &[Start], read: fn(&Start) -> f64| median(runs.iter().map(read)).unwrap_or_default();
    for (name, runs) in [("qemu, mapped-ram", &qemu), ("multifd > qemu", &ours)] {
        let (run, total) = (of(runs, |start| ms(start.run)), of(runs, |start| ms(start.total)));
        println!("  {name:<18} runs after {run:>9.1} ms, all of RAM after {total:>9.1} ms");
    }
    let said = of(&ours, |start| start.run_ms.map_or(f64::NAN, |ms| ms as f64));
    println!("  run_ms, as multifd send says: {said}");
    let runs = |runs: &[Start]| {
        let run = |start: &Start| json!({ "run_s": start.run.as_secs_f64(), "run_ms": start.run_ms, "total_s": start.total.as_secs_f64() });
        runs.iter().map(run).collect::<Vec<_>>()
    };
    Ok(json!({ "scenario": "resume", "ram_mib": ram_mib, "qemu": runs(&qemu), "ours": runs(&ours) }))
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
