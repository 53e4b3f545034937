//! Packets of different codecs on one channel, and a codec that only another multifd has.

use std::sync::Arc;

use multifd_codecs::{Codec, Codecs, Lz4, Uncompressed, Zlib, Zstd};
use multifd_engine::{
    Arrived, Destination, DeviceState, ErrorKind, PAGE, RamBlock, Report, Source, SourceBuilder,
};
use multifd_wire::Configuration;

use crate::proof::{block, half_text};
use crate::{SOON, moves};

fn codecs() -> [Arc<dyn Codec>; 3] {
    [Arc::new(Lz4), Arc::new(Zlib::default()), Arc::new(Zstd::default())]
}

/// Moves a paused guest; what each end counted.
fn moved(
    here: &RamBlock,
    there: &RamBlock,
    known: Codecs,
    set: impl FnOnce(SourceBuilder) -> SourceBuilder,
) -> (Report, Report) {
    let destination = Destination::builder(vec![there.clone()]).timeout(SOON).codecs(known);
    let destination = destination.listen(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap();
    let to = destination.endpoint();
    let receiving =
        std::thread::Builder::new().spawn(move || destination.receive().and_then(Arrived::accept)).unwrap();
    let source = Source::builder(vec![here.clone()], Configuration::new("test-10.0")).paused_guest();
    let source = set(source.timeout(SOON).channels(2)).build().unwrap();
    let mut precopy = source.connect(&to).unwrap();
    precopy.round().unwrap();
    let sent = precopy.stop_copy().unwrap().commit(&DeviceState::none()).unwrap();
    (sent, receiving.join().unwrap().unwrap())
}

fn assert_same(here: &RamBlock, there: &RamBlock) {
    let (mut one, mut other) = ([0; PAGE], [0; PAGE]);
    for page in 0..here.pages() {
        assert!(here.read_page(page, &mut one) && there.read_page(page, &mut other));
        assert!(one == other, "page {page} differs");
    }
}

#[test]
fn pages_that_no_codec_makes_shorter_go_without_one_and_the_others_with_it() {
    for codec in codecs() {
        let (here, there) = (half_text(1024), block(1024));
        let (sent, received) =
            moved(&here, &there, Codecs::default(), |source| source.codec(Arc::clone(&codec)));
        assert_same(&here, &there);
        for progress in [&sent.progress, &received.progress] {
            assert_eq!((progress.pages_normal, progress.pages_uncompressed), (1024, 512), "{codec:?}");
        }
        // The text is next to nothing.
        let random = (512 * PAGE) as u64;
        assert!((random..random * 5 / 4).contains(&sent.progress.wire_bytes), "{:?}", sent.progress);
        assert_eq!(received.codec, codec.name());
    }
}

#[test]
fn a_destination_that_takes_one_codec_only_gets_all_pages_by_it() {
    let codec: Arc<dyn Codec> = Arc::new(Zstd::default());
    let (here, there) = (half_text(256), block(256));
    let only = Codecs::empty().with(Arc::clone(&codec));
    let (sent, received) = moved(&here, &there, only, |source| source.codec(codec));
    assert_same(&here, &there);
    assert_eq!((sent.progress.pages_uncompressed, received.progress.pages_uncompressed), (0, 0));
}

#[test]
fn a_guest_that_writes_all_the_time_moves_by_every_codec_with_differences() {
    for codec in codecs() {
        moves(|source| source.channels(3).codec(codec).xbzrle(16 << 20), 4);
    }
}

#[test]
fn a_destination_without_lz4_is_not_sent_any_and_the_source_says_so() {
    let known = || Codecs::empty().with(Arc::new(Uncompressed)).with(Arc::new(Zlib::default()));
    let set: [fn(SourceBuilder) -> SourceBuilder; 2] = [|source| source, |source| source.return_path(false)];
    for set in set {
        let destination = Destination::builder(vec![block(64)]).timeout(SOON).codecs(known());
        let destination = destination.listen(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap();
        let to = destination.endpoint();
        let receiving = std::thread::Builder::new().spawn(move || destination.receive().map(drop)).unwrap();
        let source = Source::builder(vec![half_text(64)], Configuration::new("test-10.0")).paused_guest();
        let source = set(source.timeout(SOON).channels(2).codec(Arc::new(Lz4))).build().unwrap();
        let progress = source.progress();
        let error = source.connect(&to).and_then(|mut precopy| precopy.round().map(drop)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Incompatible, "{error}");
        assert!(error.to_string().contains("the destination takes no packets of codec lz4"), "{error}");
        assert!(error.source_may_resume() && progress.now().pages_normal == 0);
        assert!(receiving.join().unwrap().is_err());
    }
}

#[test]
fn a_guest_moves_with_codecs_that_are_chosen_by_packet() {
    let report = moves(|source| source.channels(2).auto_codec(true).xbzrle(16 << 20), 4);
    assert_eq!(report.codec, "auto");
    let (here, there) = (half_text(4096), block(4096));
    let (sent, received) = moved(&here, &there, Codecs::default(), |source| source.auto_codec(true));
    assert_same(&here, &there);
    // Whatever was chosen, both ends have counted the same.
    assert_eq!(sent.progress.bytes_saved, received.progress.bytes_saved);
    assert_eq!((sent.progress.pages_normal, sent.progress.pages_uncompressed), (4096, 2048));
}

#[test]
fn codecs_are_not_chosen_for_a_destination_that_takes_one_only() {
    let (here, there) = (half_text(256), block(256));
    let known = Codecs::empty().with(Arc::new(Uncompressed));
    let (sent, _) = moved(&here, &there, known, |source| source.auto_codec(true));
    assert_eq!((sent.progress.codec_us, sent.progress.bytes_saved), (0, 0));
    assert_same(&here, &there);
}
