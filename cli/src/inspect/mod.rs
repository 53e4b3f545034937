//! `multifd inspect DIR|FILE`: what is in a checkpoint or a recorded stream.
//!
//! ```text
//!  Checkpoint, Recording ─ page records ─> Survey ─ counts, Sample ─┐
//!                        └ Devices ─ examined, values ──────────────┴─> Findings ─> table or JSON
//!                                  └ examined ──────────────────────> --check
//!  two of them           ─ Devices ─ examined, differences ─────────> what differs
//! ```

mod devices;
mod difference;
mod examined;
mod findings;
mod guest;
mod ram;
mod sample;
mod survey;
mod table;
#[cfg(test)]
mod tests;
mod values;

use std::path::Path;

use devices::DevicesAtRest;
use multifd_tune::AtRest;
use serde_json::json;

use crate::flags::{Common, Inspect};
use crate::outcome::Outcome;
use crate::progress;
use crate::sandbox::Sandbox;

/// Whatever stops an inspection, in one line.
type Result<T> = std::result::Result<T, String>;

pub(crate) fn run(flags: &Inspect, common: &Common) -> Outcome {
    let sandbox = Sandbox::new().at_rest(&flags.path);
    let sandbox = flags.other.iter().fold(sandbox, |sandbox, other| sandbox.at_rest(other));
    sandbox.enter(common);
    let result = match &flags.other {
        Some(other) => differences(&flags.path, other),
        None if flags.check => check(&flags.path),
        None => show(&flags.path, common),
    };
    result.unwrap_or_else(Outcome::broken)
}

fn show(path: &Path, common: &Common) -> Result<Outcome> {
    let bar = progress::bar(common, "{bar:24} {bytes} of {total_bytes}");
    let progress = |position: u64, len: u64| {
        bar.set_length(len);
        bar.set_position(position);
    };
    let findings = AtRest::at(path).map_err(|error| error.chain()).and_then(|found| match found {
        AtRest::Checkpoint(directory) => guest::checkpoint(&directory, progress),
        AtRest::Stream(path, offset) => guest::recording(&path, offset, progress),
    });
    bar.finish_and_clear();
    let findings = findings?;
    Ok(if common.json {
        Outcome::shown(String::new(), json!(findings))
    } else {
        Outcome::shown(table::of(&findings, common.verbose > 0), json!({}))
    })
}

/// `--check`: every device, and whether its state is consistent.
fn check(path: &Path) -> Result<Outcome> {
    let guest = DevicesAtRest::open(path)?;
    let checked = examined::all(&guest);
    let wrong: usize = checked.iter().map(|device| device.findings.len()).sum();
    let (table, keys) = (table::of_check(&checked), json!({ "devices": checked, "inconsistent": wrong }));
    Ok(match wrong {
        0 => Outcome::shown(table, keys),
        _ => Outcome::found_wrong(table, keys, format!("{}: {wrong} findings", path.display())),
    })
}

/// Two guests: what differs in their devices.
fn differences(left: &Path, right: &Path) -> Result<Outcome> {
    let (left, right) = (DevicesAtRest::open(left)?, DevicesAtRest::open(right)?);
    let differences = difference::between(&left, &right);
    let table = table::of_differences(&differences);
    Ok(Outcome::shown(table, json!({ "devices": differences })))
}
