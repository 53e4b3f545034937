use zerocopy::big_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::Invalid;

/// Checksums of a RAM packet between two multifd ends, in bytes of its header that QEMU sends as 0
/// and does not look at. Spec: docs/wire.md §27.7.
///
/// What hashes is the caller's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PacketChecks {
    /// Of what follows the header.
    pub content: u64,
    /// Of the header, in which this field counts as 0.
    header: u64,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawChecks {
    _before: [u8; 36],
    flags: U32,
    content: U64,
    header: U64,
    stream: u8,
}

/// The packet has checksums.
const CHECKED: u32 = 1;

impl PacketChecks {
    /// Adds checksums to an encoded header.
    ///
    /// # Errors
    /// It is shorter than any header.
    pub fn seal(header: &mut [u8], content: u64, hash: impl Fn(&[u8]) -> u64) -> Result<(), Invalid> {
        let fields = fields(header)?;
        fields.flags = CHECKED.into();
        fields.content = content.into();
        fields.header = 0.into();
        let own = hash(header);
        self::fields(header)?.header = own.into();
        Ok(())
    }

    /// The checksums of a received header, if it has any, after a look at its own.
    ///
    /// # Errors
    /// The header is not what its checksum is of, or shorter than any header.
    pub fn open(header: &mut [u8], hash: impl Fn(&[u8]) -> u64) -> Result<Option<Self>, Invalid> {
        let fields = fields(header)?;
        if fields.flags.get() & CHECKED == 0 {
            return Ok(None);
        }
        let checks = Self { content: fields.content.get(), header: fields.header.get() };
        fields.header = 0.into();
        let seen = hash(header);
        self::fields(header)?.header = checks.header.into();
        if seen == checks.header {
            return Ok(Some(checks));
        }
        let expected = format!("{:#018x}, which it came with", checks.header);
        Err(Invalid::new("checksum of a packet's header", format_args!("{seen:#018x}"), expected))
    }
}

/// Says in an encoded header, which is not sealed yet, to which of several streams of its codec the
/// payload belongs. Spec: docs/wire.md §27.9.
///
/// # Errors
/// It is shorter than any header.
pub fn put_codec_stream(header: &mut [u8], stream: u8) -> Result<(), Invalid> {
    fields(header)?.stream = stream;
    Ok(())
}

/// To which of several streams of its codec the payload behind this header belongs: 0 where there
/// is one.
///
/// # Errors
/// It is shorter than any header.
pub fn codec_stream(header: &mut [u8]) -> Result<u8, Invalid> {
    Ok(fields(header)?.stream)
}

fn fields(header: &mut [u8]) -> Result<&mut RawChecks, Invalid> {
    let len = header.len();
    let fields = RawChecks::mut_from_prefix(header).map(|(fields, _)| fields);
    fields.map_err(|_| Invalid::new("packet header", format_args!("{len} bytes"), size_of::<RawChecks>()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{BlockName, CodecId, PacketFlags, PageSize, RamPacket, RamPacketHeader};

    /// Not a good hash, but it sees every bit.
    fn hash(bytes: &[u8]) -> u64 {
        bytes.iter().fold(7, |hash: u64, byte| hash.rotate_left(5).wrapping_mul(31) ^ u64::from(*byte))
    }

    fn packet() -> Vec<u8> {
        let block = BlockName::try_from("pc.ram").unwrap();
        let mut header = Vec::new();
        RamPacketHeader {
            flags: PacketFlags::pages(CodecId::ZSTD),
            packet_num: 9,
            block: Some(&block),
            normal: &[0x1000],
            zero: &[0x3000],
            payload_len: 100,
        }
        .encode(PageSize::K4, &mut header);
        header
    }

    #[test]
    fn a_packet_without_checksums_has_none_and_a_sealed_one_parses_as_before() {
        let mut header = packet();
        assert_eq!(PacketChecks::open(&mut header, hash).unwrap(), None);
        PacketChecks::seal(&mut header, 0x0123_4567_89ab_cdef, hash).unwrap();
        let checks = PacketChecks::open(&mut header, hash).unwrap().unwrap();
        assert_eq!(checks.content, 0x0123_4567_89ab_cdef);
        let packet = RamPacket::parse(&header, PageSize::K4).unwrap();
        assert_eq!((packet.packet_num(), packet.block()), (9, Some("pc.ram")));
    }

    #[test]
    fn any_bit_of_a_sealed_header_that_flips_is_seen_but_for_the_flag_itself() {
        let mut sealed = packet();
        PacketChecks::seal(&mut sealed, 5, hash).unwrap();
        for bit in 0..sealed.len() * 8 {
            let mut flipped = sealed.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            let opened = PacketChecks::open(&mut flipped, hash);
            // The flag is the lowest bit of the four bytes from 36 on.
            if bit == 39 * 8 {
                assert_eq!(opened.unwrap(), None);
            } else {
                assert!(opened.is_err(), "bit {bit}");
            }
        }
    }

    #[test]
    fn a_header_says_the_stream_of_its_codec_and_is_sealed_with_it() {
        let mut header = packet();
        assert_eq!(codec_stream(&mut header).unwrap(), 0);
        put_codec_stream(&mut header, 3).unwrap();
        PacketChecks::seal(&mut header, 5, hash).unwrap();
        assert_eq!((header[56], codec_stream(&mut header).unwrap()), (3, 3));
        put_codec_stream(&mut header, 2).unwrap();
        assert!(PacketChecks::open(&mut header, hash).is_err());
    }

    #[test]
    fn what_is_shorter_than_a_header_is_refused() {
        for len in [0, 35, 56] {
            assert!(PacketChecks::open(&mut vec![0; len], hash).is_err());
            assert!(PacketChecks::seal(&mut vec![0; len], 0, hash).is_err());
        }
    }
}
