use std::fmt::{self, Debug, Display};

/// A codec as packets name it: the value of bits 1..=5 of the packet flags, in place (docs/wire.md
/// §7.3).
///
/// | ids | belong to |
/// | --- | --- |
/// | 0, and one bit: 0x02, 0x04, 0x08, 0x10, 0x20 | QEMU's codecs |
/// | several bits, below 0x18 | multifd's own dialect ([`CodecId::is_reserved`]) |
/// | several bits, 0x18 to 0x3e | any two multifd ends that agree on a codec of their own |
#[derive(Clone, Copy, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct CodecId(u8);

impl CodecId {
    /// The bits that a codec id may have.
    pub const MASK: u8 = 0x3e;
    /// Pages as they are.
    pub const NONE: Self = Self(0x00);
    /// One continuous zlib stream per channel.
    pub const ZLIB: Self = Self(0x02);
    /// One continuous zstd frame per channel.
    pub const ZSTD: Self = Self(0x04);
    /// The dialect's xbzrle packets; not a codec of a migration (docs/wire.md §27.2).
    pub const DIALECT_DELTA: Self = Self(0x06);
    /// The dialect's lz4: each packet is a block of its own (docs/wire.md §27.9).
    pub const DIALECT_LZ4: Self = Self(0x0a);
    /// Intel QPL: QEMU's, not implemented here.
    pub const QPL: Self = Self(0x08);
    /// UADK: QEMU's, not implemented here.
    pub const UADK: Self = Self(0x10);
    /// QATzip: QEMU's, not implemented here.
    pub const QATZIP: Self = Self(0x20);

    /// The first id that an embedder's own codec may have.
    pub const FIRST_OWN: Self = Self(0x18);

    /// Takes the value of the codec field, `None` if it has bits outside of [`MASK`](Self::MASK).
    pub const fn new(value: u8) -> Option<Self> {
        if value & !Self::MASK == 0 { Some(Self(value)) } else { None }
    }

    /// The codec field of a packet's flags.
    pub(super) const fn of_flags(flags: u32) -> Self {
        Self(flags.to_be_bytes()[3] & Self::MASK)
    }

    /// The value of the codec field.
    pub const fn value(self) -> u8 {
        self.0
    }

    /// True for the ids of multifd's dialect, present and to come: no codec of an embedder's own
    /// may have one, since the other end takes packets with such an id for what the dialect says
    /// they are.
    pub const fn is_reserved(self) -> bool {
        self.0.count_ones() > 1 && self.0 < Self::FIRST_OWN.0
    }

    /// QEMU's name for it, if it has one.
    pub const fn name(self) -> Option<&'static str> {
        Some(match self {
            Self::NONE => "none",
            Self::ZLIB => "zlib",
            Self::ZSTD => "zstd",
            Self::QPL => "qpl",
            Self::UADK => "uadk",
            Self::QATZIP => "qatzip",
            _ => return None,
        })
    }
}

impl Display for CodecId {
    /// `zstd`, or `0x18` for a value without a name.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.write_str(name),
            None => write!(f, "{:#04x}", self.0),
        }
    }
}

impl Debug for CodecId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CodecId({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_the_five_bits_of_the_flags() {
        for value in 0..=u8::MAX {
            let legal = value & 1 == 0 && value < 0x40;
            assert_eq!(CodecId::new(value).map(CodecId::value), legal.then_some(value));
        }
    }

    #[test]
    fn ids_read_like_qemus_names() {
        assert_eq!(CodecId::ZSTD.to_string(), "zstd");
        assert_eq!(CodecId::QATZIP.to_string(), "qatzip");
        assert_eq!(CodecId::new(0x18).unwrap().to_string(), "0x18");
        assert_eq!(format!("{:?}", CodecId::NONE), "CodecId(none)");
    }

    #[test]
    fn the_dialect_has_the_lower_ids_of_several_bits() {
        let reserved: Vec<u8> =
            (0..0x40).filter(|value| CodecId::new(*value).is_some_and(CodecId::is_reserved)).collect();
        assert_eq!(reserved, [0x06, 0x0a, 0x0c, 0x0e, 0x12, 0x14, 0x16]);
        assert!(CodecId::DIALECT_LZ4.is_reserved());
        assert!(CodecId::DIALECT_DELTA.is_reserved() && !CodecId::FIRST_OWN.is_reserved());
    }
}
