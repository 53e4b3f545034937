use crate::Invalid;

/// Size of a target page: a power of two from 4096 to 65536 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PageSize(u32);

impl PageSize {
    /// 4 KiB, the target page of x86.
    pub const K4: Self = Self(4096);

    /// # Errors
    /// `bytes` is not a power of two from 4096 to 65536.
    pub fn new(bytes: u32) -> Result<Self, Invalid> {
        if bytes.is_power_of_two() && (1 << 12..=1 << 16).contains(&bytes) {
            Ok(Self(bytes))
        } else {
            Err(Invalid::new("target page size", bytes, "a power of two in 4096..=65536"))
        }
    }

    /// The page of `1 << bits` bytes.
    ///
    /// # Errors
    /// `bits` is not in 12..=16.
    pub fn from_bits(bits: u32) -> Result<Self, Invalid> {
        match bits {
            12..=16 => Ok(Self(1 << bits)),
            _ => Err(Invalid::new("target page bits", bits, "12..=16")),
        }
    }

    /// Bytes in a page.
    pub const fn bytes(self) -> usize {
        self.0 as usize
    }

    /// Bytes in a page, as an offset.
    pub const fn bytes_u64(self) -> u64 {
        self.0 as u64
    }

    /// Base-two logarithm of the size: 12..=16.
    pub const fn bits(self) -> u32 {
        self.0.trailing_zeros()
    }

    /// Is `offset` a multiple of the page size?
    pub const fn aligns(self, offset: u64) -> bool {
        offset & self.offset_mask() == 0
    }

    /// The bits of an offset that lie inside a page.
    pub(crate) const fn offset_mask(self) -> u64 {
        self.bytes_u64() - 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn powers_of_two_within_limits_only() {
        for (bytes, good) in [
            (0, false),
            (2048, false),
            (4096, true),
            (4097, false),
            (12288, false),
            (65536, true),
            (1 << 17, false),
        ] {
            assert_eq!(PageSize::new(bytes).is_ok(), good, "{bytes}");
        }
        for bits in 0..40 {
            assert_eq!(PageSize::from_bits(bits).is_ok(), (12..=16).contains(&bits));
        }
        assert_eq!(PageSize::from_bits(14).unwrap().bits(), 14);
        assert!(PageSize::K4.aligns(8192) && !PageSize::K4.aligns(8193));
    }
}
