//! Numbers as people write and read them.

use std::fmt::Display;
use std::num::NonZeroU64;
use std::time::Duration;

use multifd_engine::parameter;
use multifd_tune::Link;
pub(crate) use multifd_tune::show_bytes;

use crate::flags::Rate;

/// Prints a line for the user. A terminal that is gone, as after a dropped ssh, does not make the
/// command fail.
pub(crate) fn tell(text: impl Display) {
    use std::io::Write;
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// The text with control characters written out, `\u{1b}`: names that a peer chose, or what a
/// command said, must not steer a terminal or begin a line of their own.
pub(crate) fn visible(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            c if c.is_control() || ('\u{202a}'..='\u{202e}').contains(&c) => out.extend(c.escape_default()),
            c => out.push(c),
        }
    }
    out
}

const RATE_GRAMMAR: &str =
    "NUMBER with K, M, G, T (times 1024), KB.. (times 1000), KiB.., or kbit, Mbit, Gbit, then /s if you like";
const SIZE_GRAMMAR: &str = "NUMBER with K, M, G, T or KiB.. (times 1024), KB.. (times 1000)";
const DURATION_GRAMMAR: &str = "NUMBER with us, ms, s, m or h";

/// `1Gbit/s`, `100MiB/s`, `512K`; 0: unlimited.
pub(crate) fn rate(text: &str) -> Result<Rate, String> {
    let unit = |unit: &str| {
        let unit = unit.strip_suffix("/s").or_else(|| unit.strip_suffix("ps")).unwrap_or(unit);
        bits(unit).or_else(|| bytes(unit))
    };
    scaled(text, unit)
        .map(|rate| Rate(NonZeroU64::new(rate)))
        .ok_or_else(|| format!("{text:?}: {RATE_GRAMMAR}"))
}

/// `1Gbit/s`, `loopback`; not 0.
pub(crate) fn link(text: &str) -> Result<Link, String> {
    let name = text.to_owned();
    if text == "loopback" {
        return Ok(Link { name, rate: None });
    }
    match rate(text) {
        Ok(Rate(Some(rate))) => Ok(Link { name, rate: Some(rate) }),
        Ok(Rate(None)) => Err(format!("{text:?}: nothing moves over a link of 0")),
        Err(error) => Err(format!("{error}; or loopback")),
    }
}

/// `4M`, `1GiB`, in bytes.
pub(crate) fn size(text: &str) -> Result<u64, String> {
    scaled(text, bytes).ok_or_else(|| format!("{text:?}: {SIZE_GRAMMAR}"))
}

/// A size of at least 4 MiB, which is what is looked at in one go.
pub(crate) fn sample(text: &str) -> Result<u64, String> {
    match size(text)? {
        bytes if bytes < 4 << 20 => Err(format!("{text:?}: must be at least 4M")),
        bytes => Ok(bytes),
    }
}

/// `300ms`, `2s`; not 0.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    let unit = |unit: &str| match unit {
        "us" => Some(1.0),
        "ms" => Some(1e3),
        "s" => Some(1e6),
        "m" | "min" => Some(60e6),
        "h" => Some(3600e6),
        _ => None,
    };
    match scaled(text, unit) {
        Some(0) => Err(format!("{text:?}: must be more than 0")),
        Some(micros) => Ok(Duration::from_micros(micros)),
        None => Err(format!("{text:?}: {DURATION_GRAMMAR}")),
    }
}

/// `multifd-channels`; 0 is none, everything goes on the main channel.
pub(crate) fn channels(text: &str) -> Result<usize, String> {
    let parameter::Number { least, most, .. } = parameter::MULTIFD_CHANNELS;
    match text.parse::<usize>() {
        Ok(0) => Ok(0),
        Ok(channels) if parameter::MULTIFD_CHANNELS.check(channels as u64).is_ok() => Ok(channels),
        _ => Err(format!("{text:?}: a number from {least} to {most}, or 0 for none")),
    }
}

/// `xbzrle-cache-size`, in bytes.
pub(crate) fn cache(text: &str) -> Result<u64, String> {
    let bytes = size(text)?;
    parameter::XBZRLE_CACHE_SIZE.check(bytes).map(|()| bytes).map_err(|error| error.to_string())
}

fn bits(unit: &str) -> Option<f64> {
    let factor = match unit.strip_suffix("bit")? {
        "" => 1.0,
        "k" | "K" => 1e3,
        "M" => 1e6,
        "G" => 1e9,
        "T" => 1e12,
        _ => return None,
    };
    Some(factor / 8.0)
}

fn bytes(unit: &str) -> Option<f64> {
    let (prefix, base) = match (unit.strip_suffix("iB"), unit.strip_suffix('B')) {
        (Some(prefix), _) => (prefix, 1024.0),
        (None, Some(prefix)) => (prefix, 1000.0),
        (None, None) => (unit, 1024.0),
    };
    let power = match prefix {
        "" => 0,
        "k" | "K" => 1,
        "M" => 2,
        "G" => 3,
        "T" => 4,
        _ => return None,
    };
    Some(f64::powi(base, power))
}

/// A number and its unit; `None` for anything but a finite, non-negative number in range.
fn scaled(text: &str, unit: impl Fn(&str) -> Option<f64>) -> Option<u64> {
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, rest) = text.split_at(digits);
    let value = number.parse::<f64>().ok()? * unit(rest.trim())?;
    // 2^63: far more than any size or rate, far from where f64 to u64 gets doubtful.
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "the range is checked")]
    (value.is_finite() && (0.0..9.2e18).contains(&value)).then_some(value as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_read_as_people_write_them() {
        let bytes = |text: &str| rate(text).unwrap().0.map(NonZeroU64::get);
        assert_eq!(bytes("1Gbit/s"), Some(125_000_000));
        assert_eq!(bytes("100MiB/s"), Some(100 << 20));
        assert_eq!(bytes("512K"), Some(512 << 10));
        assert_eq!(bytes("1.5MB/s"), Some(1_500_000));
        assert_eq!(bytes("10 Mbit"), Some(1_250_000));
        assert_eq!(bytes("0"), None);
    }

    #[test]
    fn what_a_peer_says_cannot_steer_a_terminal() {
        let text = "block \"\u{1b}]0;x\u{7}\" \u{9b}2J\r\nmultifd: all is well, é \u{202e}txt";
        let shown = visible(text);
        assert_eq!(shown, "block \"\\u{1b}]0;x\\u{7}\" \\u{9b}2J\\r\\nmultifd: all is well, é \\u{202e}txt");
    }

    #[test]
    fn sizes_and_durations() {
        assert_eq!(size("4M"), Ok(4 << 20));
        assert_eq!(size("1GB"), Ok(1_000_000_000));
        assert_eq!(duration("300ms"), Ok(Duration::from_millis(300)));
        assert_eq!(duration("2s"), Ok(Duration::from_secs(2)));
    }

    #[test]
    fn wrong_values_are_repeated_with_the_grammar() {
        for text in ["", "fast", "1Xbit/s", "-1", "1e400M", "nan", "1..2M", "99999999999T"] {
            let error = rate(text).unwrap_err();
            assert!(error.contains(&format!("{text:?}")) && error.contains("NUMBER"), "{error}");
        }
        assert!(duration("5").unwrap_err().contains("ms"));
        assert!(duration("0s").is_err());
        assert!(link("0").unwrap_err().contains("link of 0"));
        assert!(link("fast").unwrap_err().contains("loopback"));
        assert!(channels("256").unwrap_err().contains("from 1 to 255") && channels("-1").is_err());
        assert_eq!((channels("0"), channels("255")), (Ok(0), Ok(255)));
        assert!(cache("3M").unwrap_err().contains("a power of two, at least 4096"));
        assert_eq!(cache("4M"), Ok(4 << 20));
    }
}
