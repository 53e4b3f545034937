use zerocopy::big_endian::U32;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::reader::prefix;
use crate::{Invalid, Parsed};

/// First word of the main channel, `QEVM`. Spec: docs/wire.md §1.
pub const STREAM_MAGIC: u32 = 0x5145_564d;
/// Version of the stream. 2 was an older format, and there has been no other since. Spec:
/// docs/wire.md §1.
pub const STREAM_VERSION: u32 = 3;

/// The first 8 bytes of the main channel: magic and version. Spec: docs/wire.md §1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StreamHeader;

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawStreamHeader {
    magic: U32,
    version: U32,
}
const _: () = assert!(size_of::<RawStreamHeader>() == StreamHeader::LEN);

impl StreamHeader {
    /// Bytes on the wire.
    pub const LEN: usize = 8;

    /// # Errors
    /// Another magic, or another version than 3.
    pub fn parse(buf: &[u8]) -> Parsed<Self> {
        prefix(buf, |r| {
            let raw: &RawStreamHeader = r.raw()?;
            check_magic("stream magic", raw.magic, STREAM_MAGIC)?;
            match raw.version.get() {
                STREAM_VERSION => Ok(Self),
                seen => Err(Invalid::new("stream version", seen, STREAM_VERSION).into()),
            }
        })
    }

    /// Appends the header.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let raw = RawStreamHeader { magic: STREAM_MAGIC.into(), version: STREAM_VERSION.into() };
        out.extend(raw.as_bytes());
    }
}

/// Compares a magic word.
pub(crate) fn check_magic(what: &'static str, seen: U32, expected: u32) -> Result<(), Invalid> {
    if seen.get() == expected {
        return Ok(());
    }
    Err(Invalid::new(what, format_args!("{seen:#010x}"), format_args!("{expected:#010x}")))
}
