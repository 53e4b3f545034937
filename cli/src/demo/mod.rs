//! `multifd demo`: a guest that is being written moves from this process to another, and every page
//! is compared. With `--postcopy` it goes on there before its RAM is there.

mod content;
pub(crate) mod destination;
mod guest;
mod state;
mod vcpus;

use multifd_codecs::CodecChoice;
use multifd_engine::wire::Configuration;
use multifd_engine::{
    AutoConverge, DirtyMarker, Error, Precopy, Progress, Report, SoftwareLog, Source, SourceBuilder,
    UserfaultLog,
};
use multifd_transports::Endpoint;
use serde_json::{Value, json};

use crate::flags::{CodecFlag, Common, Demo, Rate};
use crate::outcome::{Failure, Outcome};
use crate::progress::{self, Lines};
use crate::{postcopy, signals};
use destination::{Arrival, Process};
use guest::Guest;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

const MACHINE: &str = "multifd-demo-10.0";
const DEFAULT_CHANNELS: usize = 2;
const DEFAULT_CODEC: CodecChoice = CodecChoice::zstd::<1>();

pub(crate) fn run(flags: &Demo, common: &Common) -> Outcome {
    if common.tls_dir.is_some() {
        let detail = "the demo goes from process to process, without TLS".to_owned();
        return Outcome::failed(&Failure::Usage(detail), None).with("verified", json!(false));
    }
    let mut reached = None;
    match migrate(flags, common, &mut reached) {
        Ok(Moved { report, log, pages, there }) => {
            let over = report.over_limit(common.downtime_limit);
            let mut proof: String = report.decisions.iter().map(|round| format!("  {round}\n")).collect();
            proof.extend(over.iter().map(|why| format!("downtime     {why}\n")));
            proof +=
                &format!("dirty log    {log}\nverified     {pages} pages of the stopped guest, all equal\n");
            if let Some(audit) = report.audit {
                proof += &format!("audit        {} pages are what was sent of them\n", audit.pages);
            }
            if let Some(touched) = there.get("touched") {
                proof +=
                    &format!("guest        used {touched} pages at the destination before all were there\n");
            }
            with_postcopy(Outcome::migrated(&report, &proof), &report, there)
                .with("verified", json!(true))
                .with("dirty_log", json!(log))
                .with("downtime_ledger", json!(report.ledger))
                .with("decisions", json!(report.decisions))
                .with("xbzrle", json!(report.xbzrle))
                .with("audit", json!(report.audit))
                .with("downtime_over_limit", json!(over))
        }
        Err(error) => match error.downcast::<Error>() {
            Ok(error) => Outcome::failed(&Failure::Migration(*error), reached),
            Err(error) => Outcome::broken(error.to_string()),
        }
        .with("verified", json!(false)),
    }
}

/// The figures of both ends of a post-copy.
fn with_postcopy(outcome: Outcome, report: &Report, there: Value) -> Outcome {
    let Some(postcopy) = &report.postcopy else { return outcome };
    let mut both = there;
    if let (Value::Object(both), Value::Object(here)) = (&mut both, json!(postcopy)) {
        both.extend(here);
    }
    outcome.with("postcopy", both)
}

struct Moved {
    report: Report,
    log: &'static str,
    /// Pages that were compared.
    pages: usize,
    there: Value,
}

fn migrate(flags: &Demo, common: &Common, reached: &mut Option<Progress>) -> Result<Moved> {
    let Rate(dirty_rate) = flags.dirty_rate;
    let mut guest = Guest::new(flags.ram)?;
    let process = Process::start(flags.may_switch())?;
    let (builder, marker) = with_log(settings(flags, common, &guest)?, &guest);
    let log = if marker.is_some() { "software bitmap: there is no userfaultfd here" } else { "userfaultfd" };
    guest.run(dirty_rate.map_or(0, std::num::NonZeroU64::get), marker.as_ref())?;

    let source = builder.build()?;
    signals::cancel_on_signal(source.canceller());
    let progress = source.progress();
    let result = progress::shown(common, &progress, Lines::Told, || {
        let uri = process.uri.parse()?;
        if flags.postcopy {
            follow(source.connect(&uri)?, &uri, &guest)
        } else {
            move_over(source, &uri, &guest, common)
        }
    });
    *reached = Some(progress.now());
    let report = result?;
    let Arrival { figures, hashes } = process.arrived()?;
    Ok(Moved { report, log, pages: compare(&guest, &hashes)?, there: figures })
}

fn settings(flags: &Demo, common: &Common, guest: &Guest) -> Result<SourceBuilder> {
    // In post-copy, main is enough for a guest on this machine.
    let channels = common.channels.unwrap_or(if flags.postcopy { 0 } else { DEFAULT_CHANNELS });
    let default = CodecFlag::Fixed(if channels == 0 { CodecChoice::None } else { DEFAULT_CODEC });
    let choice = common.codec.unwrap_or(default);
    let configuration = Configuration::new(MACHINE);
    let mut builder = Source::builder(vec![guest.block.clone()], configuration)
        .channels(channels)
        .codec(choice.fixed().unwrap_or(CodecChoice::None).codec())
        .auto_codec(choice == CodecFlag::Auto)
        .max_bandwidth(common.max_bandwidth())
        .postcopy(flags.may_switch())
        .postcopy_preempt(flags.postcopy_preempt)
        .audit(flags.audit)
        .checksums(flags.proof.checksums())
        .digest(flags.proof.digest())
        .limits(flags.convergence.limits(common.downtime_limit))
        .timeout(common.timeout);
    if flags.auto_converge {
        builder = builder.auto_converge(AutoConverge::default());
    }
    if let Some(bytes) = flags.xbzrle_cache {
        builder = builder.xbzrle(usize::try_from(bytes)?);
    }
    Ok(builder)
}

/// userfaultfd if the kernel has what it takes; else a bitmap that the guest keeps by the marker.
fn with_log(builder: SourceBuilder, guest: &Guest) -> (SourceBuilder, Option<DirtyMarker>) {
    match UserfaultLog::new() {
        Ok(log) => (builder.dirty_log(log), None),
        Err(error) => {
            tracing::warn!(%error, "no userfaultfd");
            let log = SoftwareLog::new(std::slice::from_ref(&guest.block));
            let marker = log.marker();
            (builder.dirty_log(log), Some(marker))
        }
    }
}

/// What has not gone follows the guest.
fn follow(precopy: Precopy, uri: &Endpoint, guest: &Guest) -> Result<Report> {
    guest.pause();
    Ok(postcopy::serve(precopy.switch_to_postcopy(&state::of(guest.block.pages())?)?, uri, None)?)
}

fn move_over(source: Source, uri: &Endpoint, guest: &Guest, common: &Common) -> Result<Report> {
    let mut precopy = source.connect(uri)?;
    while !precopy.converged() {
        let record = precopy.round()?;
        guest.throttle(record.throttle_percent);
        progress::line(common, record);
        if precopy.wants_postcopy() {
            return follow(precopy, uri, guest);
        }
    }
    guest.pause();
    Ok(precopy.stop_copy()?.commit(&state::of(guest.block.pages())?)?)
}

/// Compares every page of the stopped guest with what arrived; the count of pages.
fn compare(guest: &Guest, arrived: &[u64]) -> Result<usize> {
    let pages = guest.block.pages();
    if arrived.len() != pages {
        return Err(format!("{pages} pages were sent, {} arrived", arrived.len()).into());
    }
    match arrived.iter().enumerate().find(|(page, hash)| destination::hash(&guest.block, *page) != **hash) {
        None => Ok(pages),
        Some((page, _)) => Err(format!("page {page} is not what the guest had").into()),
    }
}
