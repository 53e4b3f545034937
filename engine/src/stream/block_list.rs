//! The list of RAM blocks, the first thing in the RAM section. Spec: docs/wire.md §5.1.

use multifd_wire::{BlockEntry, BlockListBuilder, BlockListFormat, PageSize, Parsed, RamRecord};

use super::mapped_layout::next_entry;
use super::reader::{ByteSource, ItemReader};
use crate::error::{Error, ErrorKind, Phase, Result};

const WHAT: &str = "the list of RAM blocks";

/// Reads the whole list; with `mapped-ram`, past the pages of every block. With page sizes in
/// `format`, an entry may have one or not: nothing else that follows an entry looks like one.
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
        let entry = reader.next(Phase::Setup, WHAT, |bytes| parse(bytes, page, format))?;
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

/// A name begins with its length, which is not 0; a record with an offset of pages and its flags in
/// the lowest bits, all of which are 0 in the size of a huge page.
fn parse(bytes: &[u8], page: PageSize, format: BlockListFormat) -> Parsed<BlockEntry> {
    let plain = BlockEntry::parse(bytes, BlockListFormat { page_sizes: false, ..format })?;
    let Some((_, used)) = plain.as_ref().filter(|_| format.page_sizes) else { return Ok(plain) };
    let Some(next) = bytes.get(*used..).and_then(|rest| rest.first_chunk()) else { return Ok(None) };
    let next = u64::from_be_bytes(*next);
    if next.is_power_of_two() && next > page.bytes_u64() && next < 1 << 56 {
        return BlockEntry::parse(bytes, format);
    }
    Ok(plain)
}

#[cfg(test)]
mod tests {
    use multifd_wire::BlockName;

    use super::*;

    #[test]
    fn an_entry_has_the_size_of_huge_pages_or_what_follows_it() {
        let format = BlockListFormat { page_sizes: true, ..BlockListFormat::default() };
        let entry = |page_size| BlockEntry {
            name: BlockName::try_from("pc.ram").unwrap(),
            used_len: 4 << 20,
            page_size,
            guest_address: None,
            mapped_ram: None,
        };
        for page_size in [None, Some(2 << 20), Some(1 << 30)] {
            let mut bytes = Vec::new();
            entry(page_size).encode(&mut bytes);
            let len = bytes.len();
            for follows in [0x10_u64.to_be_bytes(), 0x200_u64.to_be_bytes(), *b"\x07pc.bios"] {
                let mut bytes = bytes.clone();
                bytes.extend(follows);
                let parsed = parse(&bytes, PageSize::K4, format).unwrap();
                assert_eq!(parsed, Some((entry(page_size), len)), "{follows:?}");
            }
            assert_eq!(parse(&bytes[..len - 1], PageSize::K4, format).unwrap(), None);
        }
    }
}
