//! The packet that a send worker is making: which pages go how.

use multifd_codecs::zero;

use super::outgoing::{OutgoingBlock, OutgoingRam, ZeroRoute};
use super::page_cache::{Lookup, Moment, PageCache};
use crate::dialect;
use crate::error::{Error, ErrorKind, Phase, Result};
use crate::ram::PAGE;

/// Buffers are kept from packet to packet. 512 KiB of pages at most.
#[derive(Default)]
pub(super) struct Packet {
    /// Offsets of the pages that go as they are.
    pub(super) normal: Vec<u64>,
    /// Offsets of zero pages.
    pub(super) zero: Vec<u64>,
    /// Private copies of the `normal` pages, back to back. Empty: they go straight from guest memory.
    pub(super) pages: Vec<u8>,
    /// Offsets of the pages that go as differences.
    pub(super) delta: Vec<u64>,
    /// Their payload.
    pub(super) delta_payload: Vec<u8>,
    one_delta: Vec<u8>,
}

impl Packet {
    pub(super) fn clear(&mut self) {
        self.normal.clear();
        self.zero.clear();
        self.pages.clear();
        self.delta.clear();
        self.delta_payload.clear();
    }

    /// Tells zero pages from others; the others stay where they are.
    pub(super) fn sort_out(&mut self, ram: &OutgoingRam, block: &OutgoingBlock, pages: &[usize]) {
        for page in pages {
            let list = if ram.goes_as_zero(block, *page) { &mut self.zero } else { &mut self.normal };
            list.push((page * PAGE) as u64);
        }
    }

    /// Copies pages to private memory, keeps those that are not zero, and turns those into differences that the cache knows.
    pub(super) fn copy_in(
        &mut self,
        ram: &OutgoingRam,
        block: &OutgoingBlock,
        pages: &[usize],
        cache: Option<(&PageCache, Moment)>,
    ) -> Result<()> {
        let seek_zero = block.zero_route != ZeroRoute::Content;
        for page in pages {
            let offset = (page * PAGE) as u64;
            if seek_zero && ram.is_hole(block, *page) {
                self.zero.push(offset);
                continue;
            }
            let start = self.pages.len();
            self.pages.resize(start + PAGE, 0);
            let copy = self.pages.last_chunk_mut::<PAGE>();
            let copy = copy.ok_or_else(|| Error::bug(Phase::Active, "no room for a page in its packet"))?;
            if !block.block.read_page(*page, copy) {
                return Err(outside());
            }
            if seek_zero && zero::is_zero(copy) {
                if let Some((cache, _)) = cache {
                    cache.zeroed(block.key(*page));
                }
                self.pages.truncate(start);
                self.zero.push(offset);
                continue;
            }
            self.one_delta.clear();
            let lookup = cache.map_or(Lookup::Plain, |(cache, moment)| {
                cache.lookup(block.key(*page), copy, moment, &mut self.one_delta)
            });
            match lookup {
                Lookup::Plain => self.normal.push(offset),
                Lookup::Delta => {
                    self.pages.truncate(start);
                    self.delta.push(offset);
                    dialect::put_delta(&mut self.delta_payload, &self.one_delta)?;
                }
                Lookup::Unchanged => self.pages.truncate(start),
            }
        }
        Ok(())
    }
}

pub(super) fn outside() -> Error {
    Error::new(ErrorKind::GuestMemory, Phase::Active, "a page outside of its block was claimed")
}
