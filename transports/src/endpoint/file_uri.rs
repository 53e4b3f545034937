//! `file:PATH[,offset=N]`, as QEMU reads it.

use std::path::{Path, PathBuf};

use crate::Endpoint;

const OFFSET: &str = ",offset=";

/// Parses what follows `file:`. The first `,offset=` ends the path; any other comma belongs to it.
pub(crate) fn parse(rest: &str) -> Result<Endpoint, &'static str> {
    let (path, offset) = match rest.split_once(OFFSET) {
        Some((path, size)) => (path, parse_size(size).ok_or(WRONG_OFFSET)?),
        None => (rest, 0),
    };
    if path.is_empty() {
        return Err("the path is missing");
    }
    Ok(Endpoint::File { path: PathBuf::from(path), offset })
}

pub(crate) fn print(path: &Path, offset: u64) -> String {
    match offset {
        0 => format!("file:{}", path.display()),
        _ => format!("file:{}{OFFSET}{offset}", path.display()),
    }
}

/// QEMU's sizes: `4096`, `0x1000`, or a whole number and one of B, K, M, G, T, P, E in powers of
/// 1024.
fn parse_size(text: &str) -> Option<u64> {
    let hex = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X"));
    let digits = hex.unwrap_or_else(|| text.trim_end_matches(|c: char| c.is_ascii_alphabetic()));
    // Both parsers take a plus sign, which is in no size.
    if digits.starts_with('+') {
        return None;
    }
    let size = match hex {
        Some(hex) => u64::from_str_radix(hex, 16).ok()?,
        None => digits.parse::<u64>().ok()?.checked_mul(unit(text.strip_prefix(digits)?)?)?,
    };
    // The kernel's file positions are signed.
    i64::try_from(size).is_ok().then_some(size)
}

fn unit(letter: &str) -> Option<u64> {
    let power = match letter {
        "" => 0,
        _ if letter.len() == 1 => "BKMGTPE".find(letter.to_ascii_uppercase().as_str())?,
        _ => return None,
    };
    Some(1 << (10 * power))
}

const WRONG_OFFSET: &str =
    "the offset is no size below 2^63: a number, 0xHEX, or a number and one of B, K, M, G, T, P, E";

#[cfg(test)]
mod tests {
    use super::*;

    fn file(path: &str, offset: u64) -> Endpoint {
        Endpoint::File { path: path.into(), offset }
    }

    #[test]
    fn offsets_are_qemus_sizes() {
        for (size, offset) in [
            ("0", 0),
            ("4096", 4096),
            ("0x1200", 0x1200),
            ("0Xff", 255),
            ("1049088", (1 << 20) + 512),
            ("7B", 7),
            ("3k", 3 << 10),
            ("1M", 1 << 20),
            ("2g", 2 << 30),
            ("5T", 5 << 40),
            ("9223372036854775807", i64::MAX.unsigned_abs()),
        ] {
            assert_eq!(parse(&format!("/a,offset={size}")), Ok(file("/a", offset)), "{size}");
        }
        for size in [
            "",
            "-1",
            "+1",
            "1.5M",
            "1 M",
            "1MB",
            "0x",
            "0x1M",
            "x",
            "M",
            "8E",
            "0x8000000000000000",
            "1,offset=2",
        ] {
            assert_eq!(parse(&format!("/a,offset={size}")), Err(WRONG_OFFSET), "{size}");
        }
    }

    #[test]
    fn a_comma_belongs_to_the_path_unless_it_begins_an_offset() {
        assert_eq!(parse("a,b"), Ok(file("a,b", 0)));
        assert_eq!(parse("a,offset"), Ok(file("a,offset", 0)));
        assert_eq!(parse("a,b,offset=1K"), Ok(file("a,b", 1024)));
        assert!(parse("").is_err() && parse(",offset=1").is_err());
        assert_eq!(print(Path::new("a,b"), 1024), "file:a,b,offset=1024");
        assert_eq!(print(Path::new("a"), 0), "file:a");
    }
}
