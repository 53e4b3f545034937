//! The pages of a checkpoint.

use super::pages::{PageContent, PageRecord};
use crate::at_rest::checkpoint::Checkpoint;
use crate::error::{Error, ErrorKind, Phase, Result};
use crate::guest::{DirtyBitmap, PAGE, RamBlock};

/// Reads a checkpoint page by page: the blocks in their order, holes of the files as runs of zero
/// pages.
pub struct StoredPages {
    blocks: Vec<RamBlock>,
    block: usize,
    page: usize,
    /// Which pages of the block are no hole; `None` before the block is begun.
    data: Option<DirtyBitmap>,
    buffer: Box<[u8]>,
}

impl Checkpoint {
    /// Reads the pages from the first one on.
    ///
    /// # Errors
    /// As [`Checkpoint::ram`].
    pub fn pages(&self) -> Result<StoredPages> {
        let buffer = vec![0; PAGE].into();
        Ok(StoredPages { blocks: self.ram()?, block: 0, page: 0, data: None, buffer })
    }
}

impl StoredPages {
    /// The next record; `None` after the last page.
    ///
    /// # Errors
    /// `Storage` if a file's holes cannot be found.
    pub fn next_page(&mut self) -> Result<Option<PageRecord<'_>>> {
        loop {
            let Some(block) = self.blocks.get(self.block) else { return Ok(None) };
            if self.page < block.pages() {
                break;
            }
            self.block += 1;
            self.page = 0;
            self.data = None;
        }
        self.read().map(Some)
    }

    fn read(&mut self) -> Result<PageRecord<'_>> {
        let Some(block) = self.blocks.get(self.block) else { return Err(gone(self.page, "no block")) };
        let data = match &mut self.data {
            Some(data) => data,
            none => none.insert(pages_with_data(block)?),
        };
        let page = self.page;
        let holes = (page..block.pages()).take_while(|page| !data.test(*page)).count();
        self.page += holes.max(1);
        let content = if holes > 0 {
            PageContent::Zero { pages: holes as u64 }
        } else if block.read_page(page, &mut self.buffer) {
            PageContent::Data(&self.buffer)
        } else {
            return Err(gone(page, block.name().as_str()));
        };
        Ok(PageRecord { block: self.block, page: page as u64, content })
    }
}

fn gone(page: usize, block: &str) -> Error {
    Error::new(ErrorKind::Storage, Phase::Active, format!("page {page} of block {block} is not there"))
}

/// Where holes are not known, all pages.
fn pages_with_data(block: &RamBlock) -> Result<DirtyBitmap> {
    let known = block.data_pages().map_err(|error| {
        let detail = format!("looking for the holes of block {}", block.name());
        Error::new(ErrorKind::Storage, Phase::Active, detail).because(error)
    })?;
    Ok(known.unwrap_or_else(|| {
        let all = DirtyBitmap::new(block.pages());
        all.set_range(0, block.pages());
        all
    }))
}
