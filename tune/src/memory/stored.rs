//! The memory of a checkpoint. Pages in holes of its files are not held.

use std::fs;
use std::path::Path;

use multifd_engine::{Checkpoint, DirtyBitmap, RamBlock};

use super::{BATCH_PAGES, Batch, Extent, Memory, PAGE, Rewrites};
use crate::{Error, Result};

pub(super) struct Stored {
    name: String,
    blocks: Vec<Block>,
    extent: Extent,
}

struct Block {
    ram: RamBlock,
    held: DirtyBitmap,
}

impl Stored {
    pub(super) fn open(directory: &Path) -> Result<Self> {
        let checkpoint = Checkpoint::open(directory)?;
        let ram = checkpoint.ram()?;
        let blocks = ram.into_iter().map(Block::new).collect::<Result<Vec<_>>>()?;
        let extent = Extent {
            blocks: blocks.iter().map(|block| block.ram.used_len()).collect(),
            batches: blocks.iter().enumerate().flat_map(|(index, block)| block.batches(index)).collect(),
            device_bytes: fs::metadata(directory.join("device-state.bin")).map_or(0, |file| file.len()),
        };
        Ok(Self { name: format!("checkpoint {}", directory.display()), blocks, extent })
    }
}

impl Memory for Stored {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn extent(&self) -> &Extent {
        &self.extent
    }

    fn read(&mut self, wanted: &[Batch], progress: &dyn Fn(u64)) -> Result<Vec<Vec<u8>>> {
        let mut read = 0;
        let one = |batch: &Batch| {
            let block =
                self.blocks.get(batch.block).ok_or(Error::Bug("a batch of a block that does not exist"))?;
            let content = block.read(batch.number)?;
            read += content.len() as u64;
            progress(read);
            Ok(content)
        };
        wanted.iter().map(one).collect()
    }

    fn rewrites(&mut self) -> Result<Option<Rewrites>> {
        Ok(None)
    }
}

impl Block {
    fn new(ram: RamBlock) -> Result<Self> {
        let held = ram
            .data_pages()
            .map_err(|source| Error::Holes { block: ram.name().to_string(), source })?
            .unwrap_or_else(|| {
                let all = DirtyBitmap::new(ram.pages());
                all.set_range(0, ram.pages());
                all
            });
        Ok(Self { ram, held })
    }

    fn batches(&self, block: usize) -> impl Iterator<Item = Batch> {
        let numbers = 0..(self.ram.pages() as u64).div_ceil(BATCH_PAGES);
        let batch = move |number| Batch { block, number, held: self.pages(number).count() as u64 };
        numbers.map(batch).filter(|batch| batch.held > 0)
    }

    /// The held pages of a batch.
    fn pages(&self, number: u64) -> impl Iterator<Item = usize> {
        let place = |batch: u64| usize::try_from(batch * BATCH_PAGES).unwrap_or(usize::MAX);
        (place(number)..place(number + 1).min(self.ram.pages())).filter(|page| self.held.test(*page))
    }

    fn read(&self, number: u64) -> Result<Vec<u8>> {
        let mut content = Vec::new();
        for page in self.pages(number) {
            let start = content.len();
            content.resize(start + PAGE, 0);
            let there = content.get_mut(start..).is_some_and(|copy| self.ram.read_page(page, copy));
            if !there {
                return Err(Error::MissingPage { block: self.ram.name().to_string(), page });
            }
        }
        Ok(content)
    }
}
