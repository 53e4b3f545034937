use zerocopy::big_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{MULTIFD_MAGIC, MULTIFD_VERSION, PacketFlags, check_start};
use crate::names::{from_field, into_field};
use crate::{BlockName, CodecId, Invalid, PageSize};

/// Bytes of a packet that tell its kind. Spec: docs/wire.md §10.
pub const PACKET_PREFIX_LEN: usize = 12;

/// Most payload bytes of a RAM packet: 1 MiB, twice the pages, which is QEMU's receive buffer for
/// compressed pages. Spec: docs/wire.md §8.
pub const MAX_PAYLOAD: usize = 1 << 20;

/// Most pages of a packet: 512 KiB of them. Spec: docs/wire.md §7.2.
pub const fn pages_per_packet(page: PageSize) -> usize {
    (512 << 10) / page.bytes()
}

/// Bytes of a RAM packet's header. All offsets are always there, however few are used. Spec:
/// docs/wire.md §7.2.
pub const fn header_len(page: PageSize) -> usize {
    FIXED_LEN + 8 * pages_per_packet(page)
}

/// Which of the two headers a packet has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PacketKind {
    /// [`DeviceStatePacket`](crate::DeviceStatePacket)
    DeviceState,
    /// [`RamPacket`]
    Ram,
}

impl PacketKind {
    /// Tells the kind from a packet's first bytes.
    ///
    /// # Errors
    /// Another magic or version, or unknown flags.
    pub fn parse(buf: &[u8; PACKET_PREFIX_LEN]) -> Result<Self, Invalid> {
        let [magic, version, flags]: [U32; 3] = zerocopy::transmute!(*buf);
        check_start(magic, version)?;
        let flags = PacketFlags::try_from(flags.get())?;
        Ok(if flags.device_state() { Self::DeviceState } else { Self::Ram })
    }
}

/// A checked view of a received RAM packet header. Spec: docs/wire.md §7.2.
///
/// Invariants: `normal + zero <= pages_per_packet`, every offset is a multiple of the page size,
/// the block has a valid name if there are pages. Whether offsets are inside the block is for the
/// caller to check.
#[derive(Clone, Copy, Debug)]
pub struct RamPacket<'a> {
    flags: PacketFlags,
    packet_num: u64,
    payload_len: usize,
    block: Option<&'a str>,
    normal: &'a [U64],
    zero: &'a [U64],
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawRamPacket {
    magic: U32,
    version: U32,
    flags: U32,
    pages_alloc: U32,
    normal_pages: U32,
    payload_len: U32,
    packet_num: U64,
    zero_pages: U32,
    /// Sent 0, not looked at; between two multifd ends, checksums: `PacketChecks`.
    _unused: [u8; 28],
    block: [u8; 256],
}
const FIXED_LEN: usize = 320;
const _: () = assert!(size_of::<RawRamPacket>() == FIXED_LEN);

/// QEMU 7.2 to 8.2 let `pages_alloc` be this many times the pages of a packet. Spec: docs/wire.md
/// §7.2.
const MAX_PAGES_ALLOC_FACTOR: usize = 100;

impl<'a> RamPacket<'a> {
    /// Checks a header of exactly [`header_len`] bytes.
    ///
    /// # Errors
    /// Another length, magic or version, unknown flags, counts or a payload beyond their limits, an
    /// offset inside a page, or a malformed block name.
    pub fn parse(buf: &'a [u8], page: PageSize) -> Result<Self, Invalid> {
        let wrong_len =
            || Invalid::new("packet header", format_args!("{} bytes", buf.len()), header_len(page));
        if buf.len() != header_len(page) {
            return Err(wrong_len());
        }
        let (raw, offsets) = RawRamPacket::ref_from_prefix(buf).map_err(|_| wrong_len())?;
        let offsets = <[U64]>::ref_from_bytes(offsets).map_err(|_| wrong_len())?;
        check_start(raw.magic, raw.version)?;
        let flags = PacketFlags::try_from(raw.flags.get())?;
        if flags.device_state() {
            return Err(Invalid::new("packet flags", "DEVICE_STATE (0x40)", "a ram packet"));
        }
        let (normal, zero) = raw.split(offsets)?;
        check_offsets(normal, page)?;
        check_offsets(zero, page)?;
        let has_pages = !(normal.is_empty() && zero.is_empty());
        Ok(Self {
            flags,
            packet_num: raw.packet_num.get(),
            payload_len: raw.payload_len(flags, normal.len(), page)?,
            block: has_pages.then(|| from_field("block name", &raw.block)).transpose()?,
            normal,
            zero,
        })
    }

    /// Flags of the packet. The codec field of a packet without pages means nothing.
    pub fn flags(&self) -> PacketFlags {
        self.flags
    }

    /// Number of pages whose bytes are in the payload.
    pub fn normal_pages(&self) -> usize {
        self.normal.len()
    }

    /// Number of pages that are all zeros.
    pub fn zero_pages(&self) -> usize {
        self.zero.len()
    }

    /// Bytes that follow the header: 0 without normal pages, their bytes without a codec, else
    /// 1..=[`MAX_PAYLOAD`].
    pub fn payload_len(&self) -> usize {
        self.payload_len
    }

    /// Running number over all channels, not checked by anyone.
    pub fn packet_num(&self) -> u64 {
        self.packet_num
    }

    /// The block of all pages of the packet; `None` if there are no pages.
    pub fn block(&self) -> Option<&'a str> {
        self.block
    }

    /// Offsets of the normal pages, in the order of the payload.
    pub fn normal_offsets(&self) -> impl ExactSizeIterator<Item = u64> + Clone + use<'a> {
        self.normal.iter().map(|offset| offset.get())
    }

    /// Offsets of the zero pages, in no order.
    pub fn zero_offsets(&self) -> impl ExactSizeIterator<Item = u64> + Clone + use<'a> {
        self.zero.iter().map(|offset| offset.get())
    }
}

impl RawRamPacket {
    /// Splits the offsets by the counts: normal pages first, zero pages behind them.
    fn split<'a>(&self, offsets: &'a [U64]) -> Result<(&'a [U64], &'a [U64]), Invalid> {
        let [alloc, normal, zero] =
            [self.pages_alloc, self.normal_pages, self.zero_pages].map(|count| count.get() as usize);
        if alloc > offsets.len() * MAX_PAGES_ALLOC_FACTOR {
            let expected = format!("at most {}", offsets.len() * MAX_PAGES_ALLOC_FACTOR);
            return Err(Invalid::new("pages allocated for a packet", alloc, expected));
        }
        let limit = alloc.min(offsets.len());
        let too_many = || {
            let expected = format!("at most {limit} together");
            Invalid::new("pages in a packet", format_args!("{normal} and {zero} zero"), expected)
        };
        let used = offsets.get(..limit).unwrap_or_default();
        let (normal, rest) = used.split_at_checked(normal).ok_or_else(too_many)?;
        let zero = rest.get(..zero).ok_or_else(too_many)?;
        Ok((normal, zero))
    }

    /// The payload's true length. Without normal pages there is none, and the field may hold a
    /// stale value: senders before 9.0 do not clear it. Spec: docs/wire.md §7.3.
    fn payload_len(&self, flags: PacketFlags, normal: usize, page: PageSize) -> Result<usize, Invalid> {
        let seen = self.payload_len.get() as usize;
        let raw_len = normal * page.bytes();
        match (normal, flags.codec()) {
            (0, _) => Ok(0),
            (_, CodecId::NONE) if seen == raw_len => Ok(seen),
            (_, CodecId::NONE) => Err(Invalid::new("payload of uncompressed pages", seen, raw_len)),
            _ if (1..=MAX_PAYLOAD).contains(&seen) => Ok(seen),
            _ => Err(Invalid::new("payload of a packet", seen, format_args!("1..={MAX_PAYLOAD} bytes"))),
        }
    }
}

/// All offsets at once, without a branch per page; which one is wrong is looked up only if one is.
fn check_offsets(offsets: &[U64], page: PageSize) -> Result<(), Invalid> {
    let all_bits = offsets.iter().fold(0, |bits, offset| bits | offset.get());
    if page.aligns(all_bits) {
        return Ok(());
    }
    let seen = offsets.iter().map(|offset| offset.get()).find(|offset| !page.aligns(*offset));
    let seen = seen.unwrap_or(all_bits);
    let expected = format!("a multiple of {}", page.bytes());
    Err(Invalid::new("page offset", format_args!("{seen:#x}"), expected))
}

/// A RAM packet header to be sent. Spec: docs/wire.md §7.2.
///
/// At most [`pages_per_packet`] pages in `normal` and `zero` together.
#[derive(Clone, Copy, Debug)]
pub struct RamPacketHeader<'a> {
    /// [`PacketFlags::SYNC`] without pages, or [`PacketFlags::pages`].
    pub flags: PacketFlags,
    /// Running number over all channels and packets, from 0.
    pub packet_num: u64,
    /// The block of all pages; `None` without pages.
    pub block: Option<&'a BlockName>,
    /// Offsets of the pages in the payload, in its order.
    pub normal: &'a [u64],
    /// Offsets of the zero pages.
    pub zero: &'a [u64],
    /// Bytes of the payload; 0 without normal pages.
    pub payload_len: u32,
}

impl RamPacketHeader<'_> {
    /// Appends exactly [`header_len`] bytes.
    pub fn encode(&self, page: PageSize, out: &mut Vec<u8>) {
        let pages = pages_per_packet(page);
        let count = self.normal.len() + self.zero.len();
        // Were this broken, the counts would be written as they are, and the destination refuses
        // the packet.
        debug_assert!(count <= pages, "{count} pages in a packet of {pages}");
        let mut raw = RawRamPacket {
            magic: MULTIFD_MAGIC.into(),
            version: MULTIFD_VERSION.into(),
            flags: self.flags.bits().into(),
            pages_alloc: be32_count(if count == 0 { 0 } else { pages }),
            normal_pages: be32_count(self.normal.len()),
            payload_len: self.payload_len.into(),
            packet_num: self.packet_num.into(),
            zero_pages: be32_count(self.zero.len()),
            _unused: [0; 28],
            block: [0; 256],
        };
        if let Some(block) = self.block {
            into_field(block.as_str(), &mut raw.block);
        }
        out.reserve(header_len(page));
        out.extend_from_slice(raw.as_bytes());
        let unused = std::iter::repeat_n(&0, pages.saturating_sub(count));
        for offset in self.normal.iter().chain(self.zero).chain(unused).take(pages) {
            out.extend_from_slice(&offset.to_be_bytes());
        }
    }
}

fn be32_count(count: usize) -> U32 {
    u32::try_from(count).unwrap_or(u32::MAX).into()
}
