//! `multifd demo`: a guest that is being written moves from this process to another, and every page
//! is compared.

mod content;
pub(crate) mod destination;
mod guest;

use multifd_codecs::CodecChoice;
use multifd_engine::wire::Configuration;
use multifd_engine::{
    AutoConverge, DeviceState, DirtyMarker, Error, Progress, Report, SoftwareLog, Source, SourceBuilder,
    UserfaultLog,
};
use serde_json::json;

use crate::flags::{Common, Demo, Rate};
use crate::outcome::{Failure, Outcome};
use crate::progress::{self, Lines};
use crate::signals;
use destination::Process;
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
        Ok(Moved { report, log, pages }) => {
            let over = report.over_limit(common.downtime_limit);
            let mut proof: String = report.decisions.iter().map(|round| format!("  {round}\n")).collect();
            proof.extend(over.iter().map(|why| format!("downtime     {why}\n")));
            proof +=
                &format!("dirty log    {log}\nverified     {pages} pages of the stopped guest, all equal\n");
            Outcome::migrated(&report, &proof)
                .with("verified", json!(true))
                .with("dirty_log", json!(log))
                .with("downtime_ledger", json!(report.ledger))
                .with("decisions", json!(report.decisions))
                .with("xbzrle", json!(report.xbzrle))
                .with("downtime_over_limit", json!(over))
        }
        Err(error) => match error.downcast::<Error>() {
            Ok(error) => Outcome::failed(&Failure::Migration(*error), reached),
            Err(error) => Outcome::broken(error.to_string()),
        }
        .with("verified", json!(false)),
    }
}

struct Moved {
    report: Report,
    log: &'static str,
    /// Pages that were compared.
    pages: usize,
}

fn migrate(flags: &Demo, common: &Common, reached: &mut Option<Progress>) -> Result<Moved> {
    let Rate(dirty_rate) = flags.dirty_rate;
    let mut guest = Guest::new(flags.ram)?;
    let process = Process::start()?;
    let (builder, marker) = with_log(settings(flags, common, &guest)?, &guest);
    let log = if marker.is_some() { "software bitmap: there is no userfaultfd here" } else { "userfaultfd" };
    guest.run(dirty_rate.map_or(0, std::num::NonZeroU64::get), marker.as_ref())?;

    let source = builder.build()?;
    signals::cancel_on_signal(source.canceller());
    let progress = source.progress();
    let result =
        progress::shown(common, &progress, Lines::Told, || move_over(source, &process.uri, &guest, common));
    *reached = Some(progress.now());
    let report = result?;
    let arrived = process.hashes()?;
    Ok(Moved { report, log, pages: compare(&guest, &arrived)? })
}

fn settings(flags: &Demo, common: &Common, guest: &Guest) -> Result<SourceBuilder> {
    let choice = common.codec.unwrap_or(match common.channels {
        Some(0) => CodecChoice::None,
        _ => DEFAULT_CODEC,
    });
    let configuration = Configuration::new(MACHINE);
    let mut builder = Source::builder(vec![guest.block.clone()], configuration)
        .channels(common.channels.unwrap_or(DEFAULT_CHANNELS))
        .codec(choice.codec())
        .max_bandwidth(common.max_bandwidth())
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

fn move_over(source: Source, uri: &str, guest: &Guest, common: &Common) -> Result<Report> {
    let mut precopy = source.connect(&uri.parse()?)?;
    while !precopy.converged() {
        let record = precopy.round()?;
        guest.throttle(record.throttle_percent);
        progress::line(common, record);
    }
    guest.pause();
    Ok(precopy.stop_copy()?.commit(&DeviceState::none())?)
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
