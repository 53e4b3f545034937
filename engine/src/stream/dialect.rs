//! What two multifd ends say to each other that QEMU does not. Spec: docs/wire.md, "multifd
//! dialect".
//!
//! The source asks by PING(HELLO_PING), a multifd destination answers HELLO with its features
//! before the PONG. A packet of the dialect is sent only after that.

use std::sync::Arc;
use std::time::Duration;

use multifd_codecs::{Codec, CodecId, Codecs, Uncompressed};
use multifd_wire::{Failure, Wishes};

use crate::error::{Error, ErrorKind, Phase, Result};
use crate::guest::{PAGE, hash};

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

/// Feature: neighbours of pages that are asked for come on those channels, and pages that have gone
/// before.
pub(crate) const FEATURE_NEIGHBOURS: u64 = 1 << 18;

/// Feature: checksums of packets are looked at.
const FEATURE_CHECKSUMS: u64 = 1 << 6;

/// Feature: digests of the pages that were placed are kept, and compared with the source's at the
/// end of RAM.
const FEATURE_DIGEST: u64 = 1 << 7;

/// Feature: packets of different codecs on one channel are taken.
const FEATURE_MIXED: u64 = 1 << 8;

/// Feature: a pre-copy goes on over another link when this one breaks. Of a destination that was
/// told to wait for it.
pub(crate) const FEATURE_RESUMPTION: u64 = 1 << 9;

/// All that a destination of this version can do, whatever its codecs are.
pub(crate) const FEATURES: u64 = FEATURE_DELTAS
    | FEATURE_REASONS
    | FEATURE_ALIVE
    | FEATURE_LOAD_TIME
    | FEATURE_POSTCOPY_CHANNELS
    | FEATURE_URGENT_CHANNELS
    | FEATURE_NEIGHBOURS
    | FEATURE_CHECKSUMS
    | FEATURE_DIGEST
    | FEATURE_MIXED;

/// Most channels for pages that are asked for, over one link.
pub(crate) const MAX_URGENT_CHANNELS: usize = 8;

/// Feature: packets of this codec are taken.
fn feature_of(codec: CodecId) -> u64 {
    1 << (32 + codec.value() / 2)
}

/// All that a destination with these codecs can do.
pub(crate) fn features(codecs: &Codecs) -> u64 {
    codecs.iter().fold(FEATURES, |features, codec| features | feature_of(codec.id()))
}

/// The codecs between which a source may choose by packet, towards a destination with these
/// features: the cheapest first, each with the number of its stream among those of its kind. None,
/// or one, if there is no choice.
pub(crate) fn codecs_by_cost(features: u64) -> impl Iterator<Item = (Arc<dyn Codec>, u8)> {
    type Stream = (Arc<dyn Codec>, u8);
    let has = move |codec: CodecId| features & feature_of(codec) != 0;
    let codecs = std::iter::once::<Stream>((Arc::new(Uncompressed), 0));
    #[cfg(feature = "lz4")]
    let codecs = codecs.chain(std::iter::once::<Stream>((Arc::new(multifd_codecs::Lz4), 0)));
    #[cfg(feature = "zstd")]
    let codecs = {
        use multifd_codecs::{Zstd, ZstdLevel};
        let levels = [ZstdLevel::at::<1>(), ZstdLevel::at::<3>(), ZstdLevel::at::<9>()];
        codecs.chain(
            (0..).zip(levels).map(|(stream, level)| -> Stream { (Arc::new(Zstd::from(level)), stream) }),
        )
    };
    // Where there is zstd, it does for less what zlib does.
    #[cfg(feature = "zlib")]
    let codecs = {
        let instead = !cfg!(feature = "zstd") || !has(CodecId::ZSTD);
        let zlib = || -> Stream { (Arc::new(multifd_codecs::Zlib::default()), 0) };
        codecs.chain(instead.then(zlib))
    };
    codecs.filter(move |(codec, _)| has(codec.id()))
}

/// Refuses to send packets of a codec that only another multifd has, unless a destination with
/// these features is one that has it.
pub(crate) fn check_peer(codec: &dyn Codec, features: u64) -> Result<()> {
    if !codec.id().is_reserved() || features & feature_of(codec.id()) != 0 {
        return Ok(());
    }
    let detail = format!(
        "the destination takes no packets of codec {}, which only another multifd has that was built with it; expected a codec \
         that it has, such as zstd",
        codec.name()
    );
    Err(Error::incompatible(Phase::Setup, detail))
}

/// What a destination with these features does of a source's wishes.
pub(crate) fn granted(wishes: Wishes, features: u64) -> Wishes {
    let has = |feature: u64| features & feature != 0;
    Wishes {
        checksums: wishes.checksums && has(FEATURE_CHECKSUMS),
        digest: wishes.digest && has(FEATURE_DIGEST),
        mixed: wishes.mixed && has(FEATURE_MIXED) && has(feature_of(CodecId::NONE)),
    }
}

/// The checksum of a packet's content, from the hash of each page in it. Of differences it is the
/// hash of their payload.
pub(crate) fn checksum_of_pages(hashes: &[u64]) -> u64 {
    let bytes: Vec<u8> = hashes.iter().flat_map(|hash| hash.to_be_bytes()).collect();
    hash(&bytes)
}

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
    if !id.is_reserved() || (id == CodecId::DIALECT_LZ4 && codec.name() == "lz4") {
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
    use multifd_codecs::{CodecError, Decoder, Encoder};
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
    fn a_destination_says_which_codecs_it_has_and_grants_what_it_can() {
        let none = Codecs::empty().with(Arc::new(Uncompressed));
        assert_eq!(features(&none), 0x0000_0001_0007_01cf);
        let own = none.clone().with(Arc::new(Own(CodecId::new(0x3e).unwrap())));
        assert_eq!(features(&own), 0x8000_0001_0007_01cf);
        let all = Wishes { checksums: true, digest: true, mixed: true };
        assert_eq!(granted(all, features(&none)), all);
        // Pages cannot go as they are to one that takes only a codec.
        let only = Codecs::empty().with(Arc::new(Own(CodecId::new(0x18).unwrap())));
        assert_eq!(granted(all, features(&only)), Wishes { mixed: false, ..all });
        assert_eq!(granted(all, 0x0f), Wishes::default());
        assert_eq!(granted(Wishes::default(), u64::MAX), Wishes::default());
    }

    #[test]
    fn a_source_chooses_among_what_both_ends_have() {
        let names = |codecs: &Codecs| -> Vec<String> {
            let all = codecs_by_cost(features(codecs));
            all.map(|(codec, stream)| format!("{} {stream}", codec.describe())).collect()
        };
        let none = Codecs::empty().with(Arc::new(Uncompressed));
        assert_eq!(names(&Codecs::default()), ["none 0", "lz4 0", "zstd:1 0", "zstd:3 1", "zstd:9 2"]);
        assert_eq!(
            names(&none.clone().with(Arc::new(multifd_codecs::Zlib::default()))),
            ["none 0", "zlib:1 0"]
        );
        assert_eq!(names(&none), ["none 0"]);
        assert_eq!(codecs_by_cost(0).count(), 0, "a QEMU");
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
