//! RAM of a guest that does not run.

use std::path::Path;

use multifd_engine::{Checkpoint, HostMemory, RamBlock};
use multifd_wire::{BlockEntry, BlockName};

use crate::{Failure, Fill, Outcome};

/// Bytes in a page.
pub const PAGE: usize = 4096;

/// The blocks of a small guest, and what is in them.
#[derive(Clone, Debug)]
pub struct Memory {
    blocks: Vec<Block>,
}

#[derive(Clone, Debug)]
struct Block {
    name: BlockName,
    content: Vec<u8>,
}

/// A page of one of the blocks.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct PageAt {
    /// Index of the block.
    pub block: usize,
    /// Number of the page in its block.
    pub page: usize,
}

impl PageAt {
    /// Bytes from the block's start.
    pub fn offset(self) -> u64 {
        (self.page * PAGE) as u64
    }
}

impl Memory {
    /// Blocks of these names and numbers of pages, all zero.
    pub fn zero(blocks: &[(&str, usize)]) -> Self {
        let block = |&(name, pages): &(&str, usize)| Block {
            name: BlockName::try_from(name).expect("a test's block has a sound name"),
            content: vec![0; pages * PAGE],
        };
        Self { blocks: blocks.iter().map(block).collect() }
    }

    /// `pc.ram` of 1 MiB and `pc.bios` of 64 KiB, with pages of every kind.
    pub fn small(seed: u64) -> Self {
        let mut memory = Self::zero(&[("pc.ram", 256), ("pc.bios", 16)]);
        let all = memory.all();
        memory.refill(&all, seed);
        memory
    }

    /// Every page, in the order in which a source sends them.
    pub fn all(&self) -> Vec<PageAt> {
        let pages = |(block, of): (usize, &Block)| {
            (0..of.content.len() / PAGE).map(move |page| PageAt { block, page })
        };
        self.blocks.iter().enumerate().flat_map(pages).collect()
    }

    /// Every `step`th page from the `first` on.
    pub fn every(&self, step: usize, first: usize) -> Vec<PageAt> {
        self.all().into_iter().skip(first).step_by(step).collect()
    }

    /// Gives `pages` the content that goes with `seed`: zeros, text, patterns, noise.
    pub fn refill(&mut self, pages: &[PageAt], seed: u64) {
        let fill = Fill::new(seed);
        for (index, at) in (0..).zip(pages) {
            let mut content = Vec::with_capacity(PAGE);
            fill.page(index, &mut content);
            self.set(*at, &content);
        }
    }

    /// Changes a few bytes of each of `pages`.
    pub fn touch(&mut self, pages: &[PageAt], mark: u8) {
        for (index, at) in pages.iter().enumerate() {
            let mut content = self.page(*at).to_vec();
            for byte in content.iter_mut().skip(index % 128).step_by(500 + index) {
                *byte = byte.wrapping_add(mark);
            }
            self.set(*at, &content);
        }
    }

    /// Replaces the content of a page.
    pub fn set(&mut self, at: PageAt, content: &[u8]) {
        let block = self.blocks.get_mut(at.block);
        let page = block.and_then(|block| block.content.chunks_mut(PAGE).nth(at.page));
        page.expect("the test asks for a page that is there").copy_from_slice(content);
    }

    /// The content of a page.
    pub fn page(&self, at: PageAt) -> &[u8] {
        let block = self.blocks.get(at.block);
        block.and_then(|block| block.content.chunks(PAGE).nth(at.page)).expect("the page is there")
    }

    /// The name of the block with this index.
    pub fn name(&self, block: usize) -> &BlockName {
        &self.blocks.get(block).expect("the test asks for a block that is there").name
    }

    /// Bytes of all blocks.
    pub fn total(&self) -> u64 {
        self.blocks.iter().map(|block| block.content.len() as u64).sum()
    }

    /// The list of blocks, as START has it.
    pub fn list(&self) -> Vec<BlockEntry> {
        let entry = |block: &Block| BlockEntry {
            name: block.name.clone(),
            used_len: block.content.len() as u64,
            page_size: None,
            guest_address: None,
            mapped_ram: None,
        };
        self.blocks.iter().map(entry).collect()
    }

    /// Memory for a destination of such a guest, in which every byte is `garbage`.
    ///
    /// # Errors
    /// When there is no memory.
    pub fn provide(&self, garbage: u8) -> Outcome<Vec<RamBlock>> {
        let block = |block: &Block| {
            let memory = HostMemory::anonymous(block.content.len())?;
            if let Some(slice) = memory.slice(0, memory.len()) {
                slice.copy_from(&vec![garbage; memory.len()]);
            }
            Ok(RamBlock::new(block.name.clone(), memory))
        };
        self.blocks.iter().map(block).collect()
    }

    /// The same memory for a source.
    ///
    /// # Errors
    /// When there is no memory.
    pub fn provide_content(&self) -> Outcome<Vec<RamBlock>> {
        let blocks = self.provide(0)?;
        for (from, to) in self.blocks.iter().zip(&blocks) {
            if let Some(slice) = to.memory().slice(0, from.content.len()) {
                slice.copy_from(&from.content);
            }
        }
        Ok(blocks)
    }

    /// Compares every byte with what a destination has.
    ///
    /// # Errors
    /// When a byte differs; the failure names the page.
    pub fn check(&self, blocks: &[RamBlock]) -> Outcome {
        let mut page = [0; PAGE];
        for at in self.all() {
            let name = self.name(at.block);
            let block = blocks.iter().find(|block| block.name() == name);
            let read = block.is_some_and(|block| block.read_page(at.page, &mut page));
            if !read || page != *self.page(at) {
                let difference = page.iter().zip(self.page(at)).position(|(here, there)| here != there);
                return Err(Failure::new(format!(
                    "page {} of {name} differs: read {read}, first at {difference:?}",
                    at.page
                )));
            }
        }
        Ok(())
    }

    /// Compares every byte with what a checkpoint has.
    ///
    /// # Errors
    /// When it cannot be read or a byte differs.
    pub fn check_checkpoint(&self, directory: &Path) -> Outcome {
        self.check(&Checkpoint::open(directory)?.ram()?)
    }
}
