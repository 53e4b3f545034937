//! Built-in codecs as values: `zstd:3`.

use std::fmt;
use std::sync::Arc;

use crate::codec::Codec;
#[cfg(feature = "zlib")]
use crate::level::ZlibLevel;
#[cfg(feature = "zstd")]
use crate::level::ZstdLevel;
#[cfg(feature = "lz4")]
use crate::lz4::Lz4;
use crate::uncompressed::Uncompressed;
#[cfg(feature = "zlib")]
use crate::zlib::Zlib;
#[cfg(feature = "zstd")]
use crate::zstd::Zstd;

/// A codec that this build has, and its level. Text, and with feature `serde` serialised form:
/// `none`, `zlib:1`, `zstd:3`.
///
/// Ordered by family, then by level.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
#[non_exhaustive]
pub enum CodecChoice {
    /// No compression.
    None,
    /// lz4, towards another multifd.
    #[cfg(feature = "lz4")]
    Lz4,
    /// zlib at a level.
    #[cfg(feature = "zlib")]
    Zlib(ZlibLevel),
    /// zstd at a level.
    #[cfg(feature = "zstd")]
    Zstd(ZstdLevel),
}

/// What the levels of a codec have in common: the compression method.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
#[non_exhaustive]
pub enum CodecFamily {
    /// No compression.
    None,
    /// lz4, which has no levels.
    Lz4,
    /// zlib, at any level.
    Zlib,
    /// zstd, at any level.
    Zstd,
}

impl CodecChoice {
    /// zlib at a level that the compiler checks: `CodecChoice::zlib::<6>()`.
    #[cfg(feature = "zlib")]
    pub const fn zlib<const LEVEL: u8>() -> Self {
        Self::Zlib(ZlibLevel::at::<LEVEL>())
    }

    /// zstd at a level that the compiler checks: `CodecChoice::zstd::<3>()`.
    #[cfg(feature = "zstd")]
    pub const fn zstd<const LEVEL: u8>() -> Self {
        Self::Zstd(ZstdLevel::at::<LEVEL>())
    }

    /// The compression method.
    pub const fn family(self) -> CodecFamily {
        match self {
            Self::None => CodecFamily::None,
            #[cfg(feature = "lz4")]
            Self::Lz4 => CodecFamily::Lz4,
            #[cfg(feature = "zlib")]
            Self::Zlib(_) => CodecFamily::Zlib,
            #[cfg(feature = "zstd")]
            Self::Zstd(_) => CodecFamily::Zstd,
        }
    }

    /// The level, where the method has levels.
    pub const fn level(self) -> Option<u8> {
        match self {
            Self::None => None,
            #[cfg(feature = "lz4")]
            Self::Lz4 => None,
            #[cfg(feature = "zlib")]
            Self::Zlib(level) => Some(level.value()),
            #[cfg(feature = "zstd")]
            Self::Zstd(level) => Some(level.value()),
        }
    }

    /// The codec itself.
    pub fn codec(self) -> Arc<dyn Codec> {
        match self {
            Self::None => Arc::new(Uncompressed),
            #[cfg(feature = "lz4")]
            Self::Lz4 => Arc::new(Lz4),
            #[cfg(feature = "zlib")]
            Self::Zlib(level) => Arc::new(Zlib::from(level)),
            #[cfg(feature = "zstd")]
            Self::Zstd(level) => Arc::new(Zstd::from(level)),
        }
    }
}

impl CodecFamily {
    /// The name, as in `multifd-compression`: `none`, `zlib`, `zstd`; and `lz4`, which QEMU has
    /// not.
    pub const fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Lz4 => "lz4",
            Self::Zlib => "zlib",
            Self::Zstd => "zstd",
        }
    }
}

impl fmt::Display for CodecChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.level() {
            None => f.pad(self.family().name()),
            Some(level) => f.pad(&format!("{}:{level}", self.family())),
        }
    }
}

impl fmt::Display for CodecFamily {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

#[cfg(feature = "serde")]
impl serde::Serialize for CodecChoice {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

#[cfg(feature = "serde")]
impl<'de> serde::Deserialize<'de> for CodecChoice {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = <String as serde::Deserialize>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
#[cfg(all(feature = "lz4", feature = "zlib", feature = "zstd"))]
mod tests {
    use super::*;

    #[test]
    fn a_choice_says_what_its_codec_says() {
        for choice in
            [CodecChoice::None, CodecChoice::Lz4, CodecChoice::zlib::<0>(), CodecChoice::zstd::<20>()]
        {
            assert_eq!(choice.codec().describe(), choice.to_string());
            assert_eq!(choice.codec().name(), choice.family().name());
            assert_eq!(choice.to_string().parse(), Ok(choice));
        }
    }

    #[test]
    fn choices_are_in_the_order_of_families_and_levels() {
        let rising = [
            CodecChoice::None,
            CodecChoice::Lz4,
            CodecChoice::zlib::<2>(),
            CodecChoice::zlib::<9>(),
            CodecChoice::zstd::<1>(),
            CodecChoice::zstd::<10>(),
        ];
        assert!(rising.is_sorted());
    }

    #[test]
    fn a_width_is_kept() {
        assert_eq!(format!("{:<8}|", CodecChoice::zstd::<3>()), "zstd:3  |");
    }
}
