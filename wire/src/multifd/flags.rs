use crate::{CodecId, Invalid};

/// Flags of a multifd packet; no unknown bit is set. Spec: docs/wire.md §7.3.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PacketFlags(u32);

const SYNC: u32 = 0x01;
const CODEC: u32 = CodecId::MASK as u32;
const DEVICE_STATE: u32 = 0x40;

impl PacketFlags {
    /// A packet that only marks a sync point. Its codec field is 0 whatever the codec is.
    pub const SYNC: Self = Self(SYNC);
    /// A packet of device state.
    pub(super) const DEVICE_STATE: Self = Self(DEVICE_STATE);

    /// A packet with pages.
    pub const fn pages(codec: CodecId) -> Self {
        Self(codec.value() as u32)
    }

    /// The 32-bit value on the wire.
    pub const fn bits(self) -> u32 {
        self.0
    }

    /// A sync point: the channel is read no further until the main channel says so.
    pub const fn sync(self) -> bool {
        self.0 & SYNC != 0
    }

    /// The codec field.
    pub const fn codec(self) -> CodecId {
        CodecId::of_flags(self.0)
    }

    /// The packet has the header of [`DeviceStatePacket`](crate::DeviceStatePacket).
    pub const fn device_state(self) -> bool {
        self.0 & DEVICE_STATE != 0
    }
}

impl TryFrom<u32> for PacketFlags {
    type Error = Invalid;

    fn try_from(bits: u32) -> Result<Self, Invalid> {
        let wrong = |expected| Err(Invalid::new("packet flags", format_args!("{bits:#x}"), expected));
        if bits & !(SYNC | CODEC | DEVICE_STATE) != 0 {
            return wrong("bits of 0x7f only");
        }
        if bits & DEVICE_STATE != 0 && bits != DEVICE_STATE {
            return wrong("DEVICE_STATE (0x40) alone");
        }
        Ok(Self(bits))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_bits_only_and_device_state_alone() {
        for bits in 0..0x200 {
            let good = bits <= 0x40;
            assert_eq!(PacketFlags::try_from(bits).is_ok(), good, "{bits:#x}");
        }
        assert!(PacketFlags::try_from(1 << 31).is_err());
        let flags = PacketFlags::try_from(0x05).unwrap();
        assert!(flags.sync() && flags.codec() == CodecId::ZSTD && !flags.device_state());
    }

    #[test]
    fn a_packet_with_pages_names_its_codec() {
        assert_eq!(PacketFlags::pages(CodecId::QATZIP).codec(), CodecId::QATZIP);
        assert_eq!(PacketFlags::pages(CodecId::QATZIP).bits(), 0x20);
    }
}
