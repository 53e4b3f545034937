//! What was changed on its way is found, and what was not is proved to be the same.

use std::sync::Arc;

use multifd_codecs::{Codec, Lz4, Zlib, Zstd};
use multifd_engine::{
    Arrived, ChangedPages, Destination, DeviceState, DigestVerdict, DigestsDiffer, Error, HostMemory, PAGE,
    RamBlock, Report, Source, SourceBuilder,
};
use multifd_wire::Configuration;

use crate::guest::next;
use crate::relay::{Flip, Relay};
use crate::{SOON, moves};

/// A packet's header, and what a channel says of itself before any.
const HEADER: usize = 1344;
const INITIAL: usize = 64;

pub(crate) fn block(pages: usize) -> RamBlock {
    RamBlock::new("pc.ram".try_into().unwrap(), HostMemory::anonymous(pages * PAGE).unwrap())
}

/// Pages that do not compress, and one in eight of zeros.
fn filled(pages: usize) -> RamBlock {
    let (block, mut random) = (block(pages), 7);
    for page in (0..pages).filter(|page| page % 8 != 7) {
        let content: Vec<u8> = (0..PAGE / 8).flat_map(|_| next(&mut random).to_le_bytes()).collect();
        block.memory().slice(page * PAGE, PAGE).unwrap().copy_from(&content);
    }
    block
}

/// Text in every page that `filled` leaves zero, and in every other one: 4 of 8 pages do not
/// compress.
pub(crate) fn half_text(pages: usize) -> RamBlock {
    let block = filled(pages);
    let text: Vec<u8> =
        b"the quick brown fox jumps over the lazy dog; ".iter().copied().cycle().take(PAGE).collect();
    for page in (0..pages).filter(|page| page % 2 == 1) {
        block.memory().slice(page * PAGE, PAGE).unwrap().copy_from(&text);
    }
    block
}

/// Moves a paused guest over a relay that flips a bit, and gives what each end says.
fn flipped(
    here: &RamBlock,
    there: &RamBlock,
    flip: Option<Flip>,
    set: impl FnOnce(SourceBuilder) -> SourceBuilder,
) -> (Result<Report, Error>, Result<Report, Error>) {
    let destination = Destination::builder(vec![there.clone()]).timeout(SOON);
    let destination = destination.listen(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap();
    let to = destination.endpoint();
    let to = flip.map_or_else(|| to.clone(), |flip| Relay::flipping(&to, flip).uri);
    let receiving =
        std::thread::Builder::new().spawn(move || destination.receive().and_then(Arrived::accept)).unwrap();
    let source = Source::builder(vec![here.clone()], Configuration::new("test-10.0"));
    let send = || {
        let source = source.paused_guest().timeout(SOON).checksums(true).digest(true);
        let mut precopy = set(source).build()?.connect(&to)?;
        precopy.round()?;
        precopy.stop_copy()?.commit(&DeviceState::none())
    };
    let sent = send();
    (sent, receiving.join().unwrap())
}

type Set = fn(SourceBuilder) -> SourceBuilder;

fn codecs() -> [Arc<dyn Codec>; 3] {
    [Arc::new(Lz4), Arc::new(Zlib::default()), Arc::new(Zstd::default())]
}

/// Every page is as it was sent, or was not placed.
fn nothing_wrong_was_placed(here: &RamBlock, there: &RamBlock) {
    let (mut sent, mut placed) = ([0; PAGE], [0; PAGE]);
    for page in 0..here.pages() {
        assert!(here.read_page(page, &mut sent) && there.read_page(page, &mut placed));
        assert!(placed == sent || placed == [0; PAGE], "page {page} is not what was sent, nor empty");
    }
}

#[test]
fn the_digest_of_a_guest_that_wrote_all_the_time_is_equal() {
    let ways: [Set; 7] = [
        |source| source,
        |source| source.channels(3),
        |source| source.channels(2).codec(Arc::new(Zstd::default())),
        |source| source.channels(2).codec(Arc::new(Lz4)).xbzrle(64 << 20),
        |source| source.channels(2).xbzrle(64 << 20),
        |source| source.xbzrle(64 << 20),
        |source| source.channels(2).checksums(false).audit(true),
    ];
    for way in ways {
        let report = moves(|source| way(source.checksums(true).digest(true)), 4);
        assert_eq!(report.digest, Some(DigestVerdict::Equal));
        assert_eq!(serde_json::to_value(report.figures()).unwrap()["digest"], "equal");
        assert!(report.to_string().contains("\ndigest       equal"), "{report}");
    }
}

/// Pages that go as they are in memory would have to be copied for it.
#[test]
fn a_digest_is_kept_where_a_codec_reads_the_pages_anyway() {
    let coded: [Set; 2] =
        [|source| source.channels(2).codec(Arc::new(Lz4)), |source| source.channels(2).auto_codec(true)];
    for way in coded {
        assert_eq!(moves(way, 2).digest, Some(DigestVerdict::Equal));
    }
    assert_eq!(moves(|source| source.channels(2), 2).digest, None);
}

#[test]
fn both_ends_say_that_the_digest_is_equal_and_neither_does_without_one() {
    let (here, there) = (filled(64), block(64));
    let (sent, received) = flipped(&here, &there, None, |source| source.channels(1));
    assert_eq!(sent.unwrap().digest, Some(DigestVerdict::Equal));
    assert_eq!(received.unwrap().digest, Some(DigestVerdict::Equal));
    let ways: [Set; 3] = [
        |source| source.channels(1).digest(false),
        |source| source.channels(1).zero_copy_send(multifd_engine::ZeroCopySend::Always),
        |source| source.return_path(false),
    ];
    for way in ways {
        let (sent, received) = flipped(&here, &block(64), None, way);
        assert_eq!((sent.unwrap().digest, received.unwrap().digest), (None, None));
    }
}

#[test]
fn a_bit_that_flips_in_a_packet_ends_the_move_before_a_page_is_placed() {
    let here = filled(512);
    // Behind the packet with the first sync point: it goes before it is known what the destination
    // can do.
    let first = INITIAL + HEADER;
    let in_headers = [0, 3, 7, 11, 17, 20, 35, 36, 39, 44, 50, 55, 60, 64, 100, 319, 320, 327, 1000, 1343];
    let in_pages = [HEADER, HEADER + 1, HEADER + 40_000, HEADER + 112 * PAGE - 1, 3 * HEADER + 250 * PAGE];
    for byte in in_headers.into_iter().chain(in_pages) {
        let flip = Flip { connection: 1, byte: first + byte };
        let there = block(512);
        let (sent, received) = flipped(&here, &there, Some(flip), |source| source.channels(1));
        let (sent, received) = (sent.unwrap_err(), received.unwrap_err());
        assert!(sent.source_may_resume(), "{flip:?}: {sent}");
        let text = received.to_string();
        assert!(text.contains("channel 0 (tcp:"), "{flip:?}: {text}; the source: {sent}");
        if byte >= HEADER {
            assert!(text.contains(" with 112 pages of RAM block pc.ram was changed on the way"), "{text}");
            assert!(text.contains("packet "), "{text}");
        }
        nothing_wrong_was_placed(&here, &there);
    }
}

#[test]
fn whatever_a_codec_makes_of_a_flipped_bit_no_wrong_page_is_placed() {
    for codec in codecs() {
        let here = half_text(256);
        for byte in (INITIAL + 2 * HEADER..INITIAL + 2 * HEADER + 300_000).step_by(23_457) {
            let flip = Flip { connection: 1, byte };
            let there = block(256);
            let set = |source: SourceBuilder| source.channels(1).codec(codec.clone());
            let (sent, received) = flipped(&here, &there, Some(flip), set);
            nothing_wrong_was_placed(&here, &there);
            // A bit of a codec's own that changes no page is no fault.
            let Err(error) = received else { continue };
            assert!(sent.unwrap_err().source_may_resume());
            let text = error.to_string();
            assert!(text.contains("channel 0 (tcp:") && text.contains("packet"), "{flip:?}: {text}");
        }
    }
}

#[test]
fn the_digest_finds_what_no_checksum_was_there_to_find_and_names_the_block() {
    let ways: [(usize, Set); 2] = [(0, |source| source), (1, |source| source.channels(1).checksums(false))];
    for (connection, way) in ways {
        let here = filled(512);
        // In the middle of a page, whatever else is on its channel.
        let flip = Flip { connection, byte: 20 * (PAGE + 8) + PAGE / 2 };
        let (sent, received) = flipped(&here, &block(512), Some(flip), way);
        let (sent, received) = (sent.unwrap_err(), received.unwrap_err());
        let differ = std::error::Error::source(&received).unwrap().downcast_ref::<DigestsDiffer>();
        assert_eq!(differ.unwrap().blocks, [here.name().clone()], "{received}");
        for error in [&sent, &received] {
            assert!(error.to_string().contains("digest: different; RAM blocks"), "{error}");
            assert!(error.source_may_resume() && error.to_string().contains("pc.ram"), "{error}");
        }
    }
}

/// Without either, it goes through: this is what they are for.
#[test]
fn a_flipped_bit_without_checksums_and_digest_is_not_found() {
    let (here, there) = (filled(512), block(512));
    let flip = Flip { connection: 0, byte: 20 * (PAGE + 8) + PAGE / 2 };
    let (sent, received) = flipped(&here, &there, Some(flip), |source| source.digest(false));
    assert!(sent.is_ok() && received.is_ok());
    let (mut one, mut other) = ([0; PAGE], [0; PAGE]);
    let differs = (0..512).filter(|page| {
        assert!(here.read_page(*page, &mut one) && there.read_page(*page, &mut other));
        one != other
    });
    assert_eq!(differs.count(), 1);
}

/// Moves a paused guest, and changes a byte at the destination between its last page and the end.
fn spoilt(way: Set, verify: bool, spoil: bool) -> Result<Report, Error> {
    let (here, there) = (filled(512), block(512));
    let destination = Destination::builder(vec![there.clone()]).timeout(SOON).verify(verify);
    let destination = destination.listen(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap();
    let to = destination.endpoint();
    let receiving =
        std::thread::Builder::new().spawn(move || destination.receive().and_then(Arrived::accept)).unwrap();
    let source = Source::builder(vec![here], Configuration::new("test-10.0")).paused_guest().timeout(SOON);
    let mut precopy = way(source).build().unwrap().connect(&to).unwrap();
    // When this returns, all pages have been placed.
    precopy.round().unwrap();
    if spoil {
        there.memory().slice(300 * PAGE + 7, 1).unwrap().copy_from(&[0xa5_u8]);
        there.memory().slice(303 * PAGE + 7, 1).unwrap().copy_from(&[0xa5_u8]);
    }
    let sent = precopy.stop_copy().and_then(|last| last.commit(&DeviceState::none()));
    let received = receiving.join().unwrap();
    assert_eq!(sent.is_ok(), received.is_ok());
    assert!(sent.err().is_none_or(|error| error.source_may_resume()));
    received
}

#[test]
fn memory_that_was_changed_behind_the_engines_back_is_found_when_it_is_read_again() {
    let ways: [Set; 4] = [
        |source| source,
        |source| source.channels(2),
        |source| source.channels(2).codec(Arc::new(Zlib::default())),
        // A source that knows nothing of digests.
        |source| source.channels(1).checksums(false).digest(false),
    ];
    for way in ways {
        let error = spoilt(way, true, true).unwrap_err();
        let changed = std::error::Error::source(&error).unwrap().downcast_ref::<ChangedPages>().unwrap();
        assert_eq!(changed.blocks, [("pc.ram".try_into().unwrap(), vec![300, 303])], "{error}");
        let text = "2 pages are not what was placed in them; RAM block pc.ram: 300, 303";
        assert!(error.to_string().contains(text), "{error}");
        assert_eq!(spoilt(way, true, false).unwrap().audit.unwrap().pages, 512);
        // The digest is of what was placed: without another look it cannot know.
        assert_eq!(spoilt(way, false, true).unwrap().audit, None);
    }
}
