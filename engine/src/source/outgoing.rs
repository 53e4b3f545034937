//! The guest RAM that leaves: blocks, their dirty bitmaps, and how their zero pages go.

use std::ops::Deref;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock, RwLockReadGuard};

use multifd_wire::{BlockEntry, BlockName, Configuration};
use serde::Serialize;

use crate::error::{Error, ErrorKind, Phase, Result};
use crate::guest::{
    Absent, Attached, BlockChanges, DirtyBitmap, Found, Mappings, PAGE, PAGES_PER_WORD, PageDigests,
    PageTable, Parts, READING, RamBlock, RamChanges,
};
use crate::source::pagers::{self, PagerWatch};
use crate::work::{BlockIndex, HostPages, PerBlock, Round};

/// How pages that are all zero go out (QEMU's zero-page-detection).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum ZeroPages {
    /// As offsets in the packets of the parallel channels: `multifd`. Receivers from QEMU 9.0 on.
    /// They do not clear memory that they take for fresh, so firmware blocks still go as in
    /// `Legacy`.
    Multifd,
    /// As records on the main channel, which always clear: `legacy`.
    Legacy,
    /// As content, like any other page: `none`.
    None,
}

impl ZeroPages {
    /// What QEMU itself does for the machine type: `Legacy` before 9.0, `Multifd` from then on.
    pub fn for_machine(configuration: &Configuration) -> Self {
        match configuration.machine_version() {
            Some(version) if version < (9, 0) => Self::Legacy,
            _ => Self::Multifd,
        }
    }

    fn route(self, block: &RamBlock, parallel: bool) -> ZeroRoute {
        match self {
            Self::None => ZeroRoute::Content,
            Self::Multifd if parallel && !block.is_firmware() => ZeroRoute::Packet,
            Self::Multifd | Self::Legacy => ZeroRoute::Main,
        }
    }
}

/// Where a block's zero pages go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ZeroRoute {
    Main,
    Packet,
    Content,
}

/// What the embedder says of the memory, beside its blocks.
#[derive(Debug, Default)]
pub(super) struct RamNotes {
    /// Blocks whose pages a userfaultfd's handler fills when they are read.
    pub(super) paged: Vec<BlockName>,
    pub(super) changes: Option<RamChanges>,
    /// Digests are kept of what is sent, and all of RAM is compared with them.
    pub(super) audit: bool,
    /// Nothing runs while the migration does.
    pub(super) guest_paused: bool,
}

/// One block on its way.
#[derive(Debug)]
pub(super) struct OutgoingBlock {
    pub(super) block: RamBlock,
    /// Pages that may hold data; all others were zero when the migration began. `None`: look at
    /// every page.
    data: Option<DirtyBitmap>,
    /// What its pages are that the page table does not have.
    pub(super) absent: Absent,
    pub(super) zero_route: ZeroRoute,
    /// Pages in a page of the destination's kernel.
    pub(super) per_host: usize,
    /// Pages of the blocks before this one.
    first_key: u64,
    /// What the VMM does to it meanwhile.
    changes: Option<Arc<BlockChanges>>,
    /// Of what was sent last of each page, if they are kept.
    digests: OnceLock<PageDigests>,
}

/// A block whose pages are being read: none of them is unplugged meanwhile.
pub(super) struct HeldBlock<'r> {
    block: &'r OutgoingBlock,
    parts: Option<RwLockReadGuard<'r, Parts>>,
}

/// All blocks, in the order of the list on the wire.
#[derive(Debug)]
pub(super) struct OutgoingRam {
    pub(super) blocks: PerBlock<OutgoingBlock>,
    /// The dirty logs write here.
    pub(super) dirty: PerBlock<Arc<DirtyBitmap>>,
    /// Pages that were claimed since the last round that is known to have arrived, if a link that
    /// breaks is to be replaced.
    claimed: Option<PerBlock<Arc<DirtyBitmap>>>,
    /// The same in host pages, for a post-copy.
    pub(super) host_pages: HostPages,
    /// The list says how large huge pages are.
    lists_host_pages: bool,
    /// The first pass is under way: holes that were found at its begin can be taken for zero. A
    /// page that was written since is in a dirty log, and goes out again.
    holes_hold: AtomicBool,
    page_table: PageTable,
    pagers: PagerWatch,
    /// Nothing has run since holes were looked for, or registers a userfaultfd.
    guest_paused: bool,
    attached: Option<Attached>,
    /// All of it is compared with what was sent.
    pub(super) audits: bool,
}

impl OutgoingRam {
    /// Every page is dirty at first. `parallel`: pages go over channels, so that zero pages have a
    /// choice of ways.
    ///
    /// The dirty logs must have been started: what is found here may change from now on.
    pub(super) fn new(
        ram: Vec<RamBlock>,
        notes: &RamNotes,
        zero_pages: ZeroPages,
        parallel: bool,
    ) -> Result<Self> {
        if ram.is_empty() {
            return Err(Error::new(ErrorKind::ApiMisuse, Phase::Setup, "no RAM blocks"));
        }
        let attached = notes.changes.as_ref().map(|changes| changes.attach(&ram)).transpose()?;
        let pagers = PagerWatch::begin();
        let mappings = pagers.mappings()?;
        let page_table = PageTable::of_this_process();
        let mut first_key = 0;
        let mut blocks = Vec::with_capacity(ram.len());
        for block in ram {
            let zero_route = zero_pages.route(&block, parallel);
            let changes = attached.as_ref().and_then(|attached| attached.of(&block));
            let digests = OnceLock::new();
            let paged = notes.paged.contains(block.name());
            let (data, absent) =
                OutgoingBlock::what_is_absent(&block, &page_table, mappings.as_ref(), paged)?;
            let per_host = (block.host_page_size() / PAGE).max(1);
            let outgoing =
                OutgoingBlock { block, data, absent, zero_route, per_host, first_key, changes, digests };
            first_key += outgoing.block.pages() as u64;
            blocks.push(outgoing);
        }
        let blocks: PerBlock<_> = blocks.into_iter().collect();
        let dirty = blocks.map(|outgoing| {
            let dirty = DirtyBitmap::new(outgoing.block.pages());
            dirty.set_range(0, dirty.pages());
            Arc::new(dirty)
        });
        let host_pages = HostPages::new(&dirty, &blocks.map(|outgoing| outgoing.per_host));
        let ram = Self {
            blocks,
            dirty,
            claimed: None,
            host_pages,
            lists_host_pages: false,
            holes_hold: AtomicBool::new(true),
            page_table,
            pagers,
            guest_paused: notes.guest_paused,
            attached,
            audits: notes.audit,
        };
        if ram.audits {
            ram.keep_digests();
        }
        Ok(ram)
    }

    /// From now on a digest is kept of what is sent of each page. No page has been sent.
    pub(super) fn keep_digests(&self) {
        self.blocks.iter().for_each(|block| _ = block.digests.set(PageDigests::new(block.block.pages())));
    }

    /// Sees to it that a post-copy can follow.
    pub(super) fn for_postcopy(mut self) -> Result<Self> {
        for OutgoingBlock { block, per_host, .. } in self.blocks.iter() {
            let size = block.host_page_size();
            let whole = block.pages().is_multiple_of(*per_host);
            if size < PAGE || !size.is_power_of_two() || !whole {
                let detail = format!(
                    "RAM block {} of {:#x} bytes, in host pages of {size:#x} bytes: expected a power of two, at least {PAGE:#x}, \
                     and whole host pages",
                    block.name(),
                    block.used_len()
                );
                return Err(Error::new(ErrorKind::ApiMisuse, Phase::Setup, detail));
            }
        }
        self.lists_host_pages = true;
        Ok(self)
    }

    /// Notes what is on its way from now on.
    pub(super) fn noting_claims(mut self) -> Self {
        self.claimed = Some(self.dirty.map(|dirty| Arc::new(DirtyBitmap::new(dirty.pages()))));
        self
    }

    /// Everything that was claimed has arrived.
    pub(super) fn note_arrival(&self) {
        self.claimed.iter().flat_map(|claimed| claimed.iter()).for_each(|claimed| claimed.clear());
    }

    /// The link broke: what was on its way is dirty again, but for what has arrived. `arrived`: of
    /// a block, a word of 64 pages for each word. Gives the number of pages that had arrived.
    pub(super) fn take_back(&self, arrived: impl Fn(BlockIndex, usize) -> u64) -> usize {
        let Some(claimed) = &self.claimed else { return 0 };
        let mut kept = 0;
        for (block, claimed) in claimed.indexed() {
            let dirty = self.dirty.at(block);
            for word in 0..claimed.words() {
                let (claimed, arrived) = (claimed.take_word(word), arrived(block, word));
                dirty.set_bits(word * PAGES_PER_WORD, claimed & !arrived);
                kept += (claimed & arrived).count_ones() as usize;
            }
        }
        kept
    }

    /// Nothing is at the destination.
    pub(super) fn begin_anew(&self) {
        self.note_arrival();
        self.dirty.iter().for_each(|dirty| dirty.set_range(0, dirty.pages()));
    }

    /// The sizes of host pages, as ADVISE has them.
    pub(super) fn host_page_sizes(&self) -> u64 {
        self.blocks.iter().fold(0, |sizes, block| sizes | (block.per_host * PAGE) as u64)
    }

    /// The block with this name.
    pub(super) fn find(&self, name: &str) -> Option<BlockIndex> {
        self.blocks.find(|outgoing| outgoing.block.name().as_str() == name)
    }

    /// The block, whose pages are about to be read.
    pub(super) fn hold(&self, block: BlockIndex) -> HeldBlock<'_> {
        let block = self.blocks.at(block);
        HeldBlock { block, parts: block.changes.as_ref().map(|changes| changes.read()) }
    }

    /// Pages that have changed without a write are dirty.
    ///
    /// # Errors
    /// A block has another length than was announced, or there is one more.
    pub(super) fn take_changes(&self) -> Result<()> {
        self.attached.as_ref().map_or(Ok(()), Attached::check)?;
        self.blocks.iter().zip(self.dirty.iter()).try_for_each(|(outgoing, dirty)| {
            outgoing.changes.as_ref().map_or(Ok(()), |changes| changes.sync(&outgoing.block, dirty))
        })
    }

    /// No pass follows that would send what was written since holes were looked for: they are not
    /// believed any more, even if this pass is the first.
    pub(super) fn begin_last_pass(&self) {
        if !self.guest_paused {
            self.forget_holes();
        }
    }

    /// The first pass is over.
    pub(super) fn forget_holes(&self) {
        self.holes_hold.store(false, Ordering::Relaxed);
    }

    /// Behind a pass over RAM: that what went as zero because it is not there was no page that is
    /// filled on demand.
    pub(super) fn check_holes(&self) -> Result<()> {
        if self.guest_paused { Ok(()) } else { self.pagers.check(self.blocks.iter()) }
    }

    /// Finds out which of `pages` are zero without being read, and that the others can be read.
    ///
    /// A page that is not there now may be by the time it is sent: then it was written since its
    /// dirty bit was taken, is in a dirty log, and goes out again.
    pub(super) fn look(&self, block: &HeldBlock<'_>, pages: &[usize], found: &mut Found) -> Result<()> {
        let unplugged = |page: &usize| block.is_unplugged(*page);
        if !pages.iter().any(unplugged) {
            return self.look_at_plugged(block, pages, found);
        }
        let plugged: Vec<usize> = pages.iter().copied().filter(|page| !unplugged(page)).collect();
        self.look_at_plugged(block, &plugged, found)?;
        found.insert_zeros(pages.iter().map(unplugged));
        Ok(())
    }

    fn look_at_plugged(&self, block: &OutgoingBlock, pages: &[usize], found: &mut Found) -> Result<()> {
        let first_pass = self.holes_hold.load(Ordering::Relaxed);
        let known = |page: &usize| first_pass && block.data.as_ref().is_some_and(|data| !data.test(*page));
        if pages.iter().all(known) {
            found.all_zero(pages.len());
            return Ok(());
        }
        self.page_table
            .look(&block.block, block.absent, pages, found)
            .map_err(|bad| block.block.fault(READING, bad.page..bad.page + 1, bad.cause))?;
        let meanwhile = pages.iter().zip(found.zeros()).any(|(page, zero)| zero && !known(page));
        if meanwhile && (first_pass || block.changes.is_none()) {
            self.pagers.note_holes();
        }
        Ok(())
    }

    pub(super) fn total_bytes(&self) -> u64 {
        self.blocks.iter().map(|block| block.block.used_len()).sum()
    }

    pub(super) fn dirty_pages(&self) -> usize {
        self.dirty.iter().map(|dirty| dirty.count()).sum()
    }

    /// A pass over what is dirty now, for `workers` workers.
    pub(super) fn round(&self, workers: usize) -> Round {
        let round = Round::new(&self.dirty, workers);
        match &self.claimed {
            Some(claimed) => round.noting(claimed),
            None => round,
        }
    }

    /// The list of blocks as START carries it.
    pub(super) fn list(&self) -> impl Iterator<Item = BlockEntry> {
        self.blocks.iter().map(|outgoing| BlockEntry {
            name: outgoing.block.name().clone(),
            used_len: outgoing.block.used_len(),
            page_size: (self.lists_host_pages && outgoing.per_host > 1)
                .then_some((outgoing.per_host * PAGE) as u64),
            guest_address: None,
            mapped_ram: None,
        })
    }
}

impl OutgoingBlock {
    /// Pages that may hold data, and what those are that the page table does not have.
    fn what_is_absent(
        block: &RamBlock,
        page_table: &PageTable,
        mappings: Option<&Mappings>,
        paged: bool,
    ) -> Result<(Option<DirtyBitmap>, Absent)> {
        if paged {
            // What is not there has to be read, which makes its handler fetch it.
            return Ok((None, Absent::Unknown));
        }
        mappings.map_or(Ok(()), |mappings| pagers::refuse(mappings, block, Phase::Setup))?;
        let absent = mappings.map_or(Absent::Unknown, |mappings| mappings.absent(block));
        let walked = page_table.data_pages(block, absent).transpose();
        let data = walked.or_else(|| block.data_pages().transpose()).transpose().map_err(|error| {
            let detail = format!("looking for holes in RAM block {}", block.name());
            Error::new(ErrorKind::GuestMemory, Phase::Setup, detail).because(error)
        })?;
        Ok((data, absent))
    }

    /// Of what was sent last of each page, if they are kept.
    pub(super) fn digests(&self) -> Option<&PageDigests> {
        self.digests.get()
    }

    /// Says which of these pages, in ascending order, the kernel could not read.
    pub(super) fn kernel_fault(
        &self,
        pages: impl IntoIterator<Item = usize>,
        cause: std::io::Error,
    ) -> Error {
        let mut pages = pages.into_iter().peekable();
        let first = pages.peek().copied().unwrap_or(0);
        let bad = pages.find(|page| !self.block.can_be_read(*page)).unwrap_or(first);
        self.block.fault(READING, bad..bad + 1, cause)
    }

    /// The page's number over all blocks.
    pub(super) fn key(&self, page: usize) -> u64 {
        self.first_key + page as u64
    }
}

impl HeldBlock<'_> {
    fn is_unplugged(&self, page: usize) -> bool {
        self.parts.as_ref().is_some_and(|parts| parts.is_unplugged(page))
    }
}

impl Deref for HeldBlock<'_> {
    type Target = OutgoingBlock;

    fn deref(&self) -> &OutgoingBlock {
        self.block
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::HostMemory;

    /// The kernel says that an address of a whole packet was bad, not which.
    #[test]
    fn the_page_that_the_kernel_could_not_read_is_named() {
        let block = RamBlock::new("ram".try_into().unwrap(), HostMemory::anonymous(8 * PAGE).unwrap());
        block.memory().slice(0, 8 * PAGE).unwrap().copy_from(&[1_u8; 8 * PAGE]);
        let ram = OutgoingRam::new(vec![block.clone()], &RamNotes::default(), ZeroPages::None, true).unwrap();
        let bad = block.run(5, 1).unwrap();
        #[expect(unsafe_code, reason = "protection has no safe wrapper")]
        // SAFETY: the range is mapped, and nothing loads from it afterwards.
        let done = unsafe { libc::mprotect(bad.ptr_guard_mut().as_ptr().cast(), bad.len(), libc::PROT_NONE) };
        assert_eq!(done, 0);
        let cause = std::io::Error::from_raw_os_error(libc::EFAULT);
        let error = ram.blocks[0].kernel_fault([1, 2, 5, 6], cause);
        assert_eq!(error.kind(), ErrorKind::GuestMemory);
        assert!(error.to_string().contains("page 5 of RAM block ram"), "{error}");
    }
}
