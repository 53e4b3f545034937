use zerocopy::big_endian::U32;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned, transmute, transmute_ref};

use super::{MULTIFD_MAGIC, MULTIFD_VERSION, check_start};
use crate::Invalid;

/// First packet on every multifd channel: the source's uuid, and the channel's number. Spec:
/// docs/wire.md §7.1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InitialPacket {
    /// The source VM's uuid; zeros if it has none.
    pub uuid: [u8; 16],
    /// Number of the channel, from 0. Whether it is below the number of channels is for the caller
    /// to say.
    pub channel: u8,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawInitialPacket {
    magic: U32,
    version: U32,
    uuid: [u8; 16],
    channel: u8,
    /// Sent 0, not looked at.
    _unused: [u8; 39],
}
const _: () = assert!(size_of::<RawInitialPacket>() == InitialPacket::LEN);

impl InitialPacket {
    /// Bytes on the wire.
    pub const LEN: usize = 64;

    /// # Errors
    /// Another magic or version.
    pub fn parse(buf: &[u8; Self::LEN]) -> Result<Self, Invalid> {
        let raw: &RawInitialPacket = transmute_ref!(buf);
        check_start(raw.magic, raw.version)?;
        Ok(Self { uuid: raw.uuid, channel: raw.channel })
    }

    /// The packet's bytes.
    pub fn encode(&self) -> [u8; Self::LEN] {
        transmute!(RawInitialPacket {
            magic: MULTIFD_MAGIC.into(),
            version: MULTIFD_VERSION.into(),
            uuid: self.uuid,
            channel: self.channel,
            _unused: [0; 39],
        })
    }
}
