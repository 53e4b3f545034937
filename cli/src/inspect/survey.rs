//! Counting pages.

use multifd_codecs::zero;
use multifd_engine::{PageContent, PageRecord};
use multifd_tune::PageStates;

use super::Result;
use super::findings::{Block, Held, Pages};
use super::sample::Sample;

/// What has been seen of the pages of a guest.
pub(super) struct Survey {
    page_size: u64,
    blocks: Vec<Counts>,
    states: PageStates,
    sample: Sample,
}

/// One block.
#[derive(Clone, Default)]
pub(super) struct Counts {
    length: u64,
    /// Records with data, of zero pages, with a difference.
    pub(super) normal: u64,
    pub(super) zero: u64,
    pub(super) xbzrle: u64,
    /// Pages with more than one record.
    pub(super) repeated: u64,
    /// Pages with a record, and those that are zero by their last one.
    seen: u64,
    zero_pages: u64,
}

impl Survey {
    /// Of blocks with these lengths in bytes.
    pub(super) fn new(lengths: &[u64], page_size: usize) -> Self {
        let blocks = lengths.iter().map(|length| Counts { length: *length, ..Counts::default() }).collect();
        Self {
            page_size: page_size as u64,
            blocks,
            states: PageStates::default(),
            sample: Sample::new(page_size),
        }
    }

    /// A page, or a run of zero pages, of a guest where each page comes once.
    pub(super) fn stored(&mut self, record: &PageRecord<'_>) {
        let Some(counts) = self.blocks.get_mut(record.block) else { return };
        match record.content {
            PageContent::Data(page) => {
                counts.normal += 1;
                counts.seen += 1;
                if zero::is_zero(page) {
                    counts.zero_pages += 1;
                } else {
                    self.sample.offer(record.block, page);
                }
            }
            PageContent::Zero { pages } => {
                counts.zero += pages;
                counts.seen += pages;
                counts.zero_pages += pages;
            }
            PageContent::Xbzrle(_) => {}
        }
    }

    /// A page of a stream, where the last record of a page counts.
    pub(super) fn sent(&mut self, record: &PageRecord<'_>) -> Result<()> {
        let is_zero = match record.content {
            PageContent::Data(page) => zero::is_zero(page),
            // QEMU sends a page that has become zero as such.
            PageContent::Xbzrle(_) => false,
            PageContent::Zero { .. } => true,
        };
        let before =
            self.states.note(record.block, record.page, is_zero).map_err(|error| error.to_string())?;
        let Some(counts) = self.blocks.get_mut(record.block) else { return Ok(()) };
        match record.content {
            PageContent::Data(page) => {
                counts.normal += 1;
                // Once a page: a page that is written all the time should not weigh more than
                // others.
                if !is_zero && !before.seen {
                    self.sample.offer(record.block, page);
                }
            }
            PageContent::Xbzrle(_) => counts.xbzrle += 1,
            PageContent::Zero { .. } => counts.zero += 1,
        }
        counts.seen += u64::from(!before.seen);
        counts.repeated += u64::from(before.seen && !before.repeated);
        counts.zero_pages += u64::from(is_zero);
        counts.zero_pages -= u64::from(before.zero);
        Ok(())
    }

    /// The result. `held` gives the form in which a block's pages are stored.
    pub(super) fn finish(
        self,
        names: impl Iterator<Item = String>,
        held: impl Fn(&Counts) -> Held,
    ) -> Result<(Vec<Block>, Pages)> {
        let block = |(name, counts): (String, &Counts)| {
            let pages = counts.length / self.page_size;
            Block {
                name,
                length: counts.length,
                pages,
                zero_pages: counts.zero_pages,
                absent_pages: pages - counts.seen,
                held: held(counts),
            }
        };
        let blocks: Vec<_> = names.zip(&self.blocks).map(block).collect();
        let sum = |count: fn(&Block) -> u64| blocks.iter().map(count).sum::<u64>();
        let (total, zero) = (sum(|block| block.pages), sum(|block| block.zero_pages));
        let absent = sum(|block| block.absent_pages);
        let there = total - absent;
        let pages = Pages {
            total,
            zero,
            data: there - zero,
            absent,
            zero_share: (there > 0).then(|| zero as f64 / there as f64),
            sampled: self.sample.pages(),
            compression: self.sample.compress()?,
        };
        Ok((blocks, pages))
    }
}
