//! Compression levels that cannot be wrong.

/// A compression level that the codec does not have.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("{codec} level {level}, range is {min}..={max}")]
pub struct LevelOutOfRange {
    codec: &'static str,
    level: i32,
    min: u8,
    max: u8,
}

/// Level of the zlib codec, 0..=9: 0 stores, 1 is fastest, 9 is smallest. Default 1, as in QEMU.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct ZlibLevel(u8);

impl ZlibLevel {
    /// Largest level.
    pub const MAX: u8 = 9;

    /// Takes a level.
    ///
    /// # Errors
    /// `level` is not in 0..=9.
    pub fn new(level: impl Into<i32>) -> Result<Self, LevelOutOfRange> {
        checked("zlib", level.into(), Self::MAX).map(Self)
    }

    /// A level that the compiler checks.
    pub const fn at<const LEVEL: u8>() -> Self {
        const { assert!(LEVEL <= Self::MAX, "the codec has no such level") };
        Self(LEVEL)
    }

    /// The level, 0..=9.
    pub const fn value(self) -> u8 {
        self.0
    }
}

impl Default for ZlibLevel {
    fn default() -> Self {
        Self(1)
    }
}

/// Level of the zstd codec, 0..=20: 1 is fastest, 20 is smallest, 0 is the library's own choice
/// (3). Default 1, as in QEMU, whose range this is. For the memory that a level costs see
/// [`Zstd`](crate::Zstd).
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct ZstdLevel(u8);

impl ZstdLevel {
    /// Largest level.
    pub const MAX: u8 = 20;

    /// Takes a level.
    ///
    /// # Errors
    /// `level` is not in 0..=20.
    pub fn new(level: impl Into<i32>) -> Result<Self, LevelOutOfRange> {
        checked("zstd", level.into(), Self::MAX).map(Self)
    }

    /// A level that the compiler checks.
    pub const fn at<const LEVEL: u8>() -> Self {
        const { assert!(LEVEL <= Self::MAX, "the codec has no such level") };
        Self(LEVEL)
    }

    /// The level, 0..=20.
    pub const fn value(self) -> u8 {
        self.0
    }
}

impl Default for ZstdLevel {
    fn default() -> Self {
        Self(1)
    }
}

fn checked(codec: &'static str, level: i32, max: u8) -> Result<u8, LevelOutOfRange> {
    u8::try_from(level).ok().filter(|&level| level <= max).ok_or(LevelOutOfRange {
        codec,
        level,
        min: 0,
        max,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_end_at_their_limits() {
        assert_eq!(ZlibLevel::new(0).unwrap().value(), 0);
        assert_eq!(ZlibLevel::new(9u8).unwrap().value(), 9);
        assert_eq!(ZstdLevel::new(0).unwrap().value(), 0);
        assert_eq!(ZstdLevel::new(20u8).unwrap().value(), 20);
        assert_eq!(ZlibLevel::new(10).unwrap_err().to_string(), "zlib level 10, range is 0..=9");
        assert_eq!(ZstdLevel::new(21).unwrap_err().to_string(), "zstd level 21, range is 0..=20");
        assert_eq!(ZstdLevel::new(-1).unwrap_err().to_string(), "zstd level -1, range is 0..=20");
        assert!(ZlibLevel::new(257).is_err(), "must not wrap round to 1");
    }

    #[test]
    fn defaults_are_those_of_qemu() {
        assert_eq!(ZlibLevel::default().value(), 1);
        assert_eq!(ZstdLevel::default().value(), 1);
    }
}
