//! A comparison of all RAM with what was sent, which finds what a dirty log has missed.

use std::fmt;
use std::num::NonZero;
use std::sync::Arc;
use std::time::{Duration, Instant};

use multifd_wire::{BlockName, pages_per_packet};
use serde::Serialize;
use thiserror::Error;

use super::outgoing::OutgoingRam;
use super::shared::SourceShared;
use crate::error::{Error, ErrorKind, Phase, Result};
use crate::guest::{DirtyBitmap, Found, PAGE, PAGE_SIZE, hash, page_names};
use crate::run::stop::Monitor;
use crate::run::workers::Crew;
use crate::work::{BlockIndex, Claim, Round};

/// What was compared of RAM, page by page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct AuditReport {
    /// Pages that were read: all of RAM; at a destination, all that has come.
    pub pages: u64,
    /// How long it took, while the guest was paused.
    pub took: Duration,
}

impl AuditReport {
    pub(crate) fn new(pages: u64, took: Duration) -> Self {
        Self { pages, took }
    }
}

/// Pages whose content is not what was sent of them, although the guest is paused and no dirty log
/// has reported them: the cause of the error with which an audit ends a migration.
#[derive(Debug, Error)]
#[non_exhaustive]
pub struct MissedPages {
    /// By block, in ascending order.
    pub blocks: Vec<(BlockName, Vec<usize>)>,
}

#[derive(Default)]
struct Progress {
    done: usize,
    missed: Vec<(BlockIndex, usize)>,
}

impl OutgoingRam {
    /// Compares every page with what was sent of it, if digests were kept: all dirty pages are out,
    /// and the guest is paused.
    ///
    /// # Errors
    /// `GuestMemory` because of [`MissedPages`].
    pub(super) fn audit(&self, shared: &Arc<SourceShared>, crew: &Crew) -> Result<Option<AuditReport>> {
        if !self.audits {
            return Ok(None);
        }
        let begun = Instant::now();
        let all = self.blocks.map(|block| {
            let all = DirtyBitmap::new(block.block.pages());
            all.set_range(0, all.pages());
            Arc::new(all)
        });
        let threads = std::thread::available_parallelism().map_or(1, NonZero::get);
        let round = Arc::new(Round::new(&all, threads));
        let progress = Monitor::new(Progress::default(), crew.stop());
        for id in 0..threads {
            let (round, shared, progress) = (Arc::clone(&round), Arc::clone(shared), progress.clone());
            crew.spawn(&format!("mig-audit-{id}"), Phase::Active, move || {
                let missed = shared.ram.compare(&round)?;
                progress.modify_and_notify(|progress| {
                    progress.done += 1;
                    progress.missed.extend(missed);
                });
                Ok(())
            })?;
        }
        let missed = progress
            .wait(crew.stop(), None, |progress| {
                (progress.done == threads).then(|| std::mem::take(&mut progress.missed))
            })
            .ok_or_else(|| Error::stopped(Phase::Active))?;
        if missed.is_empty() {
            let pages = self.blocks.iter().map(|block| block.block.pages() as u64).sum();
            return Ok(Some(AuditReport { pages, took: begun.elapsed() }));
        }
        let missed = self.by_block(missed);
        let detail = format!("audit: {missed}");
        Err(Error::new(ErrorKind::GuestMemory, Phase::Active, detail).because(missed))
    }

    /// The pages of `round` that are not what was sent of them.
    fn compare(&self, round: &Round) -> Result<Vec<(BlockIndex, usize)>> {
        let (mut claim, mut found, mut missed) = (Claim::default(), Found::default(), Vec::new());
        while let Some(batch) = round.claim(&mut claim, pages_per_packet(PAGE_SIZE)) {
            let block = self.hold(batch.block);
            let Some(digests) = block.digests() else { continue };
            self.look(&block, batch.pages, &mut found)?;
            for (page, zero) in batch.pages.iter().zip(found.zeros()) {
                let mut content = [0; PAGE];
                if !zero && !block.block.load_page(*page, &mut content) {
                    return Err(Error::bug(
                        Phase::Active,
                        format_args!("page {page} is outside of its block"),
                    ));
                }
                if digests.is_as_noted(*page, hash(&content))? != Some(true) {
                    missed.push((batch.block, *page));
                }
            }
        }
        Ok(missed)
    }

    fn by_block(&self, mut missed: Vec<(BlockIndex, usize)>) -> MissedPages {
        missed.sort_unstable();
        let mut blocks: Vec<(BlockName, Vec<usize>)> = Vec::new();
        for (block, page) in missed {
            let name = self.blocks.at(block).block.name();
            match blocks.last_mut() {
                Some((last, pages)) if last == name => pages.push(page),
                _ => blocks.push((name.clone(), vec![page])),
            }
        }
        MissedPages { blocks }
    }
}

impl fmt::Display for MissedPages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let count: usize = self.blocks.iter().map(|(_, pages)| pages.len()).sum();
        write!(f, "{count} pages have changed without a dirty bit since they were sent")?;
        page_names::write(f, &self.blocks)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missed_pages_are_named_by_block_and_range() {
        let missed = |blocks: &[(&str, Vec<usize>)]| MissedPages {
            blocks: blocks.iter().map(|(name, pages)| ((*name).try_into().unwrap(), pages.clone())).collect(),
        };
        let few = missed(&[("pc.ram", vec![5, 9, 10, 11]), ("vga", vec![0])]);
        assert_eq!(
            few.to_string(),
            "5 pages have changed without a dirty bit since they were sent; RAM block pc.ram: 5, 9..12; RAM block vga: 0"
        );
        let many = missed(&[("pc.ram", (0..200).step_by(2).collect()), ("vga", vec![0])]).to_string();
        assert!(many.ends_with(", 60, 62, and more; and more blocks"), "{many}");
    }
}
