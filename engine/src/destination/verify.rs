//! All RAM that was placed, read again when the last page is there: what has changed it since is
//! found.

use std::fmt;
use std::num::NonZero;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use multifd_wire::BlockName;
use thiserror::Error;

use super::place::{BlockSink, BlockSinks};
use crate::error::{Error, ErrorKind, Phase, Result};
use crate::guest::page_names;
use crate::run::stop::Monitor;
use crate::run::workers::Crew;
use crate::source::AuditReport;

/// Pages that are not what was placed in them: the cause of the error with which
/// [`DestinationConfig::verify`](crate::DestinationConfig::verify) refuses a guest.
#[derive(Debug, Error)]
#[non_exhaustive]
pub struct ChangedPages {
    /// By block, in ascending order.
    pub blocks: Vec<(BlockName, Vec<usize>)>,
}

impl fmt::Display for ChangedPages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let count: usize = self.blocks.iter().map(|(_, pages)| pages.len()).sum();
        write!(f, "{count} pages are not what was placed in them")?;
        page_names::write(f, &self.blocks)
    }
}

/// Pages of one block that a thread reads in one go: 16 MiB.
const PART_PAGES: usize = 4096;

/// Where the threads have come to.
struct Plan {
    parts: Vec<(Arc<BlockSink>, Range<usize>)>,
    cursor: AtomicUsize,
}

#[derive(Default)]
struct Progress {
    done: usize,
    pages: u64,
    changed: Vec<(BlockName, Vec<usize>)>,
}

/// Compares every page with the digest of what was placed there, on all cores.
///
/// # Errors
/// `GuestMemory` because of [`ChangedPages`].
pub(super) fn verify(sinks: &BlockSinks, crew: &Crew) -> Result<AuditReport> {
    let begun = Instant::now();
    let parts = sinks.all().flat_map(|sink| {
        let pages = sink.block().pages();
        let part = move |first| (Arc::clone(sink), first..pages.min(first + PART_PAGES));
        (0..pages).step_by(PART_PAGES).map(part)
    });
    let plan = Arc::new(Plan { parts: parts.collect(), cursor: AtomicUsize::new(0) });
    let threads = std::thread::available_parallelism().map_or(1, NonZero::get);
    let progress = Monitor::new(Progress::default(), crew.stop());
    for id in 0..threads {
        let (plan, progress, stop) = (Arc::clone(&plan), progress.clone(), crew.stop().clone());
        crew.spawn(&format!("mig-verify-{id}"), Phase::Device, move || {
            let (mut pages, mut changed) = (0, Vec::new());
            while let Some((sink, range)) = plan.next().filter(|_| !stop.tripped()) {
                let (read, found) = sink.changed(range.clone())?;
                pages += read;
                if !found.is_empty() {
                    changed.push((sink.block().name().clone(), found));
                }
            }
            progress.modify_and_notify(|progress| {
                progress.done += 1;
                progress.pages += pages;
                progress.changed.append(&mut changed);
            });
            Ok(())
        })?;
    }
    let ended = progress.wait(crew.stop(), None, |progress| {
        (progress.done == threads).then(|| (progress.pages, std::mem::take(&mut progress.changed)))
    });
    let (pages, changed) = ended.ok_or_else(|| Error::stopped(Phase::Device))?;
    if changed.is_empty() {
        return Ok(AuditReport::new(pages, begun.elapsed()));
    }
    let cause = ChangedPages { blocks: by_block(changed) };
    Err(Error::new(ErrorKind::GuestMemory, Phase::Device, cause.to_string()).because(cause))
}

impl Plan {
    fn next(&self) -> Option<&(Arc<BlockSink>, Range<usize>)> {
        self.parts.get(self.cursor.fetch_add(1, Ordering::Relaxed))
    }
}

fn by_block(mut parts: Vec<(BlockName, Vec<usize>)>) -> Vec<(BlockName, Vec<usize>)> {
    parts.sort_unstable();
    let mut blocks: Vec<(BlockName, Vec<usize>)> = Vec::new();
    for (name, mut pages) in parts {
        match blocks.last_mut() {
            Some((last, all)) if *last == name => all.append(&mut pages),
            _ => blocks.push((name, pages)),
        }
    }
    blocks
}
