use std::collections::HashSet;

use zerocopy::big_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::reader::{Reader, Stop, prefix};
use crate::writer::put_cstr8;
use crate::{BlockName, Invalid, PageSize, Parsed};

/// One block in the list that follows a `MemSize` record. Spec: docs/wire.md §5.1.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockEntry {
    /// Name of the block.
    pub name: BlockName,
    /// Bytes in use, a multiple of the target page.
    pub used_len: u64,
    /// The block's host page size in bytes, where it is listed: see
    /// [`BlockListFormat::page_sizes`].
    pub page_size: Option<u64>,
    /// Address within the block's container, with `x-ignore-shared`.
    pub guest_address: Option<u64>,
    /// Offset of the block in the file, with `mapped-ram`; see [`MappedRamHeader::is_stored`].
    pub mapped_ram: Option<MappedRamHeader>,
}

/// Which optional fields an entry has: nothing in the stream says so, the capabilities do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BlockListFormat {
    /// `postcopy-ram` is on *and* this block's host page size differs from the larger of host page
    /// and target page. So this one can change from entry to entry.
    pub page_sizes: bool,
    /// `x-ignore-shared` is on.
    pub guest_addresses: bool,
    /// `mapped-ram` is on. After a stored block the next entry is then at `pages_offset + used_len`
    /// of the file.
    pub mapped_ram: bool,
}

impl BlockEntry {
    /// # Errors
    /// A malformed name or `mapped-ram` header.
    pub fn parse(buf: &[u8], format: BlockListFormat) -> Parsed<Self> {
        prefix(buf, |r| {
            let name = BlockName::try_from(r.cstr8()?)?;
            let used_len = r.be64()?;
            let page_size = format.page_sizes.then(|| r.be64()).transpose()?;
            let guest_address = format.guest_addresses.then(|| r.be64()).transpose()?;
            let mapped_ram = format.mapped_ram.then(|| MappedRamHeader::read(r)).transpose()?;
            Ok(Self { name, used_len, page_size, guest_address, mapped_ram })
        })
    }

    /// Appends the entry with the optional fields that it has.
    pub fn encode(&self, out: &mut Vec<u8>) {
        put_cstr8(out, self.name.as_str());
        out.extend(self.used_len.to_be_bytes());
        for field in [self.page_size, self.guest_address].into_iter().flatten() {
            out.extend(field.to_be_bytes());
        }
        if let Some(header) = &self.mapped_ram {
            header.encode(out);
        }
    }
}

/// Place of a block's pages in a `mapped-ram` file. Spec: docs/wire.md §17.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MappedRamHeader {
    /// Target page size in bytes.
    pub page_size: u64,
    /// Where the bitmap of stored pages begins, in bytes from the file's start.
    pub bitmap_offset: u64,
    /// Where the pages begin, in bytes from the file's start: a multiple of [`Self::PAGES_ALIGN`].
    pub pages_offset: u64,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawMappedRamHeader {
    version: U32,
    page_size: U64,
    bitmap_offset: U64,
    pages_offset: U64,
}
const _: () = assert!(size_of::<RawMappedRamHeader>() == MappedRamHeader::LEN);

impl MappedRamHeader {
    /// Bytes on the wire.
    pub const LEN: usize = 28;
    /// Alignment of the pages in the file: 1 MiB, so that direct I/O of any block size can write
    /// them.
    pub const PAGES_ALIGN: u64 = 1 << 20;
    const VERSION: u32 = 1;

    /// # Errors
    /// Another version than 1.
    pub fn parse(buf: &[u8]) -> Parsed<Self> {
        prefix(buf, Self::read)
    }

    fn read(r: &mut Reader<'_>) -> Result<Self, Stop> {
        let raw: &RawMappedRamHeader = r.raw()?;
        if raw.version.get() != Self::VERSION {
            return Err(Invalid::new("mapped-ram version", raw.version, Self::VERSION).into());
        }
        Ok(Self {
            page_size: raw.page_size.get(),
            bitmap_offset: raw.bitmap_offset.get(),
            pages_offset: raw.pages_offset.get(),
        })
    }

    /// Appends the header.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let raw = RawMappedRamHeader {
            version: Self::VERSION.into(),
            page_size: self.page_size.into(),
            bitmap_offset: self.bitmap_offset.into(),
            pages_offset: self.pages_offset.into(),
        };
        out.extend(raw.as_bytes());
    }

    /// Is the block in the file at all? With `x-ignore-shared`, shared blocks are not, and both
    /// places are 0 (QEMU after 10.0).
    pub const fn is_stored(&self) -> bool {
        self.bitmap_offset != 0 || self.pages_offset != 0
    }

    /// Bytes of the bitmap of a block of `used_len` bytes: a bit a page, in words of 8 bytes.
    pub const fn bitmap_len(used_len: u64, page: PageSize) -> u64 {
        used_len.div_ceil(page.bytes_u64()).div_ceil(64) * 8
    }

    /// Can these places hold a block of `used_len` bytes?
    fn check(&self, used_len: u64, page: PageSize) -> Result<(), Invalid> {
        if self.page_size != page.bytes_u64() {
            return Err(Invalid::new("mapped-ram page size", self.page_size, page.bytes()));
        }
        let seen = self.pages_offset;
        if !seen.is_multiple_of(Self::PAGES_ALIGN) {
            return Err(Invalid::new(
                "mapped-ram pages offset",
                format_args!("{seen:#x}"),
                "a multiple of 1 MiB",
            ));
        }
        match self.bitmap_offset.checked_add(Self::bitmap_len(used_len, page)) {
            Some(end) if end <= seen && seen.checked_add(used_len).is_some() => Ok(()),
            _ => {
                let seen = format!("bitmap at {:#x}, pages at {seen:#x}", self.bitmap_offset);
                Err(Invalid::new("mapped-ram offsets", seen, "pages after the bitmap, and an end below 2^64"))
            }
        }
    }
}

/// Most blocks in one list. Large guests have some tens: one per memory device, per ROM and per
/// video memory.
pub const MAX_BLOCKS: usize = 4096;

/// Collects the entries of a block list until they add up to the total of the `MemSize` record: the
/// list has no count. Spec: docs/wire.md §5.1.
#[derive(Debug)]
pub struct BlockListBuilder {
    left: u64,
    page: PageSize,
    names: HashSet<BlockName>,
    blocks: Vec<BlockEntry>,
}

impl BlockListBuilder {
    /// A list of blocks of `total` bytes together.
    pub fn new(total: u64, page: PageSize) -> Self {
        Self { left: total, page, names: HashSet::new(), blocks: Vec::new() }
    }

    /// Adds the next entry; true if it was the last.
    ///
    /// # Errors
    /// A length that is zero, not a multiple of the page size or more than what is left; a name for
    /// the second time; more than [`MAX_BLOCKS`] blocks; a `mapped-ram` header that cannot be.
    pub fn push(&mut self, entry: BlockEntry) -> Result<bool, Invalid> {
        let used_len = entry.used_len;
        if self.blocks.len() == MAX_BLOCKS {
            return Err(Invalid::new("ram blocks", MAX_BLOCKS + 1, format_args!("at most {MAX_BLOCKS}")));
        }
        if used_len == 0 || !self.page.aligns(used_len) {
            let expected = format!("a multiple of {}", self.page.bytes());
            return Err(Invalid::new("length of a ram block", block_text(&entry), expected));
        }
        let Some(left) = self.left.checked_sub(used_len) else {
            let expected = format!("at most the {} that are left of the total", self.left);
            return Err(Invalid::new("length of a ram block", block_text(&entry), expected));
        };
        match &entry.mapped_ram {
            Some(header) if entry.guest_address.is_some() && !header.is_stored() => {}
            Some(header) => header.check(used_len, self.page)?,
            None => {}
        }
        if !self.names.insert(entry.name.clone()) {
            return Err(Invalid::new("ram block", &entry.name, "each name once"));
        }
        self.left = left;
        self.blocks.push(entry);
        Ok(self.complete())
    }

    /// Do the entries add up to the total?
    pub fn complete(&self) -> bool {
        self.left == 0
    }

    /// The entries so far, in the order of the stream.
    pub fn finish(self) -> Vec<BlockEntry> {
        self.blocks
    }
}

fn block_text(entry: &BlockEntry) -> String {
    format!("{} bytes for {}", entry.used_len, entry.name)
}
