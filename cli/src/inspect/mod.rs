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

use std::io::IsTerminal;

use indicatif::{ProgressBar, ProgressStyle};
use multifd_transports::Endpoint;
use serde_json::json;

use crate::flags::{Common, Inspect};
use crate::outcome::Outcome;

/// Whatever stops an inspection, in one line.
type Result<T> = std::result::Result<T, String>;

pub(crate) fn run(flags: &Inspect, common: &Common) -> Outcome {
    let bar = progress_bar(common);
    let progress = |position: u64, len: u64| {
        bar.set_length(len);
        bar.set_position(position);
    };
    let findings = match flags.path.to_string_lossy().parse() {
        _ if flags.path.is_dir() => guest::checkpoint(&flags.path, progress),
        Ok(Endpoint::File { path, offset }) => guest::recording(&path, offset, progress),
        _ => guest::recording(&flags.path, 0, progress),
    };
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

/// On a terminal only: there are no rounds that other readers could want a line of.
fn progress_bar(common: &Common) -> ProgressBar {
    if common.quiet || !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new(0);
    if let Ok(style) = ProgressStyle::with_template("{bar:24} {bytes} of {total_bytes}") {
        bar.set_style(style);
    }
    bar
}
