//! The list of RAM blocks, the first thing in the RAM section. Spec: docs/wire.md §5.1.

use multifd_wire::{BlockEntry, BlockListBuilder, BlockListFormat, PageSize, RamRecord};

use super::mapped_layout::next_entry;
use super::reader::{ByteSource, ItemReader};
use crate::error::{Error, ErrorKind, Phase, Result};

const WHAT: &str = "the list of RAM blocks";

/// Reads the whole list; with `mapped-ram`, past the pages of every block.
pub(crate) fn read<S: ByteSource>(
    reader: &mut ItemReader<S>,
    page: PageSize,
    format: BlockListFormat,
) -> Result<Vec<BlockEntry>> {
    let position = reader.position();
    let record = reader.next(Phase::Setup, WHAT, |bytes| RamRecord::parse(bytes, page))?;
    let RamRecord::MemSize { total } = record else {
        let detail = format!("{record:?}, expected {WHAT} at byte {position}");
        return Err(Error::new(ErrorKind::InvalidStream, Phase::Setup, detail).on(reader.name()));
    };
    let mut list = BlockListBuilder::new(total, page);
    while !list.complete() {
        let position = reader.position();
        let entry = reader.next(Phase::Setup, WHAT, |bytes| BlockEntry::parse(bytes, format))?;
        let (name, next) = (entry.name.clone(), next_entry(&entry, reader.position()));
        let next = list.push(entry).and(next).map_err(|invalid| {
            let detail = format!("{WHAT} at byte {position} is invalid");
            Error::new(ErrorKind::InvalidStream, Phase::Setup, detail).on(reader.name()).because(invalid)
        })?;
        if let Some(behind) = next {
            reader.seek(behind, || format!("the pages of RAM block {name}"))?;
        }
    }
    Ok(list.finish())
}
