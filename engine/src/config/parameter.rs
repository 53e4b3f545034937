//! QEMU's migration parameters, and those of this engine's own: the one table of their names,
//! ranges and defaults. Spec: docs/wire.md §22.
//!
//! Names are those of `migrate-set-parameters`. Ranges hold for this engine as well; defaults are
//! QEMU's, and where this engine has others its settings say so.

use std::fmt;
use std::ops::RangeInclusive;

use multifd_codecs::{ZlibLevel, ZstdLevel};

use crate::guest::PAGE;

/// A migration parameter of QEMU's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Parameter {
    /// A whole number.
    Number(Number),
    /// One of several words.
    Choice(Choice),
    /// On or off.
    Flag(Flag),
}

/// A parameter whose value is a whole number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Number {
    /// As `migrate-set-parameters` has it.
    pub name: &'static str,
    /// Least value.
    pub least: u64,
    /// Largest value.
    pub most: u64,
    /// QEMU's default.
    pub default: u64,
    /// Only powers of two within the range are valid.
    pub power_of_two: bool,
}

/// A parameter whose value is one of several words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Choice {
    /// As `migrate-set-parameters` has it.
    pub name: &'static str,
    /// Valid values: those that this engine knows, too.
    pub words: &'static [&'static str],
    /// QEMU's default.
    pub default: &'static str,
}

/// A parameter that is on or off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Flag {
    /// As `migrate-set-parameters` has it.
    pub name: &'static str,
    /// QEMU's default.
    pub default: bool,
}

/// A value that its parameter does not take.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{name} {value}, expected {expected}")]
pub struct OutOfRange {
    name: &'static str,
    value: u64,
    expected: String,
}

/// Guest bytes per second to expect at the switch-over; 0: what was measured.
pub const AVAIL_SWITCHOVER_BANDWIDTH: Number = number("avail-switchover-bandwidth", 0..=u64::MAX, 0);
/// Each further step of auto-converge, in percent of a vCPU's time.
pub const CPU_THROTTLE_INCREMENT: Number = number("cpu-throttle-increment", 1..=99, 10);
/// First step of auto-converge, in percent of a vCPU's time.
pub const CPU_THROTTLE_INITIAL: Number = number("cpu-throttle-initial", 1..=99, 20);
/// Smaller steps of auto-converge where they are enough.
pub const CPU_THROTTLE_TAILSLOW: Flag = Flag { name: "cpu-throttle-tailslow", default: false };
/// Pages are written to and read from a file past the page cache.
pub const DIRECT_IO: Flag = Flag { name: "direct-io", default: false };
/// Longest downtime, in ms.
pub const DOWNTIME_LIMIT: Number = number("downtime-limit", 0..=2_000_000, 300);
/// Bytes per second over all channels while the guest runs; 0: no limit.
pub const MAX_BANDWIDTH: Number = number("max-bandwidth", 0..=u64::MAX, 128 << 20);
/// Largest throttle of auto-converge, in percent of a vCPU's time; at least `cpu-throttle-initial`.
pub const MAX_CPU_THROTTLE: Number = number("max-cpu-throttle", 1..=99, 99);
/// Bytes per second of the background stream of a post-copy; 0: no limit.
pub const MAX_POSTCOPY_BANDWIDTH: Number = number("max-postcopy-bandwidth", 0..=u64::MAX, 0);
/// Bytes per second over all channels at the switch-over; 0: no limit. This engine's own: QEMU has
/// no limit there.
pub const MAX_SWITCHOVER_BANDWIDTH: Number = number("max-switchover-bandwidth", 0..=u64::MAX, 0);
/// Parallel channels; of a file with mapped-ram: threads.
pub const MULTIFD_CHANNELS: Number = number("multifd-channels", 1..=255, 2);
/// Codec of the parallel channels.
pub const MULTIFD_COMPRESSION: Choice =
    Choice { name: "multifd-compression", words: &["none", "zlib", "zstd"], default: "none" };
/// Level of codec zlib.
pub const MULTIFD_ZLIB_LEVEL: Number = number("multifd-zlib-level", 0..=ZlibLevel::MAX as u64, 1);
/// Level of codec zstd.
pub const MULTIFD_ZSTD_LEVEL: Number = number("multifd-zstd-level", 0..=ZstdLevel::MAX as u64, 1);
/// Dirty bytes in percent of sent bytes above which a period does not converge.
pub const THROTTLE_TRIGGER_THRESHOLD: Number = number("throttle-trigger-threshold", 1..=100, 50);
/// Size of the xbzrle cache, in bytes.
pub const XBZRLE_CACHE_SIZE: Number =
    Number { power_of_two: true, ..number("xbzrle-cache-size", PAGE as u64..=u64::MAX, 64 << 20) };
/// How zero pages are found and sent.
pub const ZERO_PAGE_DETECTION: Choice =
    Choice { name: "zero-page-detection", words: &["none", "legacy", "multifd"], default: "multifd" };

/// Every parameter above, by name.
pub const ALL: &[Parameter] = &[
    Parameter::Number(AVAIL_SWITCHOVER_BANDWIDTH),
    Parameter::Number(CPU_THROTTLE_INCREMENT),
    Parameter::Number(CPU_THROTTLE_INITIAL),
    Parameter::Flag(CPU_THROTTLE_TAILSLOW),
    Parameter::Flag(DIRECT_IO),
    Parameter::Number(DOWNTIME_LIMIT),
    Parameter::Number(MAX_BANDWIDTH),
    Parameter::Number(MAX_CPU_THROTTLE),
    Parameter::Number(MAX_POSTCOPY_BANDWIDTH),
    Parameter::Number(MAX_SWITCHOVER_BANDWIDTH),
    Parameter::Number(MULTIFD_CHANNELS),
    Parameter::Choice(MULTIFD_COMPRESSION),
    Parameter::Number(MULTIFD_ZLIB_LEVEL),
    Parameter::Number(MULTIFD_ZSTD_LEVEL),
    Parameter::Number(THROTTLE_TRIGGER_THRESHOLD),
    Parameter::Number(XBZRLE_CACHE_SIZE),
    Parameter::Choice(ZERO_PAGE_DETECTION),
];

const fn number(name: &'static str, range: RangeInclusive<u64>, default: u64) -> Number {
    Number { name, least: *range.start(), most: *range.end(), default, power_of_two: false }
}

impl Parameter {
    /// As `migrate-set-parameters` has it.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Number(number) => number.name,
            Self::Choice(choice) => choice.name,
            Self::Flag(flag) => flag.name,
        }
    }
}

impl Number {
    /// Checks a value.
    ///
    /// # Errors
    /// `value` is not valid for the parameter.
    pub fn check(&self, value: impl Into<u64>) -> Result<(), OutOfRange> {
        let value = value.into();
        let valid = (self.least..=self.most).contains(&value);
        if valid && (!self.power_of_two || value.is_power_of_two()) {
            return Ok(());
        }
        Err(OutOfRange { name: self.name, value, expected: self.to_string() })
    }

    /// The same parameter when another one asks for at least `least`.
    #[must_use]
    pub fn at_least(self, least: impl Into<u64>) -> Self {
        Self { least: least.into().max(self.least), ..self }
    }

    /// The valid value that is nearest to `value`, of a parameter whose whole range is valid.
    pub fn nearest(&self, value: u64) -> u64 {
        value.clamp(self.least, self.most)
    }
}

/// The valid values: `1..=255`, `a power of two, at least 4096`.
impl fmt::Display for Number {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.power_of_two {
            f.write_str("a power of two, ")?;
        }
        match self.most {
            u64::MAX => write!(f, "at least {}", self.least),
            most => write!(f, "{}..={most}", self.least),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_out_of_range_is_named_with_what_was_expected() {
        let says = |number: Number, value: u64| number.check(value).unwrap_err().to_string();
        assert_eq!(says(MULTIFD_CHANNELS, 256), "multifd-channels 256, expected 1..=255");
        assert_eq!(says(MULTIFD_CHANNELS, 0), "multifd-channels 0, expected 1..=255");
        let cache = "xbzrle-cache-size 5000, expected a power of two, at least 4096";
        assert_eq!(says(XBZRLE_CACHE_SIZE, 5000), cache);
        assert!(XBZRLE_CACHE_SIZE.check(2048_u64).is_err());
        assert_eq!(says(MAX_CPU_THROTTLE.at_least(20_u64), 10), "max-cpu-throttle 10, expected 20..=99");
    }

    #[test]
    fn every_default_is_valid_and_every_name_is_there_once() {
        for parameter in ALL {
            match parameter {
                Parameter::Number(number) => assert_eq!(number.check(number.default), Ok(())),
                Parameter::Choice(choice) => assert!(choice.words.contains(&choice.default)),
                Parameter::Flag(flag) => assert!(!flag.default, "QEMU has all of them off"),
            }
        }
        let names: Vec<_> = ALL.iter().map(Parameter::name).collect();
        assert!(names.is_sorted_by(|a, b| a < b), "{names:?}");
    }

    #[test]
    fn levels_are_those_of_the_codecs() {
        assert_eq!(MULTIFD_ZLIB_LEVEL.default, u64::from(ZlibLevel::default().value()));
        assert_eq!(MULTIFD_ZSTD_LEVEL.default, u64::from(ZstdLevel::default().value()));
        assert_eq!(DOWNTIME_LIMIT.nearest(3_000_000), 2_000_000);
    }
}
