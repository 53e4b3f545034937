//! What two multifd ends say to each other that QEMU does not. Spec: docs/wire.md, "multifd
//! dialect".
//!
//! The source asks by PING(HELLO_PING), a multifd destination answers HELLO with its features
//! before the PONG. A packet of the dialect is sent only after that.

use std::time::Duration;

use multifd_codecs::{Codec, CodecId};
use multifd_wire::Failure;

use crate::error::{Error, ErrorKind, Phase, Result};
use crate::guest::PAGE;

/// Version that HELLO carries.
pub(crate) const VERSION: u16 = 1;

/// Feature: packets whose pages are differences to what the destination holds.
pub(crate) const FEATURE_DELTAS: u64 = 1 << 0;

/// Feature: the destination says why it fails, before its SHUT.
const FEATURE_REASONS: u64 = 1 << 1;

/// Feature: the destination says that it is alive while the source waits for its SHUT.
const FEATURE_ALIVE: u64 = 1 << 2;

/// Feature: the destination says how long it took to load the device state, before its SHUT.
const FEATURE_LOAD_TIME: u64 = 1 << 3;

/// Feature: pages of a post-copy come on the parallel channels, too.
pub(crate) const FEATURE_POSTCOPY_CHANNELS: u64 = 1 << 16;

/// Feature: up to [`MAX_URGENT_CHANNELS`] channels of a post-copy carry pages that are asked for.
pub(crate) const FEATURE_URGENT_CHANNELS: u64 = 1 << 17;

/// Feature: neighbours of pages that are asked for come on those channels, and pages that have gone before.
pub(crate) const FEATURE_NEIGHBOURS: u64 = 1 << 18;

/// All that a destination of this version can do.
pub(crate) const FEATURES: u64 = FEATURE_DELTAS
    | FEATURE_REASONS
    | FEATURE_ALIVE
    | FEATURE_LOAD_TIME
    | FEATURE_POSTCOPY_CHANNELS
    | FEATURE_URGENT_CHANNELS
    | FEATURE_NEIGHBOURS;

/// Most channels for pages that are asked for, over one link.
pub(crate) const MAX_URGENT_CHANNELS: usize = 8;

/// Between two signs of life of an end whose embedder has it in hand.
pub(crate) const ALIVE_INTERVAL: Duration = Duration::from_millis(250);

/// Where a destination failed, and why.
pub(crate) fn failure(error: &Error) -> Failure {
    let mut reason = String::new();
    // Writing to a string does not fail.
    let _ = error.write_reason(&mut reason);
    if reason.len() > Failure::MAX_REASON {
        const MORE: &str = "...";
        let mut end = Failure::MAX_REASON - MORE.len();
        while !reason.is_char_boundary(end) {
            end -= 1;
        }
        reason.truncate(end);
        reason.push_str(MORE);
    }
    let phase = PHASES.iter().position(|phase| *phase == error.phase());
    Failure { phase: phase.and_then(|phase| u8::try_from(phase).ok()).unwrap_or(u8::MAX), reason }
}

/// The phase that a destination names; `None` for one of a later version.
pub(crate) fn phase_of(failure: &Failure) -> Option<Phase> {
    PHASES.get(usize::from(failure.phase)).copied()
}

/// By their numbers on the wire.
const PHASES: [Phase; 6] =
    [Phase::Accept, Phase::Active, Phase::Commit, Phase::Connect, Phase::Device, Phase::Setup];

/// Appends one page's difference to the payload of a packet with
/// [`CodecId::DIALECT_DELTA`](multifd_wire::CodecId): for each page be16 length (1..=4096) and so
/// many bytes in xbzrle's run coding.
pub(crate) fn put_delta(payload: &mut Vec<u8>, delta: &[u8]) -> Result<()> {
    payload.extend_from_slice(&delta_len(delta)?.to_be_bytes());
    payload.extend_from_slice(delta);
    Ok(())
}

/// The length of a difference, as both its carriers write it.
pub(crate) fn delta_len(delta: &[u8]) -> Result<u16> {
    let len = u16::try_from(delta.len()).ok().filter(|len| (1..=PAGE).contains(&usize::from(*len)));
    len.ok_or_else(|| {
        Error::bug(Phase::Active, format_args!("a difference of {} bytes to a page", delta.len()))
    })
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

/// Refuses a codec whose id means something else in the dialect.
pub(crate) fn check_codec(codec: &dyn Codec, phase: Phase) -> Result<()> {
    let id = codec.id();
    if !id.is_reserved() {
        return Ok(());
    }
    let detail = format!(
        "codec {} has the id {:#04x}, which is reserved for multifd's dialect; expected one from {:#04x} on with several bits",
        codec.name(),
        id.value(),
        CodecId::FIRST_OWN.value()
    );
    Err(Error::new(ErrorKind::ApiMisuse, phase, detail))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use multifd_codecs::{CodecError, Codecs, Decoder, Encoder, Uncompressed};
    use multifd_wire::Configuration;

    use super::*;
    use crate::guest::{HostMemory, RamBlock};
    use crate::{Destination, Source};

    /// No compression under another id.
    #[derive(Debug)]
    struct Own(CodecId);

    impl Codec for Own {
        fn id(&self) -> CodecId {
            self.0
        }
        fn name(&self) -> &str {
            "own"
        }
        fn encoder(&self) -> Result<Box<dyn Encoder>, CodecError> {
            Uncompressed.encoder()
        }
        fn decoder(&self) -> Result<Box<dyn Decoder>, CodecError> {
            Uncompressed.decoder()
        }
    }

    /// What source and destination say to a codec with this id.
    fn built_with(id: CodecId) -> [Result<()>; 2] {
        let ram = || vec![RamBlock::new("ram".try_into().unwrap(), HostMemory::anonymous(PAGE).unwrap())];
        let machine = Configuration::new("own");
        let source = Source::builder(ram(), machine).channels(1).codec(Arc::new(Own(id))).build();
        let codecs = Codecs::default().with(Arc::new(Own(id)));
        let anywhere = "tcp:127.0.0.1:0".parse().unwrap();
        let destination = Destination::builder(ram()).codecs(codecs).listen(&anywhere);
        [source.map(drop), destination.map(drop)]
    }

    #[test]
    fn a_codec_with_a_reserved_id_is_refused() {
        for id in (0..0x40).filter_map(CodecId::new) {
            for result in built_with(id) {
                let Err(error) = result else {
                    assert!(!id.is_reserved(), "{id} was taken");
                    continue;
                };
                assert!(id.is_reserved(), "{id}: {error}");
                assert_eq!(error.kind(), ErrorKind::ApiMisuse);
                let start = format!("codec own has the id {id}, which is reserved");
                assert!(error.to_string().contains(&start), "{error}");
            }
        }
    }

    #[test]
    fn a_failure_has_the_phase_and_as_much_of_the_reason_as_fits() {
        for phase in PHASES {
            let said = failure(&Error::new(ErrorKind::Storage, phase, "disk full").on("channel 3"));
            assert_eq!((phase_of(&said), said.reason.as_str()), (Some(phase), "channel 3: disk full"));
        }
        let long = failure(&Error::new(ErrorKind::Storage, Phase::Setup, "\u{df}".repeat(400)));
        assert_eq!(long.reason.len(), Failure::MAX_REASON);
        assert!(long.reason.ends_with("\u{df}..."));
        assert_eq!(phase_of(&Failure { phase: 6, reason: String::new() }), None);
    }

    #[test]
    fn differences_are_taken_as_they_were_put() {
        let mut payload = Vec::new();
        put_delta(&mut payload, &[1]).unwrap();
        put_delta(&mut payload, &[2; PAGE]).unwrap();
        let mut left = &payload[..];
        assert_eq!(take_delta(&mut left).unwrap(), [1]);
        assert_eq!(take_delta(&mut left).unwrap(), [2; PAGE]);
        assert!(left.is_empty());
    }

    #[test]
    fn a_difference_that_no_destination_takes_is_a_bug_and_not_cut() {
        for len in [0, PAGE + 1, 1 << 16, (1 << 16) + 1] {
            let mut payload = Vec::new();
            let error = put_delta(&mut payload, &vec![0; len]).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Bug);
            assert!(payload.is_empty());
        }
    }

    #[test]
    fn short_empty_and_long_differences_are_refused() {
        for bytes in [&[][..], &[0], &[0, 0], &[0, 2, 1], &[0x10, 0x01, 0]] {
            assert!(take_delta(&mut &bytes[..]).is_err(), "{bytes:?}");
        }
    }
}
