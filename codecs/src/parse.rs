//! Codecs as people write them: `zstd:3`.

use std::str::FromStr;
use std::sync::Arc;

use crate::choice::CodecChoice;
use crate::codec::Codec;
use crate::level::LevelOutOfRange;
#[cfg(feature = "zlib")]
use crate::level::ZlibLevel;
#[cfg(feature = "zstd")]
use crate::level::ZstdLevel;

/// Reads `none`, `lz4`, `zlib`, `zlib:LEVEL`, `zstd` or `zstd:LEVEL`, those that the crate was
/// built with.
///
/// # Errors
/// Anything else; the error repeats `text` and the grammar or the range.
pub fn parse_codec(text: &str) -> Result<Arc<dyn Codec>, InvalidCodec> {
    text.parse::<CodecChoice>().map(CodecChoice::codec)
}

impl FromStr for CodecChoice {
    type Err = InvalidCodec;

    /// Reads `none`, `lz4`, `zlib`, `zlib:LEVEL`, `zstd` or `zstd:LEVEL`; the level without one is
    /// QEMU's.
    fn from_str(text: &str) -> Result<Self, InvalidCodec> {
        let invalid = |source| InvalidCodec { text: text.to_owned(), source };
        let (name, level) = match text.split_once(':') {
            Some((name, level)) => (name, Some(level)),
            None => (text, None),
        };
        let level = level.map(decimal).transpose().map_err(|()| invalid(None))?;
        match (name, level) {
            ("none", None) => Ok(Self::None),
            #[cfg(feature = "lz4")]
            ("lz4", None) => Ok(Self::Lz4),
            #[cfg(feature = "zlib")]
            ("zlib", None) => Ok(Self::Zlib(ZlibLevel::default())),
            #[cfg(feature = "zlib")]
            ("zlib", Some(level)) => Ok(Self::Zlib(ZlibLevel::new(level).map_err(|e| invalid(Some(e)))?)),
            #[cfg(feature = "zstd")]
            ("zstd", None) => Ok(Self::Zstd(ZstdLevel::default())),
            #[cfg(feature = "zstd")]
            ("zstd", Some(level)) => Ok(Self::Zstd(ZstdLevel::new(level).map_err(|e| invalid(Some(e)))?)),
            _ => Err(invalid(None)),
        }
    }
}

/// Text that names no codec.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("codec {text:?}, expected {GRAMMAR}")]
pub struct InvalidCodec {
    text: String,
    source: Option<LevelOutOfRange>,
}

/// What this build can read.
const GRAMMAR: &str = match (cfg!(feature = "lz4"), cfg!(feature = "zlib"), cfg!(feature = "zstd")) {
    (true, true, true) => "none, lz4, zlib[:0..9] or zstd[:0..20]",
    (true, true, false) => "none, lz4 or zlib[:0..9] (this build has no zstd)",
    (true, false, true) => "none, lz4 or zstd[:0..20] (this build has no zlib)",
    (true, false, false) => "none or lz4 (this build has neither zlib nor zstd)",
    (false, true, true) => "none, zlib[:0..9] or zstd[:0..20] (this build has no lz4)",
    (false, true, false) => "none or zlib[:0..9] (this build has neither lz4 nor zstd)",
    (false, false, true) => "none or zstd[:0..20] (this build has neither lz4 nor zlib)",
    (false, false, false) => "none (this build has no other codec)",
};

/// Digits only: `"+3".parse::<i32>()` would be 3.
fn decimal(digits: &str) -> Result<i32, ()> {
    if !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(());
    }
    digits.parse().map_err(|_| ())
}

#[cfg(test)]
#[cfg(all(feature = "lz4", feature = "zlib", feature = "zstd"))]
mod tests {
    use std::error::Error;

    use super::*;

    #[test]
    fn names_and_levels_come_back() {
        for (text, meaning) in [
            ("none", "none"),
            ("lz4", "lz4"),
            #[cfg(feature = "zlib")]
            ("zlib", "zlib:1"),
            ("zlib:0", "zlib:0"),
            ("zlib:9", "zlib:9"),
            #[cfg(feature = "zstd")]
            ("zstd", "zstd:1"),
            ("zstd:0", "zstd:0"),
            ("zstd:3", "zstd:3"),
            ("zstd:20", "zstd:20"),
        ] {
            assert_eq!(parse_codec(text).unwrap().describe(), meaning);
        }
    }

    #[test]
    fn nothing_else_is_a_codec() {
        for text in [
            "",
            ":",
            "zstd:",
            "zstd:x",
            "zstd:+3",
            "zstd:-1",
            "zstd: 3",
            "zstd:3:4",
            "ZSTD",
            " zstd",
            "none:0",
            "lz4:1",
            "zlib:99999999999",
        ] {
            let error = parse_codec(text).unwrap_err();
            assert_eq!(
                error.to_string(),
                format!("codec {text:?}, expected none, lz4, zlib[:0..9] or zstd[:0..20]")
            );
            assert!(error.source().is_none());
        }
    }

    #[test]
    fn a_level_out_of_range_says_the_range() {
        let error = parse_codec("zlib:10").unwrap_err();
        assert_eq!(error.to_string(), "codec \"zlib:10\", expected none, lz4, zlib[:0..9] or zstd[:0..20]");
        assert_eq!(error.source().unwrap().to_string(), "zlib level 10, range is 0..=9");
        assert!(parse_codec("zstd:21").unwrap_err().source().is_some());
    }
}
