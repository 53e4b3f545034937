//! A block that a pager fills, and its huge pages in the making.

use std::ops::Range;
use std::sync::Mutex;

use crate::error::{Error, Phase, Result};
use crate::guest::{DirtyBitmap, Mappings, PAGE, RamBlock};
use crate::run::stop::lock;

/// What a pager knows of a block.
pub(crate) struct PagedBlock {
    pub(super) address: u64,
    pub(super) len: u64,
    /// Bytes.
    pub(super) host_page: usize,
    /// The kernel may make huge pages of it again.
    pub(super) may_be_huge: bool,
    /// Slices that it is cut into.
    slices: usize,
    /// Host pages that have been asked for.
    pub(super) requested: DirtyBitmap,
    /// Host pages of which a part has come.
    pub(super) gathered: Mutex<Vec<Gathered>>,
}

/// A huge page in the making.
pub(super) struct Gathered {
    pub(super) host: usize,
    pub(super) content: Vec<u8>,
    here: Vec<bool>,
    pub(super) zero: bool,
}

/// Huge pages in the making: a source sends one at a time on each channel, of which it has 255 and
/// those for urgent pages.
const MAX_GATHERED: usize = 255 + 9;

impl PagedBlock {
    /// What the block is to a pager with that many slices; an error says why it can be none.
    pub(super) fn of(block: &RamBlock, mappings: &Mappings, slices: usize) -> Result<Self, String> {
        let paging = mappings.paging(block)?;
        let pages = block.pages() * PAGE;
        if !pages.is_multiple_of(paging.host_page) {
            return Err(format!("its {pages} bytes are no whole number of pages of {}", paging.host_page));
        }
        Ok(Self {
            address: block.memory().address(),
            len: block.used_len(),
            host_page: paging.host_page,
            may_be_huge: paging.may_be_huge,
            slices: slices.max(1),
            requested: DirtyBitmap::new(pages / paging.host_page),
            gathered: Mutex::default(),
        })
    }

    /// The host page has come: no part of another copy is kept.
    pub(super) fn forget(&self, host: usize) {
        lock(&self.gathered).retain(|gathered| gathered.host != host);
    }

    /// Target pages in a host page.
    pub(super) fn per(&self) -> usize {
        self.host_page / PAGE
    }

    pub(super) fn at(&self, host: usize) -> u64 {
        self.address + (host * self.host_page) as u64
    }

    /// The slice that this host page is in.
    pub(super) fn slice_of(&self, host: usize) -> usize {
        host * self.slices / self.requested.pages().max(1)
    }

    /// The host pages of a slice, of which a small block may have none.
    pub(super) fn part(&self, slice: usize) -> Range<usize> {
        let first = |slice: usize| (slice * self.requested.pages()).div_ceil(self.slices);
        first(slice)..first(slice + 1)
    }

    /// The address and length of a slice's part.
    pub(super) fn part_at(&self, slice: usize) -> (u64, u64) {
        let part = self.part(slice);
        (self.at(part.start), (part.len() * self.host_page) as u64)
    }

    /// Adds a target page; the host page, if that makes it whole.
    pub(super) fn gather(&self, page: usize, content: Option<&[u8]>) -> Result<Option<Gathered>> {
        let (host, index) = (page / self.per(), page % self.per());
        let mut all = lock(&self.gathered);
        let at = match all.iter().position(|gathered| gathered.host == host) {
            Some(at) => at,
            None if all.len() >= MAX_GATHERED => {
                let detail = format!("parts of more than {MAX_GATHERED} huge pages, expected whole ones");
                return Err(Error::misbehaved(Phase::Active, detail));
            }
            None => {
                let (content, here) = (vec![0; self.host_page], vec![false; self.per()]);
                all.push(Gathered { host, content, here, zero: true });
                all.len() - 1
            }
        };
        let none = || Error::bug(Phase::Active, "a huge page in the making is gone");
        let gathered = all.get_mut(at).ok_or_else(none)?;
        let place = gathered.content.get_mut(index * PAGE..(index + 1) * PAGE).ok_or_else(none)?;
        match content {
            Some(content) => place.copy_from_slice(content),
            None => place.fill(0),
        }
        gathered.zero &= content.is_none();
        *gathered.here.get_mut(index).ok_or_else(none)? = true;
        let whole = gathered.here.iter().all(|here| *here);
        Ok(whole.then(|| all.swap_remove(at)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_page_is_in_the_slice_whose_part_it_is() {
        for (hosts, slices) in [(1, 1), (1, 4), (3, 4), (64, 4), (1000, 16), (1001, 7)] {
            let paged = PagedBlock {
                address: 1 << 20,
                len: (hosts * PAGE) as u64,
                host_page: PAGE,
                may_be_huge: false,
                slices,
                requested: DirtyBitmap::new(hosts),
                gathered: Mutex::default(),
            };
            let parts: Vec<_> = (0..slices).flat_map(|slice| paged.part(slice)).collect();
            assert!(parts.into_iter().eq(0..hosts), "{hosts} {slices}");
            for slice in 0..slices {
                assert!(paged.part(slice).all(|host| paged.slice_of(host) == slice), "{hosts} {slices}");
            }
        }
    }
}
