//! Guest memory that faults: a move may fail, and says where; the process goes on, and what was
//! never populated stays so.
#![allow(
    clippy::explicit_write,
    clippy::cast_possible_truncation,
    clippy::indexing_slicing,
    clippy::unwrap_used,
    reason = "test code may panic"
)]

mod destination;
mod kinds;
mod pager;
mod source;

#[path = "../dirty/huge_pages.rs"]
mod huge_pages;
#[path = "../dirty/skip.rs"]
mod skip;

use std::sync::Arc;
use std::time::Duration;

use multifd_codecs::{Zlib, Zstd};
use multifd_engine::{
    Arrived, Destination, DeviceState, Error, ErrorKind, PAGE, Precopy, RamBlock, Report, Source,
    SourceBuilder, UserfaultLog, ZeroPages,
};
use multifd_wire::Configuration;

const SOON: Duration = Duration::from_secs(20);
const PAGES: usize = 64;

/// How pages leave.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Way {
    Single,
    None,
    Zlib,
    Zstd,
    /// Zero pages go as content.
    NoZeros,
    SingleNoZeros,
    /// With marks in the page table where there is no page.
    Logged,
}

const WAYS: [Way; 6] = [Way::Single, Way::None, Way::Zlib, Way::Zstd, Way::NoZeros, Way::SingleNoZeros];

impl Way {
    fn set(self, source: SourceBuilder) -> SourceBuilder {
        match self {
            Self::Single => source,
            Self::None => source.channels(2),
            Self::Zlib => source.channels(2).codec(Arc::new(Zlib::level(1).unwrap())),
            Self::Zstd => source.channels(2).codec(Arc::new(Zstd::level(1).unwrap())),
            Self::NoZeros => source.channels(2).zero_pages(ZeroPages::None),
            Self::Logged => source.channels(2).dirty_log(UserfaultLog::new().unwrap()),
            Self::SingleNoZeros => source.zero_pages(ZeroPages::None),
        }
    }
}

struct Outcome {
    source: Result<Report, Error>,
    destination: Result<Report, Error>,
}

impl Outcome {
    fn success(self, what: &dyn std::fmt::Debug) -> Report {
        if let (Err(error), _) | (_, Err(error)) = (&self.source, &self.destination) {
            panic!("{what:?}: {}", error.chain());
        }
        self.source.unwrap()
    }
}

/// Moves a block; `before_round` is between the list of blocks and the first page.
fn go(way: Way, here: &RamBlock, there: &RamBlock, before_round: impl FnOnce()) -> Outcome {
    go_with(|source| way.set(source).paused_guest(), here, there, before_round)
}

/// The same for a source that is set as `set` does.
fn go_with(
    set: impl FnOnce(SourceBuilder) -> SourceBuilder,
    here: &RamBlock,
    there: &RamBlock,
    before_round: impl FnOnce(),
) -> Outcome {
    go_by(set, here, there, |precopy| {
        before_round();
        finish(precopy)
    })
}

/// The same, by the rounds that `drive` makes.
fn go_by(
    set: impl FnOnce(SourceBuilder) -> SourceBuilder,
    here: &RamBlock,
    there: &RamBlock,
    drive: impl FnOnce(Precopy) -> Result<Report, Error>,
) -> Outcome {
    let destination = Destination::builder(vec![there.clone()])
        .timeout(SOON)
        .listen(&"tcp:127.0.0.1:0".parse().unwrap())
        .unwrap();
    let to = destination.endpoint();
    let canceller = destination.canceller();
    let receive = move || destination.receive().and_then(Arrived::accept);
    let receiver = std::thread::Builder::new().spawn(receive).unwrap();
    let configuration = Configuration::new("test-10.0");
    let source = Source::builder(vec![here.clone()], configuration).timeout(SOON);
    let source = set(source).build().unwrap();
    let moved = source.connect(&to).and_then(drive);
    // A source that has not connected leaves the destination waiting; of another's end it hears.
    if moved.as_ref().is_err_and(|error| error.kind() == ErrorKind::GuestMemory) {
        canceller.cancel();
    }
    Outcome { source: moved, destination: receiver.join().unwrap() }
}

fn finish(mut precopy: Precopy) -> Result<Report, Error> {
    precopy.round()?;
    precopy.stop_copy()?.commit(&DeviceState::opaque("test", 1, b"state"))
}

fn page(block: &RamBlock, page: usize) -> [u8; PAGE] {
    let mut content = [0; PAGE];
    assert!(block.read_page(page, &mut content), "page {page}");
    content
}

fn fill(block: &RamBlock, pages: std::ops::Range<usize>) {
    for page in pages {
        let content: Vec<u8> = (0..PAGE).map(|at| (page * 31 + at) as u8 | 1).collect();
        block.memory().slice(page * PAGE, PAGE).unwrap().copy_from(&content);
    }
}
