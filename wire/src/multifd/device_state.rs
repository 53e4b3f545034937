use zerocopy::big_endian::U32;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned, transmute, transmute_ref};

use super::{MULTIFD_MAGIC, MULTIFD_VERSION, PacketFlags, check_start};
use crate::Invalid;
use crate::names::{from_field, into_field};

/// Header of a packet that carries opaque state of one device. Spec: docs/wire.md §10.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceStatePacket {
    /// Name of the device's section, 1..=255 bytes.
    pub idstr: String,
    /// Tells devices of the same name apart.
    pub instance_id: u32,
    /// Bytes that follow: 1..=[`MAX_DEVICE_STATE_PAYLOAD`].
    pub payload_len: u32,
}

/// Most bytes of device state in one packet: 64 MiB, where VFIO sends pieces of about 1 MiB.
pub const MAX_DEVICE_STATE_PAYLOAD: u32 = 64 << 20;

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawDeviceStatePacket {
    magic: U32,
    version: U32,
    flags: U32,
    idstr: [u8; 256],
    instance_id: U32,
    payload_len: U32,
}
const _: () = assert!(size_of::<RawDeviceStatePacket>() == DeviceStatePacket::LEN);

impl DeviceStatePacket {
    /// Bytes on the wire, without the payload.
    pub const LEN: usize = 276;

    /// # Errors
    /// Another magic or version, flags other than DEVICE_STATE, a malformed name, or a length out
    /// of its range.
    pub fn parse(buf: &[u8; Self::LEN]) -> Result<Self, Invalid> {
        let raw: &RawDeviceStatePacket = transmute_ref!(buf);
        check_start(raw.magic, raw.version)?;
        if !PacketFlags::try_from(raw.flags.get())?.device_state() {
            return Err(Invalid::new(
                "packet flags",
                format_args!("{:#x}", raw.flags),
                "DEVICE_STATE (0x40)",
            ));
        }
        let idstr = from_field("device name", &raw.idstr)?.to_owned();
        let payload_len = raw.payload_len.get();
        if !(1..=MAX_DEVICE_STATE_PAYLOAD).contains(&payload_len) {
            let expected = format!("1..={MAX_DEVICE_STATE_PAYLOAD} bytes");
            return Err(Invalid::new("device state payload", payload_len, expected));
        }
        Ok(Self { idstr, instance_id: raw.instance_id.get(), payload_len })
    }

    /// The header's bytes.
    pub fn encode(&self) -> [u8; Self::LEN] {
        let mut raw = RawDeviceStatePacket {
            magic: MULTIFD_MAGIC.into(),
            version: MULTIFD_VERSION.into(),
            flags: PacketFlags::DEVICE_STATE.bits().into(),
            idstr: [0; 256],
            instance_id: self.instance_id.into(),
            payload_len: self.payload_len.into(),
        };
        into_field(&self.idstr, &mut raw.idstr);
        transmute!(raw)
    }
}
