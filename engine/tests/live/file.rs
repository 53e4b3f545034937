//! A guest that is written while it goes to a file, plain and with `mapped-ram`; then it is read
//! back, by a destination and by a recording.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use multifd_engine::{
    Destination, DeviceState, Error, ErrorKind, HostMemory, MigrationState, PAGE, PageContent, Precopy,
    RamBlock, Recording, Report, SoftwareLog, Source, SourceBuilder,
};
use multifd_transports::Endpoint;
use multifd_wire::Configuration;
use tempfile::TempDir;
use vm_memory::Bytes;

use crate::guest::Guest;
use crate::{LOAD, PAGES, SOON, assert_equal, copy, move_over, no_devices, source};

/// Any number of dirty pages is few enough: a slow disk must not keep a test in its rounds.
const ANY_DOWNTIME: Duration = Duration::from_secs(3600);

struct Place {
    _folder: TempDir,
    path: PathBuf,
    endpoint: Endpoint,
}

impl Place {
    fn new(offset: u64) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("guest");
        let endpoint = Endpoint::File { path: path.clone(), offset };
        Self { _folder: folder, path, endpoint }
    }

    fn connect(&self, source: SourceBuilder) -> Result<Precopy, Error> {
        source.downtime_limit(ANY_DOWNTIME).build().unwrap().connect(&self.endpoint)
    }

    /// Into memory that held something.
    fn read(&self, readers: Option<usize>) -> RamBlock {
        let memory = HostMemory::anonymous(PAGES * PAGE).unwrap();
        let block = RamBlock::new("guest.ram".try_into().unwrap(), memory);
        copy(&Guest::new("garbage", PAGES).block, &block);
        let mut builder = Destination::builder(vec![block.clone()]).timeout(SOON);
        if let Some(readers) = readers {
            builder = builder.channels(readers);
        }
        let arrived = builder.listen(&self.endpoint).unwrap().receive().unwrap();
        assert!(!arrived.return_path_is_open());
        arrived.accept().unwrap();
        block
    }

    fn is_there(&self) -> bool {
        fs::symlink_metadata(&self.path).is_ok()
    }
}

/// What a recording finds is the guest's RAM; a later record of a page replaces the one before.
fn assert_recorded(place: &Place, offset: u64, block: &RamBlock) {
    let recording = Recording::open_at(&place.path, offset).unwrap();
    let mut seen = vec![None; PAGES];
    let mut pages = recording.pages();
    while let Some(record) = pages.next_page().unwrap() {
        let page = usize::try_from(record.page).unwrap();
        match record.content {
            PageContent::Data(bytes) => seen[page] = Some(bytes.to_vec()),
            PageContent::Zero { pages } => {
                seen[page..page + usize::try_from(pages).unwrap()].fill(Some(vec![0; PAGE]));
            }
            PageContent::Xbzrle(_) => panic!("a difference"),
        }
    }
    let mut content = [0; PAGE];
    for (page, seen) in seen.iter().enumerate() {
        assert!(block.read_page(page, &mut content));
        assert!(seen.as_deref() == Some(&content[..]), "page {page} differs");
    }
}

/// A live guest goes to a file in several rounds, and comes back from it.
fn goes(offset: u64, readers: Option<usize>, builder: impl FnOnce(SourceBuilder) -> SourceBuilder) -> Report {
    let guest = Guest::new("guest.ram", PAGES).run(LOAD);
    let place = Place::new(offset);
    let precopy = place.connect(builder(source(&guest))).unwrap();
    let report = move_over(&guest, precopy, 4).unwrap();
    assert!(!report.confirmed && report.decisions.len() >= 4);
    assert_equal(&guest.block, &place.read(readers));
    assert_recorded(&place, offset, &guest.block);
    report
}

#[test]
fn a_plain_stream() {
    for offset in [0, 777] {
        goes(offset, None, |source| source);
    }
}

#[test]
fn mapped_ram_by_any_number_of_threads() {
    for (offset, writers, readers) in
        [(0, 0, Some(1)), (513, 1, None), (0, 2, Some(4)), ((1 << 20) - 40, 4, Some(7))]
    {
        let report = goes(offset, readers, |source| source.mapped_ram(true).channels(writers));
        assert_eq!(report.progress.channels, writers as u64);
        assert!(report.progress.pages_zero > 0 && report.progress.pages_normal > PAGES as u64 / 2);
    }
}

fn configuration() -> Configuration {
    // A guest that came from such a file itself.
    let capabilities = vec!["mapped-ram".to_owned()];
    Configuration::new("test-10.0").with_capabilities(capabilities)
}

/// The bits of the one block, as the file has them: `#` for a page that is stored.
fn stored(place: &Place) -> String {
    let recording = Recording::open(&place.path).unwrap();
    assert_eq!(recording.configuration().capabilities, ["mapped-ram"]);
    let header = recording.blocks()[0].mapped_ram.unwrap();
    let file = fs::read(&place.path).unwrap();
    let bitmap = &file[usize::try_from(header.bitmap_offset).unwrap()..];
    (0..10).map(|page| if bitmap[page / 8] >> (page % 8) & 1 == 1 { '#' } else { '.' }).collect()
}

#[test]
fn a_page_is_written_over_in_place_and_loses_its_bit_when_it_becomes_zero() {
    for writers in [0, 2] {
        let block = RamBlock::new("guest.ram".try_into().unwrap(), HostMemory::anonymous(10 * PAGE).unwrap());
        let log = SoftwareLog::new(std::slice::from_ref(&block));
        let marker = log.marker();
        let put = |page: usize, byte: u8| {
            block.memory().slice(page * PAGE, PAGE).unwrap().write_slice(&[byte; PAGE], 0).unwrap();
            marker.mark(0, (page * PAGE) as u64, PAGE as u64);
        };
        (0..8).for_each(|page| put(page, 1));
        let place = Place::new(0);
        let builder = Source::builder(vec![block.clone()], configuration()).dirty_log(log);
        let mut precopy = place.connect(builder.mapped_ram(true).channels(writers)).unwrap();
        precopy.round().unwrap();
        let len = fs::metadata(&place.path).unwrap().len();
        (2..6).for_each(|page| put(page, 0));
        put(7, 9);
        precopy.round().unwrap();
        put(3, 7);
        put(9, 8);
        put(7, 0);
        precopy.round().unwrap();
        put(7, 6);
        precopy.stop_copy().unwrap().commit(&no_devices()).unwrap();

        assert_eq!(stored(&place), "##.#..##.#");
        assert_eq!(len.div_ceil(1 << 20), 2, "pages have room for one copy each: {len}");
        assert!(fs::metadata(&place.path).unwrap().len() < len + 4096 * 4);
        let copy = RamBlock::new("guest.ram".try_into().unwrap(), HostMemory::anonymous(10 * PAGE).unwrap());
        let there = Destination::builder(vec![copy.clone()]).listen(&place.endpoint).unwrap();
        there.receive().unwrap().accept().unwrap();
        let (mut a, mut b) = ([0; PAGE], [0; PAGE]);
        for page in 0..10 {
            assert!(block.read_page(page, &mut a) && copy.read_page(page, &mut b) && a == b, "{page}");
        }
    }
}

#[test]
fn a_guest_that_came_from_a_mapped_file_goes_on_in_a_plain_stream() {
    let block = RamBlock::new("guest.ram".try_into().unwrap(), HostMemory::anonymous(10 * PAGE).unwrap());
    let place = Place::new(0);
    let mut precopy = place.connect(Source::builder(vec![block], configuration()).paused_guest()).unwrap();
    precopy.round().unwrap();
    precopy.stop_copy().unwrap().commit(&DeviceState::none()).unwrap();
    assert!(Recording::open(&place.path).unwrap().configuration().capabilities.is_empty());
}

#[test]
fn a_cancel_leaves_no_file_and_a_second_attempt_succeeds() {
    for mapped in [false, true] {
        let guest = Guest::new("guest.ram", PAGES).run(LOAD);
        let place = Place::new(0);
        let mut precopy = place.connect(source(&guest).mapped_ram(mapped)).unwrap();
        precopy.round().unwrap();
        assert!(place.is_there());
        let control = precopy.control();
        control.cancel();
        let error = precopy.round().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Cancelled);
        assert_eq!(control.state(), MigrationState::Cancelled);
        // The precopy, and the handles that steer it, still live.
        assert!(!place.is_there());

        guest.wait_for_writes();
        let precopy = place.connect(source(&guest).mapped_ram(mapped)).unwrap();
        move_over(&guest, precopy, 2).unwrap();
        assert_equal(&guest.block, &place.read(None));
    }
}

#[test]
fn what_was_before_a_stream_that_failed_is_all_that_is_left() {
    let guest = Guest::new("guest.ram", PAGES).run(LOAD);
    let place = Place::new(100);
    fs::write(&place.path, [7; 5000]).unwrap();
    let mut precopy = place.connect(source(&guest)).unwrap();
    precopy.round().unwrap();
    drop(precopy);
    assert_eq!(fs::read(&place.path).unwrap(), [7; 100]);
}

#[test]
fn the_rate_limit_counts_for_pages_at_fixed_places() {
    let guest = Guest::new("guest.ram", PAGES);
    let place = Place::new(0);
    let rate = std::num::NonZeroU64::new(24 << 20);
    let begun = Instant::now();
    let mut precopy = place.connect(source(&guest).mapped_ram(true).channels(2).max_bandwidth(rate)).unwrap();
    precopy.round().unwrap();
    // 12 MiB of pages that are not zero, less what may go at once.
    assert!(begun.elapsed() > Duration::from_millis(300), "{:?}", begun.elapsed());
}

/// Settings that cannot go to a file, or to nothing else: refused before there is one.
#[test]
fn settings_that_files_exclude_are_refused() {
    let guest = Guest::new("guest.ram", PAGES).run(LOAD);
    let place = Place::new(0);
    let there = crate::There::listen();
    let refused = |builder: SourceBuilder, endpoint: &Endpoint, says: &str| {
        let error = builder.timeout(SOON).build().and_then(|source| source.connect(endpoint)).err().unwrap();
        assert!(error.kind() == ErrorKind::ApiMisuse && error.chain().contains(says), "{}", error.chain());
        assert!(!place.is_there());
    };
    let new = || source(&guest);
    let zstd = || std::sync::Arc::new(multifd_codecs::Zstd::default());
    refused(new().channels(2), &place.endpoint, "need mapped-ram");
    refused(new().direct_io(true), &place.endpoint, "direct I/O needs mapped-ram");
    refused(new().return_path(true), &place.endpoint, "nothing comes back");
    refused(new().channel_endpoints(vec![there.uri.clone()]), &there.uri, "there are none");
    refused(new().mapped_ram(true), &there.uri, "file: only");
    refused(new().mapped_ram(true).channels(2).codec(zstd()), &place.endpoint, "excludes compression");
    refused(new().mapped_ram(true).xbzrle(1 << 20), &place.endpoint, "excludes xbzrle");
    // No connection had been made there: the destination is still good.
    let precopy = new().build().unwrap().connect(&there.uri).unwrap();
    move_over(&guest, precopy, 1).unwrap();
    there.end().1.unwrap();
}
