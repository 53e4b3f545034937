//! The guest RAM that leaves: blocks, their dirty bitmaps, and how their zero pages go.

use std::sync::Arc;

use multifd_wire::{BlockEntry, Configuration};

use crate::error::{Error, ErrorKind, Phase, Result};
use crate::ram::{DirtyBitmap, RamBlock, Round, data_pages};

/// How pages that are all zero go out (QEMU's zero-page-detection).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ZeroPages {
    /// As offsets in the packets of the parallel channels: `multifd`. Receivers from QEMU 9.0 on. They do not clear memory
    /// that they take for fresh, so firmware blocks still go as in `Legacy`.
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
}

/// Where a block's zero pages go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ZeroRoute {
    Main,
    Packet,
    Content,
}

/// One block on its way.
#[derive(Debug)]
pub(super) struct OutgoingBlock {
    pub(super) block: RamBlock,
    dirty: Arc<DirtyBitmap>,
    /// Pages that may hold data; all others are known to be zero without a look. `None`: look at every page.
    data: Option<DirtyBitmap>,
    pub(super) zero_route: ZeroRoute,
}

/// All blocks, in the order of the list on the wire.
#[derive(Debug)]
pub(super) struct OutgoingRam {
    pub(super) blocks: Vec<OutgoingBlock>,
}

impl OutgoingRam {
    /// Every page is dirty at first. `parallel`: pages go over channels, so that zero pages have a choice of ways.
    pub(super) fn new(ram: Vec<RamBlock>, zero_pages: ZeroPages, parallel: bool) -> Result<Self> {
        if ram.iter().all(|block| block.pages() == 0) {
            return Err(Error::new(
                ErrorKind::ApiMisuse,
                Phase::Setup,
                "no RAM blocks with at least one page",
            ));
        }
        let blocks = ram.into_iter().map(|block| {
            let dirty = Arc::new(DirtyBitmap::new(block.pages()));
            dirty.set_range(0, block.pages());
            let data = data_pages(&block).map_err(|error| {
                let detail = format!("looking for holes in RAM block {}", block.name());
                Error::new(ErrorKind::GuestMemory, Phase::Setup, detail).because(error)
            })?;
            let zero_route = match zero_pages {
                ZeroPages::None => ZeroRoute::Content,
                ZeroPages::Multifd if parallel && !block.is_firmware() => ZeroRoute::Packet,
                ZeroPages::Multifd | ZeroPages::Legacy => ZeroRoute::Main,
            };
            Ok(OutgoingBlock { block, dirty, data, zero_route })
        });
        Ok(Self { blocks: blocks.collect::<Result<_>>()? })
    }

    pub(super) fn total_bytes(&self) -> u64 {
        self.blocks.iter().map(|block| block.block.used_len()).sum()
    }

    pub(super) fn dirty_pages(&self) -> usize {
        self.blocks.iter().map(|block| block.dirty.count()).sum()
    }

    /// A pass over what is dirty now, for `workers` workers.
    pub(super) fn round(&self, workers: usize) -> Round {
        let bitmaps: Vec<_> = self.blocks.iter().map(|block| Arc::clone(&block.dirty)).collect();
        Round::new(&bitmaps, workers)
    }

    /// The list of blocks as START carries it.
    pub(super) fn list(&self) -> impl Iterator<Item = BlockEntry> {
        self.blocks.iter().map(|outgoing| BlockEntry {
            name: outgoing.block.name().clone(),
            used_len: outgoing.block.used_len(),
            page_size: None,
            guest_address: None,
            mapped_ram: None,
        })
    }
}

impl OutgoingBlock {
    /// Known to be zero without reading it: it lies in a hole of the file behind it.
    pub(super) fn is_hole(&self, page: usize) -> bool {
        self.data.as_ref().is_some_and(|data| !data.test(page))
    }

    /// True if the page goes as a zero page.
    pub(super) fn goes_as_zero(&self, page: usize) -> bool {
        self.zero_route != ZeroRoute::Content && (self.is_hole(page) || self.block.is_zero(page))
    }
}
