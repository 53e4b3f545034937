//! One thing for each RAM block, and the index that finds it.

use std::ops::Deref;

/// The position of a RAM block in the list of a migration's blocks. Only a [`PerBlock`] makes one,
/// so that there is no index without its block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockIndex(usize);

/// One `T` for each RAM block of a migration, in the order of the list on the wire.
///
/// All lists of one migration are made from the list of its blocks, by [`PerBlock::map`] or in its
/// order: an index that one of them made fits the others.
#[derive(Debug)]
pub struct PerBlock<T>(Box<[T]>);

impl<T> PerBlock<T> {
    /// What belongs to the block.
    ///
    /// # Panics
    /// For an index of another migration's blocks, which is no state that the engine can come to.
    #[cfg_attr(
        not(multifd_loom),
        expect(clippy::indexing_slicing, reason = "an index comes from a list of as many blocks")
    )]
    pub fn at(&self, block: BlockIndex) -> &T {
        &self.0[block.0]
    }

    /// The first block whose `T` fits.
    pub fn find(&self, fits: impl FnMut(&T) -> bool) -> Option<BlockIndex> {
        self.0.iter().position(fits).map(BlockIndex)
    }

    /// The last block for which `before` holds, where it holds for all blocks up to one and for
    /// none behind it.
    pub(super) fn last_before(&self, before: impl FnMut(&T) -> bool) -> Option<BlockIndex> {
        self.0.partition_point(before).checked_sub(1).map(BlockIndex)
    }

    /// The block behind this one; behind the last, the first.
    pub(super) fn after(&self, block: BlockIndex) -> BlockIndex {
        BlockIndex(if block.0 + 1 < self.0.len() { block.0 + 1 } else { 0 })
    }

    /// The first block. `None`: there are none.
    pub(super) fn first(&self) -> Option<BlockIndex> {
        (!self.0.is_empty()).then_some(BlockIndex(0))
    }

    /// Every block with its index.
    pub fn indexed(&self) -> impl Iterator<Item = (BlockIndex, &T)> {
        self.0.iter().enumerate().map(|(index, item)| (BlockIndex(index), item))
    }

    /// A list of the same blocks.
    pub fn map<U>(&self, make: impl FnMut(&T) -> U) -> PerBlock<U> {
        self.0.iter().map(make).collect()
    }
}

impl<T> FromIterator<T> for PerBlock<T> {
    fn from_iter<I: IntoIterator<Item = T>>(items: I) -> Self {
        Self(items.into_iter().collect())
    }
}

impl<T> Deref for PerBlock<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &self.0
    }
}

#[cfg(all(test, not(multifd_loom)))]
mod tests {
    use super::*;

    #[test]
    fn an_index_finds_the_same_block_in_every_list_of_the_blocks() {
        let names: PerBlock<&str> = ["pc.ram", "vga.vram"].into_iter().collect();
        let lengths = names.map(|name| name.len());
        let vga = names.find(|name| name.starts_with("vga")).unwrap();
        assert_eq!((*names.at(vga), *lengths.at(vga)), ("vga.vram", 8));
        assert_eq!(names.find(|name| name.is_empty()), None);
        assert!(names.indexed().all(|(block, name)| *lengths.at(block) == name.len()));
    }

    #[test]
    fn the_last_block_before_a_limit_is_found_and_none_before_the_first() {
        let first: PerBlock<usize> = [0, 10, 10, 30].into_iter().collect();
        let found = |limit: usize| first.last_before(|first| *first <= limit).map(|block| block.0);
        assert_eq!([0, 9, 10, 29, 30, 99].map(found), [0, 0, 2, 2, 3, 3].map(Some));
        assert_eq!(PerBlock::<usize>::from_iter([]).last_before(|_| true), None);
    }
}
