//! The packet that a send worker is making: which pages go how.

use std::io;

use multifd_codecs::{looks_random, zero};
use vm_memory::VolatileSlice;

use super::outgoing::{HeldBlock, OutgoingBlock, OutgoingRam, ZeroRoute};
use super::page_cache::{Lookup, PageCache};
use super::rounds::RoundContext;
use crate::error::{Error, ErrorKind, Phase, Result};
use crate::guest::{Found, PAGE, PageDigests, hash, zero_hash};
use crate::stream::dialect;

/// What becomes of pages that are copied.
#[derive(Clone, Copy, Default)]
pub(super) struct Treatment<'c> {
    /// Those that it knows go as differences.
    pub(super) cache: Option<(&'c PageCache, RoundContext)>,
    /// Hashes of those that go with their content are wanted.
    pub(super) hashed: bool,
    /// Those that no codec makes shorter go without one.
    pub(super) apart: bool,
}

/// Pages that no codec makes shorter, in a packet of their own.
#[derive(Default)]
pub(super) struct RawPages {
    pub(super) offsets: Vec<u64>,
    /// Private copies, back to back.
    pub(super) pages: Vec<u8>,
    /// Hashes of these, if they were asked for.
    pub(super) hashes: Vec<u64>,
}

/// Fewer pages than these do not pay for a header of their own: they go with the others.
const APART: usize = 8;

/// Buffers are kept from packet to packet. 512 KiB of pages at most.
#[derive(Default)]
pub(super) struct Packet {
    /// Offsets of the pages that go as they are.
    pub(super) normal: Vec<u64>,
    /// Offsets of zero pages.
    pub(super) zero: Vec<u64>,
    /// Private copies of the `normal` pages, back to back. Empty: they go straight from guest
    /// memory.
    pub(super) pages: Vec<u8>,
    /// Hashes of these copies, if they were asked for.
    pub(super) hashes: Vec<u64>,
    /// Pages that go apart from the others, without a codec.
    pub(super) raw: RawPages,
    /// Offsets of the pages that go as differences.
    pub(super) delta: Vec<u64>,
    /// Their payload.
    pub(super) delta_payload: Vec<u8>,
    one_delta: Vec<u8>,
    found: Found,
    /// Whether a `normal` page is known to be zero, when all pages go as content: it must not be
    /// read.
    blank: Vec<bool>,
}

static ZEROS: [u8; PAGE] = [0; PAGE];

impl Packet {
    pub(super) fn clear(&mut self) {
        self.normal.clear();
        self.blank.clear();
        self.zero.clear();
        self.pages.clear();
        self.hashes.clear();
        self.raw.offsets.clear();
        self.raw.pages.clear();
        self.raw.hashes.clear();
        self.delta.clear();
        self.delta_payload.clear();
    }

    /// Tells zero pages from others; the others stay where they are, unless what was sent has to be
    /// known.
    pub(super) fn sort_out(
        &mut self,
        ram: &OutgoingRam,
        block: &HeldBlock<'_>,
        pages: &[usize],
    ) -> Result<()> {
        if block.digests().is_some() {
            return self.copy_in(ram, block, pages, Treatment::default());
        }
        ram.look(block, pages, &mut self.found)?;
        let seek_zero = block.zero_route != ZeroRoute::Content;
        for (page, absent) in pages.iter().zip(self.found.zeros()) {
            let offset = (page * PAGE) as u64;
            if seek_zero && (absent || block.block.is_zero(*page)) {
                self.zero.push(offset);
            } else {
                self.normal.push(offset);
                self.blank.push(absent);
            }
        }
        Ok(())
    }

    /// The content of each `normal` page, in order, where it lies.
    pub(super) fn contents<'a>(
        &'a self,
        block: &'a OutgoingBlock,
    ) -> impl Iterator<Item = Result<Content<'a>>> {
        let mut copies = self.pages.chunks_exact(PAGE);
        self.normal.iter().enumerate().map(move |(index, offset)| {
            if let Some(copy) = copies.next() {
                return Ok(Content::Private(copy));
            }
            if self.blank.get(index) == Some(&true) {
                return Ok(Content::Private(&ZEROS));
            }
            let page = block.block.page_at(*offset).and_then(|page| block.block.run(page, 1));
            page.map(Content::Guest).ok_or_else(outside)
        })
    }

    /// Says what went wrong when `normal` pages were sent from where they lie, if it was guest
    /// memory.
    pub(super) fn fault(
        &self,
        block: &OutgoingBlock,
        error: io::Error,
        otherwise: impl FnOnce(io::Error) -> Error,
    ) -> Error {
        match error.raw_os_error() {
            Some(libc::EFAULT) => {
                block.kernel_fault(self.normal.iter().filter_map(|at| block.block.page_at(*at)), error)
            }
            _ => otherwise(error),
        }
    }

    /// Copies pages to private memory, keeps those that are not zero, and treats them as it is
    /// wanted.
    pub(super) fn copy_in(
        &mut self,
        ram: &OutgoingRam,
        block: &HeldBlock<'_>,
        pages: &[usize],
        Treatment { cache, hashed, apart }: Treatment<'_>,
    ) -> Result<()> {
        let seek_zero = block.zero_route != ZeroRoute::Content;
        let mut noting = block.digests().map(PageDigests::noting);
        ram.look(block, pages, &mut self.found)?;
        for (page, absent) in pages.iter().zip(self.found.zeros()) {
            let offset = (page * PAGE) as u64;
            let start = self.pages.len();
            self.pages.resize(start + PAGE, 0);
            let copy = self.pages.last_chunk_mut::<PAGE>();
            let copy = copy.ok_or_else(|| Error::bug(Phase::Active, "no room for a page in its packet"))?;
            if !absent && !block.block.load_page(*page, copy) {
                return Err(outside());
            }
            if seek_zero && (absent || zero::is_zero(copy)) {
                noting.as_mut().map_or(Ok(()), |noting| noting.note(*page, zero_hash()))?;
                if let Some((cache, _)) = cache {
                    cache.zeroed(block.key(*page));
                }
                self.pages.truncate(start);
                self.zero.push(offset);
                continue;
            }
            let hash = (hashed || noting.is_some()).then(|| hash(copy));
            if let (Some(noting), Some(hash)) = (&mut noting, hash) {
                noting.note(*page, hash)?;
            }
            self.one_delta.clear();
            let lookup = cache.map_or(Lookup::Plain, |(cache, context)| {
                cache.lookup(block.key(*page), copy, context, &mut self.one_delta)
            });
            match lookup {
                Lookup::Plain if apart && looks_random(copy) => {
                    self.raw.offsets.push(offset);
                    self.raw.pages.extend_from_slice(copy);
                    self.raw.hashes.extend(hash);
                    self.pages.truncate(start);
                }
                Lookup::Plain => {
                    self.normal.push(offset);
                    self.hashes.extend(hash);
                }
                Lookup::Delta => {
                    self.pages.truncate(start);
                    self.delta.push(offset);
                    dialect::put_delta(&mut self.delta_payload, &self.one_delta)?;
                }
                Lookup::Unchanged => self.pages.truncate(start),
            }
        }
        if self.raw.offsets.len() < APART && !self.normal.is_empty() {
            self.normal.append(&mut self.raw.offsets);
            self.pages.append(&mut self.raw.pages);
            self.hashes.append(&mut self.raw.hashes);
        }
        Ok(())
    }
}

/// Where the bytes of a page are.
pub(super) enum Content<'a> {
    Private(&'a [u8]),
    Guest(VolatileSlice<'a>),
}

fn outside() -> Error {
    Error::new(ErrorKind::GuestMemory, Phase::Active, "a page outside of its block was claimed")
}
