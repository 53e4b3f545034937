use crate::reader::{Reader, Stop, prefix};
use crate::writer::put_cstr8;
use crate::{BlockName, Invalid, PageSize, Parsed};

/// One record of the `ram` section (version 4). Spec: docs/wire.md §5.
///
/// Page bytes, deltas and compressed pages are not part of the record: they follow it. Offsets are
/// in bytes from the block's start and are multiples of the page size.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RamRecord {
    /// The page's bytes follow, as a zlib stream of `len` bytes of its own: capability `compress`,
    /// which QEMU 9.1 removed.
    Compressed {
        /// Offset of the page in the block.
        offset: u64,
        /// Which block.
        block: BlockRef,
        /// Bytes of the zlib stream, from 1 to what zlib may make of a page.
        len: u32,
    },
    /// The payload of this section piece ends here.
    EndOfSection,
    /// A sync point: wait until each multifd channel has reached its SYNC. Spec: docs/wire.md §9.
    Flush,
    /// The block list follows; `total` bytes is the sum of the blocks' used lengths. Spec:
    /// docs/wire.md §5.1.
    MemSize {
        /// Bytes of all blocks.
        total: u64,
    },
    /// The page's bytes follow.
    Page {
        /// Offset of the page in the block.
        offset: u64,
        /// Which block.
        block: BlockRef,
    },
    /// A delta of `len` bytes against the page as the destination has it follows. Spec:
    /// docs/wire.md §6.
    Xbzrle {
        /// Offset of the page in the block.
        offset: u64,
        /// Which block.
        block: BlockRef,
        /// Bytes of delta, from 1 to the page size; at 64 KiB pages the field ends at 65535.
        len: u16,
    },
    /// The page is all zeros.
    Zero {
        /// Offset of the page in the block.
        offset: u64,
        /// Which block.
        block: BlockRef,
    },
}

/// Name of the section that has the guest's RAM. Spec: docs/wire.md §3.2.
pub const RAM_SECTION: &str = "ram";
/// The only version of that section there has been since 2009. Spec: docs/wire.md §3.2.
pub const RAM_SECTION_VERSION: u32 = 4;

/// How a record names its block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BlockRef {
    /// By name.
    Named(BlockName),
    /// The block of the last record on this channel that had a name (flag CONTINUE).
    Same,
}

const FULL: u64 = 0x001;
const ZERO: u64 = 0x002;
const MEM_SIZE: u64 = 0x004;
const PAGE: u64 = 0x008;
const EOS: u64 = 0x010;
const CONTINUE: u64 = 0x020;
const XBZRLE: u64 = 0x040;
const HOOK: u64 = 0x080;
const COMPRESS_PAGE: u64 = 0x100;
const MULTIFD_FLUSH: u64 = 0x200;

/// The only encoding of a delta there is.
const XBZRLE_ENCODING: u8 = 1;

impl RamRecord {
    /// Parses one record, without the page bytes or the delta that may follow it.
    ///
    /// # Errors
    /// Flags that are unknown, obsolete or do not go together, a fill byte other than 0, a delta of
    /// another encoding or longer than a page, or a malformed name.
    pub fn parse(buf: &[u8], page: PageSize) -> Parsed<Self> {
        prefix(buf, |r| {
            let word = r.be64()?;
            let flags = word & page.offset_mask();
            let address = word & !page.offset_mask();
            match flags & !CONTINUE {
                PAGE => Ok(Self::Page { offset: address, block: BlockRef::read(r, flags)? }),
                ZERO => {
                    let block = BlockRef::read(r, flags)?;
                    check_fill(r.u8()?)?;
                    Ok(Self::Zero { offset: address, block })
                }
                XBZRLE => {
                    let block = BlockRef::read(r, flags)?;
                    let len = read_delta_head(r, page)?;
                    Ok(Self::Xbzrle { offset: address, block, len })
                }
                COMPRESS_PAGE => {
                    let block = BlockRef::read(r, flags)?;
                    let len = read_compressed_len(r, page)?;
                    Ok(Self::Compressed { offset: address, block, len })
                }
                MEM_SIZE if flags == MEM_SIZE => Ok(Self::MemSize { total: address }),
                EOS if word == EOS => Ok(Self::EndOfSection),
                MULTIFD_FLUSH if word == MULTIFD_FLUSH => Ok(Self::Flush),
                _ => Err(refused(word, flags).into()),
            }
        })
    }

    /// Appends the record, without the page bytes or the delta. Offsets must be multiples of the
    /// page size.
    pub fn encode(&self, page: PageSize, out: &mut Vec<u8>) {
        let (address, kind, block) = match self {
            Self::Compressed { offset, block, .. } => (*offset, COMPRESS_PAGE, Some(block)),
            Self::EndOfSection => (0, EOS, None),
            Self::Flush => (0, MULTIFD_FLUSH, None),
            Self::MemSize { total } => (*total, MEM_SIZE, None),
            Self::Page { offset, block } => (*offset, PAGE, Some(block)),
            Self::Xbzrle { offset, block, .. } => (*offset, XBZRLE, Some(block)),
            Self::Zero { offset, block } => (*offset, ZERO, Some(block)),
        };
        debug_assert!(page.aligns(address), "{address:#x} is not a multiple of the page size");
        match block {
            Some(BlockRef::Named(name)) => {
                out.extend((address | kind).to_be_bytes());
                put_cstr8(out, name.as_str());
            }
            Some(BlockRef::Same) => out.extend((address | kind | CONTINUE).to_be_bytes()),
            None => out.extend((address | kind).to_be_bytes()),
        }
        match self {
            Self::Zero { .. } => out.push(0),
            Self::Xbzrle { len, .. } => {
                out.push(XBZRLE_ENCODING);
                out.extend(len.to_be_bytes());
            }
            Self::Compressed { len, .. } => out.extend(len.to_be_bytes()),
            _ => {}
        }
    }
}

impl BlockRef {
    fn read(r: &mut Reader<'_>, flags: u64) -> Result<Self, Stop> {
        if flags & CONTINUE != 0 {
            return Ok(Self::Same);
        }
        Ok(Self::Named(BlockName::try_from(r.cstr8()?)?))
    }
}

fn check_fill(fill: u8) -> Result<(), Invalid> {
    match fill {
        0 => Ok(()),
        _ => Err(Invalid::new("fill byte of a zero page", fill, 0)),
    }
}

fn read_delta_head(r: &mut Reader<'_>, page: PageSize) -> Result<u16, Stop> {
    match r.u8()? {
        XBZRLE_ENCODING => {}
        seen => return Err(Invalid::new("xbzrle encoding", seen, XBZRLE_ENCODING).into()),
    }
    let len = r.be16()?;
    if len == 0 || usize::from(len) > page.bytes() {
        return Err(Invalid::new("xbzrle length", len, format_args!("1..={}", page.bytes())).into());
    }
    Ok(len)
}

/// Most bytes that zlib makes of a page: its own bound, which QEMU's destination has, too.
fn longest_compressed(page: PageSize) -> u64 {
    let len = page.bytes_u64();
    len + (len >> 12) + (len >> 14) + (len >> 25) + 13
}

fn read_compressed_len(r: &mut Reader<'_>, page: PageSize) -> Result<u32, Stop> {
    let (len, most) = (r.be32()?, longest_compressed(page));
    if len == 0 || u64::from(len) > most {
        return Err(Invalid::new("length of a compressed page", len, format_args!("1..={most}")).into());
    }
    Ok(len)
}

#[cold]
fn refused(word: u64, flags: u64) -> Invalid {
    let why = match flags & !CONTINUE {
        FULL => "FULL, which no source sends any more",
        HOOK => "HOOK, which belongs to RDMA",
        MEM_SIZE => "CONTINUE on a block list",
        EOS | MULTIFD_FLUSH => "an address or CONTINUE on a record that has no page",
        0 => "no kind of record",
        kind if kind < MULTIFD_FLUSH << 1 => "more than one kind of record",
        _ => "unknown flags",
    };
    let expected = "one of ZERO, MEM_SIZE, PAGE, EOS, XBZRLE, COMPRESS_PAGE, MULTIFD_FLUSH";
    Invalid::new("ram record", format_args!("{word:#x} ({why})"), expected)
}
