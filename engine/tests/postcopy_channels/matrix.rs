//! Every kind of channel, and every order in which a guest uses its memory.

use std::sync::Arc;
use std::thread;

use multifd_codecs::{Codec, Uncompressed, Zstd};
use multifd_engine::transports::Endpoint;
use multifd_engine::wire::Configuration;
use multifd_engine::{
    Destination, DeviceState, HostMemory, PAGE, PostcopyEnd, RamBlock, Report, Served, Source,
};

use super::guest::{self, Order};
use super::huge_pages::HugePages;
use super::ram;
use super::{Ends, Move, SOON, arrived, missing, pages_on, skip, switch, until};

/// Moves a guest after `rounds`, whose threads use all of its memory as soon as it may run at the
/// destination, and compares every page. The source's report.
fn moved(how: &Move, rounds: usize) -> Report {
    let Ends { here, there, source, marker, destination, control, sent, credentials } = Ends::new(how);
    let to = destination.endpoint();
    let (sent, received) = thread::scope(|scope| {
        let serving = scope.spawn(|| {
            let mut postcopy = switch(source, &here, &marker, &to, rounds);
            match postcopy.serve().unwrap() {
                Served::Completed(report) => *report,
                Served::Paused(error) => panic!("the source: {}", error.chain()),
            }
        });
        let mut guest = arrived(destination);
        let threads = scope.spawn(|| guest::run(&there, &here, how.order));
        let waiting = scope.spawn(move || match guest.wait().unwrap() {
            PostcopyEnd::Completed(received) => received,
            PostcopyEnd::Paused(error) => panic!("the destination: {}", error.chain()),
        });
        // Until then only what is asked for goes: threads that wait are certain, and so are
        // neighbours of one in order.
        let pushed = u64::from(how.order == Order::Ascending && how.urgent > 0);
        until(&sent, "requests", |sent| sent.requests > 2 && sent.neighbours_pushed >= pushed);
        control.set_max_postcopy_bandwidth(None);
        threads.join().unwrap();
        (serving.join().unwrap(), waiting.join().unwrap())
    });
    guest::check(&there, &here);
    drop(credentials);
    assert_eq!(received.progress.recoveries, 0);
    assert_eq!(received.progress.channels, how.channels as u64);
    sent
}

fn codecs() -> [Arc<dyn Codec>; 2] {
    [Arc::new(Uncompressed), Arc::new(Zstd::level(1).unwrap())]
}

/// Every combination of the channels' number, codec and encryption.
fn kinds(order: Order, memfd: bool) {
    if missing() {
        return;
    }
    for channels in [1, 4] {
        for codec in codecs() {
            for tls in [false, true] {
                let codec = Arc::clone(&codec);
                let how = Move { channels, codec, tls, order, memfd, ..Move::default() };
                let report = moved(&how, 2);
                let kind = (channels, how.codec.name(), tls);
                // Two rounds have taken the guest's pages once at least; the rest is more than a
                // round's.
                let bulk = pages_on(&report.progress, "channel");
                let asked = pages_on(&report.progress, "urgent");
                assert!(bulk >= 2348, "{kind:?}: {bulk} pages on channels");
                assert!(asked > 0, "{kind:?}: {:?}", report.progress.per_channel);
                assert_eq!(pages_on(&report.progress, "main"), zeros_of_firmware(), "{kind:?}");
            }
        }
    }
}

/// No block here is firmware, whose zero pages go on main in rounds.
fn zeros_of_firmware() -> u64 {
    0
}

#[test]
fn a_guest_reads_and_writes_in_order_while_its_memory_comes_over_channels() {
    kinds(Order::Ascending, false);
}

#[test]
fn a_guest_reads_and_writes_at_random_while_its_memory_comes_over_channels() {
    kinds(Order::Random, false);
}

#[test]
fn sixteen_threads_read_and_write_at_once_while_their_memory_comes_over_channels() {
    kinds(Order::Many, false);
}

#[test]
fn memory_that_is_shared_with_a_file_comes_over_channels() {
    kinds(Order::Many, true);
}

#[test]
fn a_guest_of_huge_pages_runs_while_they_come_over_channels() {
    if missing() {
        return;
    }
    let pages: usize = ram::HUGE_BLOCKS.iter().map(|(_, pages)| pages).sum();
    let _pool = match HugePages::reserve(2 * pages * PAGE / (2 << 20)) {
        Ok(pool) => pool,
        Err(why) => return skip::skipped(&why),
    };
    for codec in codecs() {
        let report = moved(&Move { codec: Arc::clone(&codec), huge: true, ..Move::default() }, 2);
        let asked = pages_on(&report.progress, "urgent");
        assert!(
            asked > 0 && asked.is_multiple_of(512),
            "{}: {asked} pages, expected whole ones",
            codec.name()
        );
        assert_eq!(report.progress.neighbours_pushed, 0, "a huge page has its neighbours with it");
    }
}

#[test]
fn pages_that_are_asked_for_go_on_as_many_channels_as_are_set_and_without_any_on_main() {
    if missing() {
        return;
    }
    for urgent in [0, 3, 8] {
        for order in [Order::Ascending, Order::Many] {
            let report = moved(&Move { urgent, order, ..Move::default() }, 1);
            let progress = &report.progress;
            let channels = progress.per_channel.iter().filter(|channel| channel.name == "urgent");
            assert_eq!(channels.count(), urgent, "{order:?}");
            let name = if urgent == 0 { "main" } else { "urgent" };
            assert!(pages_on(progress, name) > 0, "{urgent} {order:?}: {:?}", progress.per_channel);
            assert!(urgent > 0 || progress.neighbours_pushed == 0, "{progress:?}");
        }
    }
}

#[test]
fn a_guest_that_switches_before_its_first_round_comes_over_channels() {
    if !missing() {
        moved(&Move { channels: 4, ..Move::default() }, 0);
    }
}

/// Pages that are only there as wholes of 2 MiB at the source take several packets.
#[test]
fn a_guest_that_runs_nowhere_is_received_over_channels_in_huge_pages_too() {
    for (host_page, codec) in codecs().into_iter().flat_map(|codec| [(PAGE, codec.clone()), (2 << 20, codec)])
    {
        let [here, there] = [0, 1].map(|_| {
            let memory = HostMemory::anonymous(8 << 20).unwrap();
            RamBlock::new("pc.ram".try_into().unwrap(), memory)
        });
        (0..here.pages()).filter(|page| page % 5 != 0).for_each(|page| ram::write(&here, page, 3));
        let any: Endpoint = "tcp:127.0.0.1:0".parse().unwrap();
        let destination =
            Destination::builder(vec![there.clone()]).postcopy(true).timeout(SOON).listen(&any).unwrap();
        let to = destination.endpoint();
        let source = Source::builder(
            vec![here.clone().with_host_page_size(host_page)],
            Configuration::new("test-10.0"),
        )
        .paused_guest()
        .channels(3)
        .codec(codec)
        .postcopy(true)
        .timeout(SOON)
        .build()
        .unwrap();
        let report = thread::scope(|scope| {
            let serving = scope.spawn(|| {
                let precopy = source.connect(&to).unwrap();
                precopy.switch_to_postcopy(&DeviceState::none()).unwrap().serve().unwrap()
            });
            destination.receive().unwrap().accept().unwrap();
            serving.join().unwrap()
        });
        let Served::Completed(report) = report else { panic!("{report:?}") };
        assert_eq!(pages_on(&report.progress, "channel"), here.pages() as u64);
        for page in 0..here.pages() {
            assert!(ram::load(&there, page) == ram::load(&here, page), "page {page}");
        }
    }
}
