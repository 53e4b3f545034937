//! Digests of the pages that were placed, compared with the source's.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

use multifd_wire::BlockName;
use thiserror::Error;

use super::{BlockSink, BlockSinks, ZEROS};
use crate::error::{Error, ErrorKind, Phase, Result};
use crate::guest::{Found, PAGE, PageDigests, READING, hash, zero_hash};

/// RAM blocks whose pages were not placed as the source has sent them: the cause of the error with
/// which a comparison of digests ends a migration.
#[derive(Debug, Error)]
#[error("digest: different; RAM blocks that are not what the source has sent: {}", names(.blocks))]
#[non_exhaustive]
pub struct DigestsDiffer {
    /// In the order of their names.
    pub blocks: Vec<BlockName>,
}

fn names(blocks: &[BlockName]) -> String {
    blocks.iter().map(BlockName::as_str).collect::<Vec<_>>().join(", ")
}

/// Pages for which the page table is asked in one go.
const AT_A_TIME: usize = 128;

/// The digests of a block.
#[derive(Debug)]
pub(super) struct KeptDigests {
    pages: PageDigests,
    compared: AtomicBool,
    different: AtomicBool,
}

impl BlockSinks {
    /// From now on a digest of each page is kept. None has been placed.
    pub(crate) fn keep_digests(&self) {
        for sink in self.all() {
            let pages = PageDigests::new(sink.block().pages());
            let compared = AtomicBool::new(false);
            let _ = sink.digests.set(KeptDigests { pages, compared, different: AtomicBool::new(false) });
        }
    }

    /// Digests are to be compared again.
    pub(super) fn forget_comparisons(&self) {
        for kept in self.all().filter_map(|sink| sink.digests.get()) {
            kept.compared.store(false, Ordering::Relaxed);
        }
    }

    /// Every block was compared.
    pub(in crate::destination) fn are_compared(&self) -> bool {
        self.all()
            .all(|sink| sink.digests.get().is_some_and(|digests| digests.compared.load(Ordering::Relaxed)))
    }

    /// The guest may be loaded: every block was compared with what the source has sent, and is
    /// that.
    pub(in crate::destination) fn check_digests(&self) -> Result<()> {
        let state = |sink: &BlockSink, flag: fn(&KeptDigests) -> &AtomicBool| {
            sink.digests.get().is_some_and(|digests| flag(digests).load(Ordering::Relaxed))
        };
        let different = self.all().filter(|sink| state(sink, |digests| &digests.different));
        let mut blocks: Vec<BlockName> = different.map(|sink| sink.block().name().clone()).collect();
        if !blocks.is_empty() {
            blocks.sort();
            let cause = DigestsDiffer { blocks };
            return Err(Error::new(ErrorKind::InvalidStream, Phase::Active, cause.to_string()).because(cause));
        }
        let missing = self.all().find(|sink| !state(sink, |digests| &digests.compared));
        missing.map_or(Ok(()), |sink| {
            let detail = format!("no digest of RAM block {}, as was announced", sink.block().name());
            Err(Error::misbehaved(Phase::Active, detail))
        })
    }
}

impl BlockSink {
    pub(crate) fn keeps_digests(&self) -> bool {
        self.digests.get().is_some()
    }

    /// Pages from `first` on have these hashes from now on.
    pub(super) fn note(
        &self,
        first: usize,
        pages: usize,
        hashes: impl IntoIterator<Item = u64>,
    ) -> Result<()> {
        let Some(KeptDigests { pages: digests, .. }) = self.digests.get() else { return Ok(()) };
        let (mut noting, mut noted) = (digests.noting(), 0);
        for (page, hash) in (first..).zip(hashes) {
            noting.note(page, hash)?;
            noted += 1;
        }
        if noted == pages {
            return Ok(());
        }
        Err(Error::bug(Phase::Active, format_args!("{noted} hashes of {pages} pages that were placed")))
    }

    /// Reads pages again: how many have come, and which of them are not what was placed there.
    pub(in crate::destination) fn changed(&self, pages: Range<usize>) -> Result<(u64, Vec<usize>)> {
        let none = || Error::bug(Phase::Device, "pages are verified of which no digests were kept");
        let digests = &self.digests.get().ok_or_else(none)?.pages;
        let (mut found, mut changed, mut read) = (Found::default(), Vec::new(), 0);
        let all: Vec<usize> = pages.collect();
        for batch in all.chunks(AT_A_TIME) {
            let looked = self.page_table.look(&self.block, self.absent, batch, &mut found);
            looked.map_err(|bad| self.fault(READING, bad.page..bad.page + 1, bad.cause))?;
            for (page, zero) in batch.iter().zip(found.zeros()) {
                let hash = if zero { zero_hash() } else { self.hash_of(*page)? };
                if let Some(same) = digests.is_as_noted(*page, hash)? {
                    read += 1;
                    changed.extend((!same).then_some(*page));
                }
            }
        }
        Ok((read, changed))
    }

    fn hash_of(&self, page: usize) -> Result<u64> {
        let mut content = ZEROS;
        let read = self.block.memory().read(page * PAGE, &mut content);
        read.map_err(|error| self.fault(READING, page..page + 1, error))?;
        Ok(hash(&content))
    }

    /// Compares the digest of all pages with the source's, when all have been placed.
    pub(in crate::destination) fn compare(&self, digest: u64) -> Result<()> {
        let name = self.block().name();
        let kept = self.digests.get().ok_or_else(|| {
            Error::misbehaved(Phase::Active, format!("a digest of RAM block {name} that was not announced"))
        })?;
        let here = kept.pages.of_all();
        if here != digest {
            let (source, here) = (format!("{digest:#018x}"), format!("{here:#018x}"));
            tracing::warn!(block = %name, source, here, "the digest differs");
            kept.different.store(true, Ordering::Relaxed);
        }
        kept.compared.store(true, Ordering::Relaxed);
        Ok(())
    }
}
