//! What two multifd ends say to each other that QEMU does not. Spec: docs/wire.md, "multifd dialect".
//!
//! The source asks by PING(HELLO_PING), a multifd destination answers HELLO with its features before the PONG. A packet of the
//! dialect is sent only after that.

use crate::error::{Error, ErrorKind, Phase, Result};
use crate::ram::PAGE;

/// Version that HELLO carries.
pub(crate) const VERSION: u16 = 1;

/// Feature: packets whose pages are differences to what the destination holds.
pub(crate) const FEATURE_DELTAS: u64 = 1 << 0;

/// The codec field of such packets; no codec of QEMU's has two bits.
///
/// Payload: for each page be16 length (1..=4096) and so many bytes in xbzrle's run coding.
pub(crate) const DELTA_CODEC: u8 = 0x06;

/// Appends one page's difference to a payload.
pub(crate) fn put_delta(payload: &mut Vec<u8>, delta: &[u8]) {
    payload.extend_from_slice(&u16::try_from(delta.len()).unwrap_or(u16::MAX).to_be_bytes());
    payload.extend_from_slice(delta);
}

/// Takes the next page's difference off a payload.
pub(crate) fn take_delta<'a>(payload: &mut &'a [u8]) -> Result<&'a [u8]> {
    let (head, rest) = payload.split_first_chunk::<2>().ok_or_else(|| short(2, payload.len()))?;
    let len = usize::from(u16::from_be_bytes(*head));
    if len == 0 || len > PAGE {
        let detail = format!("difference of {len} bytes, expected 1..={PAGE}");
        return Err(Error::new(ErrorKind::InvalidStream, Phase::Active, detail));
    }
    let (delta, rest) = rest.split_at_checked(len).ok_or_else(|| short(len, rest.len()))?;
    *payload = rest;
    Ok(delta)
}

fn short(wanted: usize, left: usize) -> Error {
    let detail = format!("{left} bytes left in a packet of differences, {wanted} expected");
    Error::new(ErrorKind::InvalidStream, Phase::Active, detail)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_are_taken_as_they_were_put() {
        let mut payload = Vec::new();
        put_delta(&mut payload, &[1]);
        put_delta(&mut payload, &[2; PAGE]);
        let mut left = &payload[..];
        assert_eq!(take_delta(&mut left).unwrap(), [1]);
        assert_eq!(take_delta(&mut left).unwrap(), [2; PAGE]);
        assert!(left.is_empty());
    }

    #[test]
    fn short_empty_and_long_differences_are_refused() {
        for bytes in [&[][..], &[0], &[0, 0], &[0, 2, 1], &[0x10, 0x01, 0]] {
            assert!(take_delta(&mut &bytes[..]).is_err(), "{bytes:?}");
        }
    }
}
