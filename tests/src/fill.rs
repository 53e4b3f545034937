//! Guest RAM that looks like guest RAM.

use std::{fs::File, os::unix::fs::FileExt as _, path::Path};

use crate::{During, Outcome};

const PAGE: usize = 4096;

/// Memory of an ordinary machine, the same for the same seed: of 16 pages 6 are zero, 4 text, 3
/// repeat a short pattern and 3 are random, in runs of up to 8 pages of a kind.
#[derive(Clone, Copy, Debug)]
pub struct Fill {
    seed: u64,
}

/// What is in a page.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Kind {
    /// The same few bytes again and again, another pattern in each page.
    Pattern,
    /// Nothing compresses it.
    Random,
    /// Words: zlib makes it about a third.
    Text,
    /// Nothing.
    Zero,
}

impl Fill {
    /// Where the BIOS and the boot sector end and the filled part begins.
    pub const START: u64 = 1 << 20;

    /// Memory for this seed.
    pub fn new(seed: u64) -> Self {
        Self { seed }
    }

    /// Fills the RAM file at `path` from 1 MiB to its end, and makes it `len` bytes long. For a
    /// guest that has not started yet, or one that is stopped and not migrating: QEMU does not see
    /// that these pages change.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write(&self, path: &Path, len: u64) -> Outcome {
        let file = File::options().create(true).truncate(false).write(true).open(path);
        let file = file.during(path.display())?;
        file.set_len(len)?;
        let mut page = Vec::with_capacity(PAGE);
        for index in Self::START / PAGE as u64..len / PAGE as u64 {
            page.clear();
            self.page(index, &mut page);
            file.write_all_at(&page, index * PAGE as u64)?;
        }
        Ok(())
    }

    /// Appends page number `index` to `out`.
    pub fn page(&self, index: u64, out: &mut Vec<u8>) {
        let end = out.len() + PAGE;
        // Far apart: seeds a multiple of the generator's step apart give the same numbers, shifted.
        let mut random = Random(Random(self.seed.rotate_left(32) ^ index).next());
        match self.kind(index) {
            Kind::Pattern => {
                let pattern = random.next().to_le_bytes();
                out.extend(pattern.iter().cycle().take(PAGE));
            }
            Kind::Random => out.extend((0..PAGE / 8).flat_map(|_| random.next().to_le_bytes())),
            Kind::Text => {
                while out.len() < end {
                    let word = WORDS.get(random.below(WORDS.len())).copied().unwrap_or_default();
                    out.extend_from_slice(word.as_bytes());
                }
                out.truncate(end);
            }
            Kind::Zero => out.resize(end, 0),
        }
    }

    /// What page number `index` holds.
    pub fn kind(&self, index: u64) -> Kind {
        match Random(self.seed.wrapping_add(index / 8)).below(16) {
            0..6 => Kind::Zero,
            6..10 => Kind::Text,
            10..13 => Kind::Pattern,
            _ => Kind::Random,
        }
    }
}

/// SplitMix64: tiny, and good enough to defeat a compressor.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    pub(crate) fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next() % limit.max(1) as u64).unwrap_or_default()
    }
}

const WORDS: [&str; 16] = [
    "memory ", "of ", "the ", "guest ", "moves ", "while ", "it ", "runs, ", "page ", "by ", "page\n",
    "and ", "round ", "after ", "round. ", "Then ",
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_gives_the_same_pages_of_every_kind() {
        let fill = Fill::new(7);
        let mut kinds = [0; 4];
        for index in 0..4096 {
            let (mut once, mut again) = (Vec::new(), Vec::new());
            fill.page(index, &mut once);
            Fill::new(7).page(index, &mut again);
            assert_eq!(once.len(), PAGE);
            assert_eq!(once, again);
            assert_eq!(once.iter().all(|byte| *byte == 0), fill.kind(index) == Kind::Zero);
            kinds[fill.kind(index) as usize] += 1;
        }
        assert!(kinds.iter().all(|pages| *pages > 256), "{kinds:?}");
    }

    #[test]
    fn random_pages_have_no_word_in_common() {
        let (fill, mut pages) = (Fill::new(3), Vec::new());
        let random = (0..4096).filter(|index| fill.kind(*index) == Kind::Random);
        random.for_each(|index| fill.page(index, &mut pages));
        let words: std::collections::HashSet<_> = pages.chunks(8).collect();
        assert_eq!(words.len(), pages.len() / 8);
    }

    #[test]
    fn another_seed_gives_other_pages() {
        let (mut one, mut other) = (Vec::new(), Vec::new());
        for index in 0..64 {
            Fill::new(1).page(index, &mut one);
            Fill::new(2).page(index, &mut other);
        }
        assert_ne!(one, other);
    }
}
