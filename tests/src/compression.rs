//! Codecs of multifd channels, by the names that both programs have for them.

use std::fmt;
use std::str::FromStr;

use crate::{Failure, Outcome};

/// How the packets of multifd channels are compressed.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Compression {
    /// Not at all.
    #[default]
    None,
    /// zlib at this level, 0..=9.
    Zlib(u8),
    /// zstd at this level, 0..=20.
    Zstd(u8),
}

impl Compression {
    /// QEMU's name of it.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Zlib(_) => "zlib",
            Self::Zstd(_) => "zstd",
        }
    }
}

/// As our `--codec` takes it.
impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.pad(self.name()),
            Self::Zlib(level) | Self::Zstd(level) => f.pad(&format!("{}:{level}", self.name())),
        }
    }
}

/// With its level, as it is displayed.
impl FromStr for Compression {
    type Err = Failure;

    fn from_str(text: &str) -> Outcome<Self> {
        let (name, level) = text.split_once(':').unwrap_or((text, ""));
        match (name, level.parse()) {
            ("none", _) if level.is_empty() => Ok(Self::None),
            ("zlib", Ok(level)) => Ok(Self::Zlib(level)),
            ("zstd", Ok(level)) => Ok(Self::Zstd(level)),
            _ => Err(Failure::new(format!("{text:?} is no codec with its level"))),
        }
    }
}
