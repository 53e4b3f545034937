//! `multifd tune SOURCE`: what a move of this memory will cost over a link, and what to set.
//!
//! ```text
//!  checkpoint, stream, live process ─> Memory ─ a sample of its pages ─> measured: kinds, codecs ─┐
//!                                         └ what is written again ─────> dirty rate, xbzrle ──────┤
//!  this machine ─ sockets, memory ────────────────────────────────────> measured: Machine ────────┤
//!                                         Findings <─ advice <─ predictions <─ model of a move <──┘
//!                                            └─> table, JSON, page with plots
//! ```

mod advice;
mod curves;
mod findings;
mod kinds;
mod levels;
mod machine;
mod measure;
mod memory;
mod model;
mod page;
mod predict;
mod rewrites;
mod sample;
mod table;

use std::fs::File;
use std::io::{self, Write};
use std::num::{NonZeroU64, NonZeroUsize};
use std::path::Path;
use std::thread;

use indicatif::ProgressBar;
use serde_json::json;

use crate::flags::{Common, Rate, Tune};
use crate::outcome::Outcome;
use crate::progress;
use advice::Limits;
use findings::{DirtyFacts, DirtyOrigin, Findings, SampleFacts};
use levels::{Bench, Measured};
use memory::{Memory, PAGE, Rewrites};
use model::{Guest, Model};
use predict::Choices;
use sample::Plan;

/// Whatever stops it, in one line.
type Result<T> = std::result::Result<T, String>;

/// Bytes of pages to look at: enough for an error of some percent, little enough for a minute.
const SAMPLE: u64 = 256 << 20;
const QUICK_SAMPLE: u64 = 32 << 20;

pub(crate) fn run(flags: &Tune, common: &Common) -> Outcome {
    match tune(flags, common) {
        Ok(findings) if common.json => Outcome::shown(String::new(), json!(findings)),
        Ok(findings) => Outcome::shown(table::of(&findings), json!({})),
        Err(error) => Outcome::broken(error),
    }
}

/// Finds, and writes the page.
fn tune(flags: &Tune, common: &Common) -> Result<Findings> {
    let same = |page: &Path| flags.source.as_ref().is_some_and(|source| is_same(source, page));
    if let Some(path) = flags.html.as_deref().filter(|path| same(path)) {
        return Err(format!("{} is what is to be looked at, and not to be overwritten", path.display()));
    }
    // Opened first: nobody wants to hear after a minute that there is no such folder.
    let page = flags.html.as_ref().map(|path| {
        let file = File::options().create(true).write(true).truncate(false).open(path);
        Ok::<_, String>((file.map_err(|error| unwritten(path, &error))?, path))
    });
    let page = page.transpose()?;
    let bar = progress::bar(common, "{bar:24} {percent} % {msg}");
    let findings = find(flags, common, &bar);
    bar.finish_and_clear();
    let findings = findings?;
    if let Some((mut file, path)) = page {
        let written = file.set_len(0).and_then(|()| file.write_all(page::html(&findings).as_bytes()));
        written.map_err(|error| unwritten(path, &error))?;
    }
    Ok(findings)
}

fn is_same(one: &Path, other: &Path) -> bool {
    one.canonicalize().is_ok_and(|one| other.canonicalize().is_ok_and(|other| one == other))
}

fn unwritten(path: &Path, error: &io::Error) -> String {
    format!("writing {}: {error}", path.display())
}

fn find(flags: &Tune, common: &Common, bar: &ProgressBar) -> Result<Findings> {
    let mut memory = open(flags, bar)?;
    let mut plan = Plan::of(&*memory);
    let look = flags.sample.unwrap_or(if flags.quick { QUICK_SAMPLE } else { SAMPLE });
    bar.set_length(look);
    let sample = loop {
        let sample = plan.take(&mut *memory, look, &|bytes| bar.set_position(bytes))?;
        if !sample.runs.is_empty() {
            break sample;
        }
        if plan.is_done() {
            let name = memory.name();
            return Err(format!("{name} has no page that is not zero: there is nothing to measure"));
        }
    };
    let rewrites = memory.rewrites()?;
    let cores = flags.cores.map_or_else(own_cores, usize::from);
    let bench = Bench {
        sample: &sample,
        threads: if flags.pid.is_some() { own_cores().saturating_sub(1).max(1) } else { own_cores() },
        polite: flags.pid.is_some(),
        quick: flags.quick,
        only: common.codec.clone(),
        bar,
    };
    let machine = bench.aside(|| machine::measure(&sample, cores))?;
    let measured = bench.measure(&mut plan, &mut *memory, look)?;

    let (ram, held) = (memory.extent().bytes(), memory.extent().held_bytes());
    let data = held as f64 * measured.data_share;
    let dirty = dirty(flags, rewrites.as_ref(), held);
    let guest = Guest { ram: ram as f64, data, devices: memory.extent().device_bytes as f64 };
    let model =
        Model { guest, dirty, machine: &machine, downtime_limit: common.downtime_limit.as_secs_f64() };
    let choices = Choices::of(flags, common);
    let predictions = choices.predict(&model, &measured.codecs);
    let downtime_limit_ms = u64::try_from(common.downtime_limit.as_millis()).unwrap_or(u64::MAX);
    let limits = Limits { downtime_ms: downtime_limit_ms, max_bandwidth: common.max_bandwidth() };
    let advise = |link| advice::advise(link, &predictions, limits);
    Ok(Findings {
        source: memory.name(),
        ram_bytes: ram,
        sample: SampleFacts {
            pages: measured.pages,
            bytes: measured.pages * PAGE as u64,
            share: measured.share,
        },
        pages: kinds::kinds(&sample, data / ram.max(1) as f64),
        xbzrle: rewrites.as_ref().and_then(rewrites::xbzrle),
        dirty,
        downtime_limit_ms,
        curves: choices.curves(&model, &measured.codecs),
        advice: choices.links.iter().filter_map(advise).collect(),
        predictions,
        notes: notes(flags, common, &measured),
        codecs: measured.codecs,
        machine,
    })
}

fn open(flags: &Tune, bar: &ProgressBar) -> Result<Box<dyn Memory>> {
    let progress = |position: u64, len: u64| {
        bar.set_length(len);
        bar.set_position(position);
    };
    match &flags.source {
        Some(path) => memory::open(path, &progress),
        None => memory::of_process(flags.pid.unwrap_or_default()),
    }
}

/// `held` bytes may be written at all.
fn dirty(flags: &Tune, rewrites: Option<&Rewrites>, held: u64) -> DirtyFacts {
    match (flags.dirty_rate, rewrites) {
        (Some(Rate(rate)), _) => DirtyFacts {
            origin: DirtyOrigin::Given,
            bytes_per_s: rate.map_or(0, NonZeroU64::get),
            working_set_bytes: held,
        },
        (None, Some(rewrites)) if !rewrites.changed.is_empty() => rewrites::measured(&rewrites.changed, held),
        (None, Some(_)) => DirtyFacts { origin: DirtyOrigin::Unknown, bytes_per_s: 0, working_set_bytes: 0 },
        (None, None) => DirtyFacts { origin: DirtyOrigin::Still, bytes_per_s: 0, working_set_bytes: 0 },
    }
}

fn notes(flags: &Tune, common: &Common, measured: &Measured) -> Vec<String> {
    let mut notes = Vec::new();
    let packed = measured.codecs.iter().filter(|codec| codec.codec != "none");
    let least = packed.map(|codec| codec.ratio_error / codec.ratio).min_by(f64::total_cmp);
    if let Some(least) = least.filter(|least| *least > WIDE) {
        notes.push(format!(
            "all ratios may be off by {:.0} %: --sample takes a larger part of the memory",
            least * 100.0
        ));
    }
    if common.tls_dir.is_some() {
        notes.push("what TLS costs is not in the model".to_owned());
    }
    if flags.pid.is_some() {
        notes.push("a page that was written with the bytes that it had counts as not written".to_owned());
    }
    notes
}

/// An error of a ratio that somebody should know of: as much as tells one codec from the next.
const WIDE: f64 = 0.1;

fn own_cores() -> usize {
    thread::available_parallelism().map_or(1, NonZeroUsize::get)
}
