//! The whole way from a configuration to findings.

use std::num::NonZeroUsize;
use std::thread;

use crate::advice::{self, Constraints};
use crate::config::{Config, Progress, Source};
use crate::error::{Error, Result};
use crate::findings::{DirtyFacts, DirtyOrigin, Findings, SampleFacts};
use crate::levels::{Bench, Measured};
use crate::memory::{self, Memory, PAGE, Rewrites};
use crate::model::{Guest, Model};
use crate::sample::{Plan, Sample};
use crate::{kinds, machine, predict, rewrites};

/// Bytes of pages to sample: enough for an error of some percent, little enough for a minute.
const SAMPLE: u64 = 256 << 20;
const QUICK_SAMPLE: u64 = 32 << 20;

/// Least error of a ratio that is noted, as a share of the ratio: enough to confuse neighbouring
/// levels.
const WIDE: f64 = 0.1;

/// Samples the guest's memory, measures codecs and machine, and predicts. Takes about a minute,
/// with `quick` some seconds, on all cores; a live process goes on and has precedence.
///
/// # Errors
/// The guest cannot be read, has only zero pages, or a part of the machine cannot be measured.
pub fn find(config: &Config, progress: &dyn Fn(Progress)) -> Result<Findings> {
    let mut memory = open(&config.source, progress)?;
    let live = matches!(config.source, Source::Process(_));
    let mut plan = Plan::of(&*memory);
    let limit = config.sample.unwrap_or(if config.quick { QUICK_SAMPLE } else { SAMPLE });
    let sample = first_sample(&mut plan, &mut *memory, limit, progress)?;
    let rewrites = memory.rewrites()?;
    let bench = Bench {
        sample: &sample,
        threads: if live { own_cores().saturating_sub(1).max(1) } else { own_cores() },
        polite: live,
        quick: config.quick,
        only: config.codec,
        progress,
    };
    let cores = config.cores.map_or_else(own_cores, NonZeroUsize::get);
    let machine = bench.aside(|| machine::measure(&sample, cores))?;
    let measured = bench.measure(&mut plan, &mut *memory, limit)?;

    let (ram, held) = (memory.extent().bytes(), memory.extent().held_bytes());
    let data = held as f64 * measured.data_share;
    let dirty = dirty(config.dirty_rate, rewrites.as_ref(), held);
    let guest = Guest { ram: ram as f64, data, devices: memory.extent().device_bytes as f64 };
    let model = Model { guest, dirty, machine: &machine, downtime_limit: config.downtime_limit };
    let predictions = predict::predictions(config, &model, &measured.codecs);
    let downtime_limit_ms = u64::try_from(config.downtime_limit.as_millis()).unwrap_or(u64::MAX);
    let constraints = Constraints { downtime_ms: downtime_limit_ms, max_bandwidth: config.max_bandwidth };
    let advise = |link| advice::advise(link, &predictions, constraints);
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
        curves: predict::curves(config, &model, &measured.codecs),
        advice: config.links.iter().filter_map(advise).collect(),
        predictions,
        notes: notes(config, &measured),
        codecs: measured.codecs,
        machine,
    })
}

fn open(source: &Source, progress: &dyn Fn(Progress)) -> Result<Box<dyn Memory>> {
    match source {
        Source::Path(path) => {
            memory::open(path, &|done, total| progress(Progress { done, total, codec: None }))
        }
        Source::Process(pid) => memory::of_process(*pid),
    }
}

/// The first parts of the memory with a page that is not zero.
fn first_sample(
    plan: &mut Plan,
    memory: &mut dyn Memory,
    limit: u64,
    progress: &dyn Fn(Progress),
) -> Result<Sample> {
    loop {
        let read = |done| progress(Progress { done, total: limit, codec: None });
        let sample = plan.take(memory, limit, &read)?;
        if !sample.runs.is_empty() {
            return Ok(sample);
        }
        if plan.is_done() {
            return Err(Error::NothingToMeasure { name: memory.name() });
        }
    }
}

/// `given` is the rate that was configured, `held` the bytes that may be written at all.
fn dirty(given: Option<u64>, rewrites: Option<&Rewrites>, held: u64) -> DirtyFacts {
    let none = |origin| DirtyFacts { origin, bytes_per_s: 0, working_set_bytes: 0 };
    match (given, rewrites) {
        (Some(bytes_per_s), _) => {
            DirtyFacts { origin: DirtyOrigin::Given, bytes_per_s, working_set_bytes: held }
        }
        (None, Some(rewrites)) if !rewrites.changed.is_empty() => rewrites::measured(&rewrites.changed, held),
        (None, Some(_)) => none(DirtyOrigin::Unknown),
        (None, None) => none(DirtyOrigin::Still),
    }
}

fn notes(config: &Config, measured: &Measured) -> Vec<String> {
    let mut notes = Vec::new();
    let compressing = measured.codecs.iter().filter(|facts| facts.encode_bytes_per_s.is_some());
    let least = compressing.map(|facts| facts.ratio_error / facts.ratio).min_by(f64::total_cmp);
    if let Some(least) = least.filter(|least| *least > WIDE) {
        notes.push(format!(
            "every ratio may be off by {:.0} %: a larger sample (--sample) narrows it down",
            least * 100.0
        ));
    }
    if config.tls {
        notes.push("the cost of TLS is not in the model".to_owned());
    }
    if matches!(config.source, Source::Process(_)) {
        notes.push("a page rewritten with the same bytes counts as not written".to_owned());
    }
    notes
}

fn own_cores() -> usize {
    thread::available_parallelism().map_or(1, NonZeroUsize::get)
}
