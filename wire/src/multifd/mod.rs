//! What travels on the multifd channels. Spec: docs/wire.md §7 and §10.

mod checks;
mod codec_id;
mod device_state;
mod flags;
mod initial;
mod packet;

use zerocopy::big_endian::U32;

pub use checks::{PacketChecks, codec_stream, put_codec_stream};
pub use codec_id::CodecId;
pub use device_state::{DeviceStatePacket, MAX_DEVICE_STATE_PAYLOAD};
pub use flags::PacketFlags;
pub use initial::InitialPacket;
pub use packet::{
    MAX_PAYLOAD, PACKET_PREFIX_LEN, PacketKind, RamPacket, RamPacketHeader, header_len, pages_per_packet,
};

use crate::Invalid;
use crate::stream::check_magic;

/// First word of every packet on a multifd channel. Spec: docs/wire.md §7.1.
pub const MULTIFD_MAGIC: u32 = 0x1122_3344;
/// Version of all multifd packets.
const MULTIFD_VERSION: u32 = 1;

/// Checks the two words that begin every packet.
fn check_start(magic: U32, version: U32) -> Result<(), Invalid> {
    check_magic("multifd magic", magic, MULTIFD_MAGIC)?;
    match version.get() {
        MULTIFD_VERSION => Ok(()),
        seen => Err(Invalid::new("multifd version", seen, MULTIFD_VERSION)),
    }
}
