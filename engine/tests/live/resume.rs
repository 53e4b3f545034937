//! A link that breaks before the guest is handed over is replaced, and the move goes on where it
//! was.

mod link;
mod relay;
mod strangers;

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use multifd_codecs::{Lz4, Zstd};
use multifd_engine::{
    Arrived, Canceller, Destination, Error, HostMemory, PAGE, Precopy, RamBlock, Report, Source,
    SourceBuilder,
};
use multifd_transports::{Endpoint, TlsServer};
use multifd_wire::Configuration;

use crate::guest::Guest;
use crate::{LOAD, PAGES, SOON, assert_equal, copy, move_over, source};
use relay::{Fate, Relay};

type Set = fn(SourceBuilder) -> SourceBuilder;

/// A destination that waits for its source to come back.
struct There {
    uri: Endpoint,
    block: RamBlock,
    canceller: Canceller,
    thread: JoinHandle<Result<Report, Error>>,
}

impl There {
    fn waiting_for(limit: Option<Duration>) -> Self {
        Self::with(limit, None)
    }

    fn with(limit: Option<Duration>, tls: Option<TlsServer>) -> Self {
        let block =
            RamBlock::new("guest.ram".try_into().unwrap(), HostMemory::anonymous(PAGES * PAGE).unwrap());
        copy(&Guest::new("garbage", PAGES).block, &block);
        let mut builder = Destination::builder(vec![block.clone()]).timeout(SOON).resume_for(limit);
        if let Some(tls) = tls {
            builder = builder.tls(tls);
        }
        let destination = builder.listen(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap();
        let (uri, canceller) = (destination.endpoint(), destination.canceller());
        let receive = move || destination.receive().and_then(Arrived::accept);
        let thread = std::thread::Builder::new().spawn(receive).unwrap();
        Self { uri, block, canceller, thread }
    }

    fn end(self) -> (RamBlock, Result<Report, Error>) {
        (self.block, self.thread.join().unwrap())
    }
}

/// Every way of moving that a link can break in.
fn ways() -> [(usize, Set); 5] {
    [
        (0, |source| source),
        (2, |source| source.channels(2)),
        (0, |source| source.xbzrle(64 << 20).digest(true)),
        (3, |source| source.channels(3).codec(Arc::new(Zstd::default()))),
        (2, |source| source.channels(2).codec(Arc::new(Lz4)).xbzrle(64 << 20).audit(true)),
    ]
}

fn resuming(guest: &Guest, way: impl FnOnce(SourceBuilder) -> SourceBuilder, uri: &Endpoint) -> Precopy {
    way(source(guest)).resume_for(Some(SOON)).build().unwrap().connect(uri).unwrap()
}

/// Moves a guest that writes all the time over links that break as `plan` says.
fn moves(
    (channels, way): (usize, Set),
    plan: impl Fn(usize) -> Fate + Send + Sync + 'static,
) -> (Report, Report) {
    let guest = Guest::new("guest.ram", PAGES).run(LOAD);
    let there = There::waiting_for(Some(SOON));
    let relay = Relay::to(&there.uri, channels, plan);
    let sent = move_over(&guest, resuming(&guest, way, &relay.uri), 3).unwrap();
    let (block, received) = there.end();
    assert_equal(&guest.block, &block);
    (sent, received.unwrap())
}

#[test]
fn a_move_whose_connections_are_cut_again_and_again_arrives_whole() {
    for way in ways() {
        // Each connection of the first links, whichever comes to it first.
        let plan =
            |number| if number < 7 { Fate::Cut(300_007 * (1 + number as u64 % 3)) } else { Fate::Whole };
        let (sent, received) = moves(way, plan);
        assert!(sent.progress.resumptions > 0 && received.progress.resumptions > 0, "{:?}", sent.progress);
        assert!(sent.progress.bytes_not_repeated > 0, "{:?}", sent.progress);
    }
}

#[test]
fn all_connections_are_cut_at_once_and_again_while_they_are_replaced() {
    // While it introduces itself, while it is told what has come, in its first bytes.
    for after in [1, 30, 53, 60, 90, 91, 200, 700] {
        let plan = move |number| match number {
            1 => Fate::CutAll(1_000_000),
            2 | 3 => Fate::Cut(after),
            _ => Fate::Whole,
        };
        let (sent, _) = moves((1, |source| source.channels(1)), plan);
        assert!(sent.progress.resumptions > 0, "{after}");
    }
}

/// Pages that do not compress, of a guest that stands still.
fn still_guest() -> RamBlock {
    Guest::new("guest.ram", PAGES).block.clone()
}

fn still_source(block: &RamBlock) -> SourceBuilder {
    Source::builder(vec![block.clone()], Configuration::new("test-10.0")).paused_guest().timeout(SOON)
}

#[test]
fn after_a_cut_at_nine_tenths_of_the_first_round_little_goes_again() {
    let block = still_guest();
    let whole = |plan: fn(usize, u64) -> Fate, most: u64, (channels, way): (usize, Set)| {
        let there = There::waiting_for(Some(SOON));
        let relay = Relay::to(&there.uri, channels, move |number| plan(number, most));
        let source = way(still_source(&block)).resume_for(Some(SOON)).build().unwrap();
        let mut precopy = source.connect(&relay.uri).unwrap();
        precopy.round().unwrap();
        let report = precopy.stop_copy().unwrap().commit(&crate::no_devices()).unwrap();
        let (there, received) = there.end();
        received.unwrap();
        assert_equal(&block, &there);
        (relay.passed(), report)
    };
    let ways: [(usize, Set); 2] = [(0, |source| source), (1, |source| source.channels(1).checksums(true))];
    for way in ways {
        let (bytes, report) = whole(|_, _| Fate::Whole, 0, way);
        assert_eq!((report.progress.resumptions, report.progress.bytes_not_repeated), (0, 0));
        let cut: fn(usize, u64) -> Fate = match way.0 {
            0 => |number, most| if number == 0 { Fate::CutAll(most) } else { Fate::Whole },
            _ => |number, most| if number == 1 { Fate::CutAll(most) } else { Fate::Whole },
        };
        let (with_cut, report) = whole(cut, bytes * 9 / 10, way);
        assert!(with_cut < bytes + bytes * 15 / 100, "{with_cut} bytes with a cut, {bytes} without");
        assert_eq!(report.progress.resumptions, 1);
        assert!(report.progress.bytes_not_repeated > (PAGES * PAGE) as u64 * 3 / 4, "{:?}", report.progress);
        let figures = serde_json::to_value(report.figures()).unwrap();
        assert_eq!(figures["resumptions"], 1);
    }
}

#[test]
fn a_link_that_breaks_between_two_calls_is_replaced_in_the_next() {
    for (channels, way) in ways() {
        let guest = Guest::new("guest.ram", PAGES).run(LOAD);
        let there = There::waiting_for(Some(SOON));
        let relay = Relay::to(&there.uri, channels, |_| Fate::Whole);
        let mut precopy = resuming(&guest, way, &relay.uri);
        precopy.round().unwrap();
        relay.cut();
        guest.wait_for_writes();
        precopy.round().unwrap();
        // The last round: the guest stands still.
        guest.pause();
        relay.cut();
        let last = precopy.stop_copy().unwrap();
        // All of RAM is there, and the device state is to come.
        relay.cut();
        let report = last.commit(&crate::no_devices()).unwrap();
        assert!(report.progress.resumptions >= 3, "{:?}", report.progress);
        let (block, received) = there.end();
        received.unwrap();
        assert_equal(&guest.block, &block);
    }
}
