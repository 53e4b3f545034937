//! `multifd inspect DIR|FILE`: what is in a checkpoint or a recorded stream.
//!
//! ```text
//!  Checkpoint, Recording ─ page records ─> Survey ─ counts, Sample ─┐
//!                        └ Devices ──────> values ──────────────────┴─> Findings ─> table or JSON
//! ```

mod findings;
mod guest;
mod sample;
mod survey;
mod table;
#[cfg(test)]
mod tests;
mod values;

use multifd_tune::AtRest;
use serde_json::json;

use crate::flags::{Common, Inspect};
use crate::outcome::Outcome;
use crate::progress;
use crate::sandbox::Sandbox;

/// Whatever stops an inspection, in one line.
type Result<T> = std::result::Result<T, String>;

pub(crate) fn run(flags: &Inspect, common: &Common) -> Outcome {
    Sandbox::new().at_rest(&flags.path).enter(common);
    let bar = progress::bar(common, "{bar:24} {bytes} of {total_bytes}");
    let progress = |position: u64, len: u64| {
        bar.set_length(len);
        bar.set_position(position);
    };
    let findings = AtRest::at(&flags.path).map_err(|error| error.chain()).and_then(|found| match found {
        AtRest::Checkpoint(directory) => guest::checkpoint(&directory, progress),
        AtRest::Stream(path, offset) => guest::recording(&path, offset, progress),
    });
    bar.finish_and_clear();
    match findings {
        Ok(findings) => {
            if common.json {
                Outcome::shown(String::new(), json!(findings))
            } else {
                Outcome::shown(table::of(&findings, common.verbose > 0), json!({}))
            }
        }
        Err(error) => Outcome::broken(error),
    }
}
