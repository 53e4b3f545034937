//! `--tune`: what `multifd tune` says of the Linux guest, beside what is measured.
//!
//! ```text
//!  checkpoint ─> multifd tune --json ─> predictions ─> the same moves, ours to ours ────────────────────┐
//!                                    └> advice ──────> QEMU to QEMU, by the very QMP commands ──────────┤
//!                                                      interleaved, several rounds, medians             │
//!                                                      table, --json: what was said, found, and missed <┘
//! ```

mod check;
mod said;

use multifd_tests::{Compression, During, Failure, Outcome};
use multifd_tune::Advice;
use serde_json::Value;

use crate::guest::{Guest, Stage};
use crate::moves::{self, Cost};
use crate::scenario::{Scenario, Way};

use check::{Check, Measured, Row};
use said::{Fresh, Said, compression, follow};

/// As `multifd tune` takes them, and in Mbit/s; none: both ends on this machine.
const LINKS: [(&str, Option<u32>); 3] =
    [("100Mbit/s", Some(100)), ("1Gbit/s", Some(1000)), ("loopback", None)];

/// That are compared with what is advised.
const CODECS: [Compression; 4] =
    [Compression::None, Compression::Zlib(1), Compression::Zstd(1), Compression::Zstd(3)];

const CHANNELS: u8 = 2;

/// Prints what was said and what was found for each link, and gives it for programs.
pub(crate) fn run(ram_mib: u32, repeat: u32) -> Outcome<Vec<Value>> {
    let mut bench = Bench { guest: Guest::Linux { ram_mib }, repeat, fresh: Fresh::look()? };
    let mut stage = bench.guest.stage()?;
    let said = Said::of(&stage.checkpoint, CHANNELS, LINKS.map(|(name, _)| name))?;
    let mut checks = Vec::new();
    for (link, mbit) in LINKS {
        if let Some(Err(failure)) = mbit.map(|mbit| stage.shape(mbit)) {
            println!("\n{link}\n  skipped: no such link here: {failure}");
            continue;
        }
        let check = bench.check(&mut stage, &said, link, mbit).during(link)?;
        check.print();
        checks.push(check);
    }
    let missed: Vec<String> = checks.iter().flat_map(Check::missed).collect();
    match missed.as_slice() {
        [] => println!("\n{} of {} links checked, nothing missed", checks.len(), LINKS.len()),
        _ => println!(
            "\n{} of {} links checked, {} missed: {}",
            checks.len(),
            LINKS.len(),
            missed.len(),
            missed.join("; ")
        ),
    }
    Ok(checks.iter().map(Check::json).collect())
}

struct Bench {
    guest: Guest,
    repeat: u32,
    fresh: Fresh,
}

impl Bench {
    /// Makes every move over one link, and then all of them again: what else the machine does hits
    /// all of them alike.
    fn check<'s>(
        &mut self,
        stage: &mut Stage,
        said: &'s Said,
        link: &'static str,
        mbit: Option<u32>,
    ) -> Outcome<Check<'s>> {
        let advice = said.advice(link)?;
        let best = said.best(advice)?;
        if best.channels != usize::from(CHANNELS) {
            return Err(Failure::new(format!(
                "{} channels are advised, {CHANNELS} were asked",
                best.channels
            )));
        }
        let advised = compression(best)?;
        let mut codecs = CODECS.to_vec();
        if !codecs.contains(&advised) {
            codecs.push(advised);
        }
        let mut rows = Vec::new();
        for codec in codecs {
            let predicted = said.prediction(link, CHANNELS, codec)?;
            rows.push(Row { codec, predicted, measured: Measured::default() });
        }
        let mut by_qemu = Measured::default();
        for _ in 0..self.repeat.max(1) {
            for row in &mut rows {
                let scenario = self.scenario(row.codec, mbit);
                let cost = moves::once(&scenario, Way::OursToOurs, stage);
                row.measured.0.push(cost.during(row.codec)?);
            }
            let cost = self.by_advice(&self.scenario(advised, mbit), stage, advice);
            by_qemu.0.push(cost.during("qemu by advice")?);
        }
        Ok(Check { link, rows, advised, best, by_qemu })
    }

    fn by_advice(&self, scenario: &Scenario, stage: &mut Stage, advice: &Advice) -> Outcome<Cost> {
        moves::by_qemu(scenario, stage, &|qemu, side| follow(advice, qemu, side, &self.fresh))
    }

    fn scenario(&self, codec: Compression, mbit: Option<u32>) -> Scenario {
        let scenario = Scenario::new(&codec.to_string(), self.guest, Some(CHANNELS), codec);
        Scenario { link: mbit, ..scenario }
    }
}
