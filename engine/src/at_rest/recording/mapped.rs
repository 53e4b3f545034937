//! The pages of a `mapped-ram` file: a bitmap a block says which are stored, and each has its
//! place. Spec: docs/wire.md §17.

use multifd_wire::BlockEntry;

use super::file::FileReader;
use super::pages::{PageContent, PageRecord};
use super::{Recording, invalid};
use crate::error::{Phase, Result};
use crate::stream::mapped_layout::StoredBits;

/// Words of the bitmap that are held: 32 KiB, the bits of 1 GiB of pages of 4 KiB.
const CHUNK_WORDS: usize = 4096;
const PAGES_PER_WORD: u64 = u64::BITS as u64;

pub(super) struct MappedPages<'r> {
    recording: &'r Recording,
    reader: FileReader<'r>,
    block: usize,
    page: u64,
    /// A piece of the block's bitmap.
    bits: StoredBits,
}

impl<'r> MappedPages<'r> {
    pub(super) fn new(recording: &'r Recording) -> Self {
        let reader = recording.file.reader(0);
        Self { recording, reader, block: 0, page: 0, bits: StoredBits::default() }
    }

    pub(super) fn position(&self) -> u64 {
        self.reader.position()
    }

    /// Goes to the block that has the next page; false if there is none.
    pub(super) fn seek_next(&mut self) -> Result<bool> {
        while let Some(entry) = self.recording.blocks.get(self.block) {
            let pages = entry.used_len / self.recording.page_size.bytes_u64();
            let stored = entry.mapped_ram.is_some_and(|header| header.is_stored());
            if stored && self.page < pages {
                self.load(entry, pages)?;
                return Ok(true);
            }
            self.block += 1;
            self.page = 0;
            self.bits = StoredBits::default();
        }
        Ok(false)
    }

    /// The record of this page, or of the run of zero pages that it begins.
    pub(super) fn read(&mut self) -> Result<PageRecord<'_>> {
        let size = self.recording.page_size;
        let (block, page) = (self.block, self.page);
        let entry = self.recording.blocks.get(block);
        let Some(header) = entry.and_then(|entry| entry.mapped_ram) else {
            return Err(invalid(Phase::Active, "a block without a place in the file"));
        };
        let pages = entry.map_or(0, |entry| entry.used_len / size.bytes_u64());
        let zeros = if self.bits.test(page) { 0 } else { self.bits.run(page).1.min(pages - page) };
        self.page += zeros.max(1);
        let content = if zeros > 0 {
            PageContent::Zero { pages: zeros }
        } else {
            let position = header.pages_offset + page * size.bytes_u64();
            self.reader.seek(position, || format!("page {page} of block {block}"))?;
            PageContent::Data(self.reader.take(Phase::Active, "a page", size.bytes())?)
        };
        Ok(PageRecord { block, page, content })
    }

    /// Makes sure that the piece of the bitmap with this page's bit is there.
    fn load(&mut self, entry: &BlockEntry, pages: u64) -> Result<()> {
        let Some(header) = entry.mapped_ram.filter(|_| self.page >= self.bits.end()) else { return Ok(()) };
        let first = self.page / PAGES_PER_WORD * PAGES_PER_WORD;
        let left = usize::try_from((pages - first).div_ceil(PAGES_PER_WORD)).unwrap_or(CHUNK_WORDS);
        let mut bytes = vec![0; left.min(CHUNK_WORDS) * 8];
        let position = header.bitmap_offset + first / 8;
        if self.recording.file.read_at(&mut bytes, position)? < bytes.len() {
            let detail =
                format!("the file ends within the bitmap of block {} at byte {position}", entry.name);
            return Err(invalid(Phase::Active, detail));
        }
        self.bits = StoredBits::decode(first, &bytes);
        Ok(())
    }
}
