//! Digests of pages as they were sent, or placed, last.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use twox_hash::XxHash3_64;

use super::PAGE;
use crate::error::{Error, Phase, Result};

/// A hash of bytes that a guest wrote: it finds what was changed by accident, by no means what was
/// made to deceive. On the wire between two multifd ends (docs/wire.md §27.7): XXH3 of 64 bits,
/// seed 0.
pub fn hash(bytes: &[u8]) -> u64 {
    XxHash3_64::oneshot(bytes)
}

/// [`hash`] of a page of zeros.
pub(crate) fn zero_hash() -> u64 {
    static ZERO: OnceLock<u64> = OnceLock::new();
    *ZERO.get_or_init(|| hash(&[0; PAGE]))
}

/// For each page of a block a digest of its content, and one of all of them, which changes with
/// each: to compare the block at two ends costs no pass over its pages. 8 bytes a page, made where
/// pages are noted.
#[derive(Debug)]
pub(crate) struct PageDigests {
    pages: usize,
    parts: Box<[OnceLock<Box<[AtomicU64]>>]>,
    sum: AtomicU64,
}

/// Pages in a part of [`PageDigests`]: 64 MiB of guest, whose digests are 128 KiB.
const PART_PAGES: usize = 1 << 14;

/// No digest.
const NONE: u64 = 0;

/// Several pages of one block that are noted by one thread. The sum of all pages changes when it is
/// dropped.
pub(crate) struct Noting<'d> {
    digests: &'d PageDigests,
    change: u64,
}

impl PageDigests {
    /// No page has one.
    pub(crate) fn new(pages: usize) -> Self {
        let parts = (0..pages.div_ceil(PART_PAGES)).map(|_| OnceLock::new()).collect();
        Self { pages, parts, sum: AtomicU64::new(0) }
    }

    pub(crate) fn noting(&self) -> Noting<'_> {
        Noting { digests: self, change: 0 }
    }

    /// Whether the page was noted last with content of this hash; `None` for one that never was.
    pub(crate) fn is_as_noted(&self, page: usize, hash: u64) -> Result<Option<bool>> {
        let noted = self.at(page)?.load(Ordering::Relaxed);
        Ok((noted != NONE).then(|| noted == digest(page, hash)))
    }

    /// A digest of all pages. What notes pages must have ended, with anything that orders memory.
    pub(crate) fn of_all(&self) -> u64 {
        self.sum.load(Ordering::Relaxed)
    }

    fn at(&self, page: usize) -> Result<&AtomicU64> {
        let missing = || Error::bug(Phase::Active, format_args!("page {page} has no place for a digest"));
        let part = self.parts.get(page / PART_PAGES).filter(|_| page < self.pages).ok_or_else(missing)?;
        let part = part.get_or_init(|| (0..PART_PAGES).map(|_| AtomicU64::new(NONE)).collect());
        part.get(page % PART_PAGES).ok_or_else(missing)
    }
}

impl Noting<'_> {
    /// `hash` is that of the page's content from now on.
    pub(crate) fn note(&mut self, page: usize, hash: u64) -> Result<()> {
        let new = digest(page, hash);
        // Relaxed: the end of a round orders it before the next, and before anything that compares.
        let old = self.digests.at(page)?.swap(new, Ordering::Relaxed);
        self.change = self.change.wrapping_add(new).wrapping_sub(old);
        Ok(())
    }
}

impl Drop for Noting<'_> {
    fn drop(&mut self) {
        self.digests.sum.fetch_add(self.change, Ordering::Relaxed);
    }
}

/// A page's part in the digest of its block: the same content at another place counts differently.
/// Spec: docs/wire.md §27.8.
fn digest(page: usize, hash: u64) -> u64 {
    // The finalizer of SplitMix64.
    let mut mixed = hash ^ (page as u64).wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (mixed ^ (mixed >> 31)).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The block's digest after these pages, one after the other.
    fn of(pages: usize, noted: &[(usize, u64)]) -> u64 {
        let digests = PageDigests::new(pages);
        noted.iter().for_each(|(page, hash)| digests.noting().note(*page, *hash).unwrap());
        digests.of_all()
    }

    /// What other implementations have to come to.
    #[test]
    fn hashes_and_digests_are_those_of_the_specification() {
        assert_eq!(hash(&[]), 0x2d06_8005_38d3_94c2);
        assert_eq!(hash(&[7; PAGE]), XxHash3_64::oneshot(&[7; PAGE]));
        assert_eq!(of(8, &[(0, 0)]), 0xe220_a839_7b1d_cdaf, "SplitMix64's first number for the seed 0");
    }

    #[test]
    fn the_last_version_of_each_page_counts_whatever_came_before_and_in_which_order() {
        let expected = of(40_000, &[(1, 10), (2, 20), (39_999, 30)]);
        assert_eq!(of(40_000, &[(39_999, 30), (2, 20), (1, 10)]), expected);
        assert_eq!(of(40_000, &[(1, 99), (39_999, 1), (2, 20), (1, 10), (39_999, 30)]), expected);
        let several = PageDigests::new(40_000);
        let (mut one, mut other) = (several.noting(), several.noting());
        one.note(1, 77).unwrap();
        other.note(2, 20).unwrap();
        one.note(39_999, 30).unwrap();
        drop(one);
        other.note(1, 10).unwrap();
        drop(other);
        assert_eq!(several.of_all(), expected);
    }

    #[test]
    fn another_content_another_place_a_page_more_or_less_is_another_digest() {
        let (zero, seven) = (zero_hash(), hash(&[7; PAGE]));
        let pages = [(0, zero), (1, seven), (2, zero)];
        let others: [&[(usize, u64)]; 5] = [
            &[(0, zero), (1, zero), (2, zero)],
            &[(0, seven), (1, zero), (2, zero)],
            &[(0, zero), (1, seven)],
            &[(0, zero), (1, seven), (2, zero), (3, zero)],
            &[],
        ];
        for other in others {
            assert_ne!(of(8, other), of(8, &pages), "{other:?}");
        }
    }

    #[test]
    fn a_page_that_the_block_does_not_have_is_a_bug_and_what_was_not_noted_is_nothing() {
        let digests = PageDigests::new(5);
        assert!(digests.noting().note(5, 0).is_err() && digests.is_as_noted(5, 0).is_err());
        assert_eq!(digests.is_as_noted(4, 0).unwrap(), None);
        digests.noting().note(4, 0).unwrap();
        assert_eq!(digests.is_as_noted(4, 0).unwrap(), Some(true));
        assert_eq!(digests.is_as_noted(4, 1).unwrap(), Some(false));
    }
}
