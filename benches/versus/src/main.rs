//! The same moves by QEMU and by multifd, side by side: `cargo run --release -p multifd-versus`.
//!
//! ```text
//!  scenario: what is moved, how        guest: a paused QEMU and a checkpoint with the same RAM
//!        └────────────┬──────────────────────┘
//!               moves: QEMU or multifd at either end, or the raw pump; the RAM is compared every time
//!                     │  interleaved, several rounds
//!               table, --json: medians, and ratios of QEMU's time to ours
//!
//!  postcopy: latencies of page faults while RAM follows, and how soon a guest at rest runs
//!
//!  --tune: the moves of `multifd tune`'s predictions, made the same way; what it said beside what was measured
//! ```

mod account;
mod guest;
mod live;
mod moves;
mod plot;
mod postcopy;
mod pump;
mod scenario;
mod table;
mod tls;
mod tune;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use multifd_tests::{During, Outcome};
use serde_json::Value;

use guest::{Guest, Stage};
use moves::Cost;
use scenario::{Scenario, Way};
use table::Results;

/// Runs the same moves by QEMU and by multifd, interleaved, and prints medians and ratios.
#[derive(Debug, Parser)]
struct Flags {
    /// Scenarios to run, by name or the beginning of it. Default: all
    scenarios: Vec<String>,
    /// Names the scenarios and ends
    #[arg(long)]
    list: bool,
    /// Runs of each way; the median is what counts
    #[arg(long, value_name = "N", default_value_t = 5)]
    repeat: u32,
    /// Guest RAM, in MiB, where the scenario does not say
    #[arg(long, value_name = "MIB", default_value_t = 1024)]
    ram: u32,
    /// RAM of the guest at rest that scenario `resume` starts, in MiB
    #[arg(long, value_name = "MIB", default_value_t = 8192)]
    rest_ram: u32,
    #[command(flatten)]
    postcopy: postcopy::destination::Faulting,
    /// Writes every run here as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Draws each scenario into this folder, as SVG
    #[arg(long, value_name = "DIR")]
    plots: Option<PathBuf>,
    /// Instead of the scenarios: what `multifd tune` says of the Linux guest, beside what is
    /// measured
    #[arg(long, conflicts_with_all = ["scenarios", "list", "plots"])]
    tune: bool,
}

fn main() -> ExitCode {
    match run(&Flags::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("{failure}");
            ExitCode::FAILURE
        }
    }
}

fn run(flags: &Flags) -> Outcome {
    if let Some(uri) = &flags.postcopy.destination {
        return postcopy::destination::run(uri, &flags.postcopy);
    }
    if flags.tune {
        return write_json(flags, tune::run(flags.ram, flags.repeat)?);
    }
    let chosen = |name: &str| {
        flags.scenarios.is_empty() || flags.scenarios.iter().any(|wanted| name.starts_with(wanted))
    };
    let mut scenarios = scenario::all(flags.ram);
    scenarios.retain(|scenario| chosen(&scenario.name));
    let of_postcopy: Vec<_> = postcopy::ALL.into_iter().filter(|scenario| chosen(scenario.name())).collect();
    if flags.list {
        scenarios.iter().for_each(|scenario| println!("{}", scenario.name));
        of_postcopy.iter().for_each(|scenario| println!("{}", scenario.name()));
        return Ok(());
    }
    let mut bench = Bench { flags, staged: None, all: Vec::new() };
    scenarios.iter().try_for_each(|scenario| bench.run(scenario).during(&scenario.name))?;
    bench.staged = None;
    for scenario in of_postcopy {
        let run = scenario.run(flags.ram, flags.rest_ram, flags.repeat, &flags.postcopy);
        bench.all.push(run.during(scenario.name())?);
    }
    write_json(flags, bench.all)
}

fn write_json(flags: &Flags, all: Vec<Value>) -> Outcome {
    match &flags.json {
        Some(path) => std::fs::write(path, format!("{:#}\n", Value::Array(all))).during(path.display()),
        None => Ok(()),
    }
}

struct Bench<'f> {
    flags: &'f Flags,
    /// One guest at a time is in memory; neighbours in the list share it.
    staged: Option<(Guest, Stage)>,
    all: Vec<Value>,
}

impl Bench<'_> {
    fn run(&mut self, scenario: &Scenario) -> Outcome {
        let repeat = self.flags.repeat;
        let results = match scenario.live {
            Some(set) => {
                self.staged = None;
                compare(scenario, repeat, |way| match way {
                    Way::QemuToQemu => live::by_qemu(scenario, set),
                    _ => live::by_ours(scenario, set),
                })?
            }
            None => {
                let stage = self.stage(scenario.guest)?;
                if let Some(Err(failure)) = scenario.link.map(|mbit| stage.shape(mbit)) {
                    println!("\n{}\n  skipped: no such link here: {failure}", scenario.name);
                    return Ok(());
                }
                compare(scenario, repeat, |way| moves::once(scenario, way, stage))?
            }
        };
        results.print();
        self.all.push(results.json());
        match &self.flags.plots {
            Some(folder) => {
                let path = folder.join(format!("{}.svg", scenario.name));
                std::fs::create_dir_all(folder)?;
                std::fs::write(&path, plot::svg(&results)).during(path.display())
            }
            None => Ok(()),
        }
    }

    fn stage(&mut self, guest: Guest) -> Outcome<&mut Stage> {
        if self.staged.as_ref().is_some_and(|(staged, _)| *staged != guest) {
            self.staged = None;
        }
        let (_, stage) = match self.staged.take() {
            Some(staged) => self.staged.insert(staged),
            None => self.staged.insert((guest, guest.stage()?)),
        };
        Ok(stage)
    }
}

/// Every way once, then every way again: what else the machine does hits all of them alike.
fn compare(
    scenario: &Scenario,
    repeat: u32,
    mut run: impl FnMut(Way) -> Outcome<Cost>,
) -> Outcome<Results<'_>> {
    let mut costs: Vec<_> = scenario.ways().into_iter().map(|way| (way, Vec::new())).collect();
    for _ in 0..repeat.max(1) {
        for (way, runs) in &mut costs {
            runs.push(run(*way).during(way.name())?);
        }
    }
    Ok(Results { scenario, costs })
}
