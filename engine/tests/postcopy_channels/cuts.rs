//! Links that break, and are replaced with all of their channels.

use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use multifd_codecs::Zstd;
use multifd_engine::transports::{Endpoint, Listener, TlsServer};
use multifd_engine::{MigrationState, Postcopy, PostcopyEnd, PostcopyGuest, Report, Served};

use super::guest;
use super::relay::{Cut, Relay};
use super::{Ends, Move, SOON, arrived, listen, missing, pages_on, switch, until};

/// Where the destination waits for its source, at the moment.
#[derive(Default)]
struct Meeting(Mutex<Option<Endpoint>>);

impl Meeting {
    fn at(&self) -> Option<Endpoint> {
        self.0.lock().unwrap().clone()
    }
}

/// Serves to the end, over as many links as it takes.
fn serve(mut postcopy: Postcopy, meeting: &Meeting) -> Report {
    let begun = Instant::now();
    loop {
        if let Served::Completed(report) = postcopy.serve().unwrap() {
            return *report;
        }
        loop {
            assert!(begun.elapsed() < SOON, "no new link");
            let Some(to) = meeting.at() else {
                thread::yield_now();
                continue;
            };
            match postcopy.recover(&to, Duration::from_millis(300)) {
                Ok(()) => break,
                // The next listener may be another.
                Err(error) => assert!(!error.source_may_resume(), "{error}"),
            }
        }
    }
}

/// Waits for the RAM to the end, over as many links as it takes: each of `cuts` breaks one of them.
fn wait(mut guest: PostcopyGuest, meeting: &Meeting, mut cuts: Vec<Cut>, tls: Option<&TlsServer>) -> Report {
    cuts.reverse();
    let mut relays = Vec::new();
    loop {
        if let PostcopyEnd::Completed(report) = guest.wait().unwrap() {
            return *report;
        }
        let (listener, at): (Listener, Endpoint) = listen();
        let listener = listener.tls(tls.cloned());
        let relay = Relay::to(&at, cuts.pop());
        *meeting.0.lock().unwrap() = Some(relay.uri.clone());
        relays.push(relay);
        guest.recover(listener, SOON).unwrap();
    }
}

/// Moves a guest over a link of which connection `first` is cut while the guest waits for pages,
/// and over others which `cuts` break: the source's report.
fn moved(how: &Move, first: usize, cuts: &[Cut]) -> Report {
    let Ends { here, there, source, marker, destination, control, sent, credentials } = Ends::new(how);
    let relay = Relay::to(&destination.endpoint(), None);
    let tls = credentials.as_ref().map(|dir| TlsServer::from_directory(dir.path()).unwrap());
    let meeting = Meeting::default();
    let (report, received) = thread::scope(|scope| {
        let serving = scope.spawn(|| serve(switch(source, &here, &marker, &relay.uri, 2), &meeting));
        let guest = arrived(destination);
        let threads = scope.spawn(|| guest::run(&there, &here, how.order));
        let waiting = scope.spawn(|| wait(guest, &meeting, cuts.to_vec(), tls.as_ref()));
        until(&sent, "requests", |sent| sent.requests > 2);
        let states = control.state_changes();
        relay.cut(first);
        // Everything goes over the link that replaces it, and not before that one has broken.
        while states.recv_timeout(SOON).unwrap() != MigrationState::PostcopyPaused {}
        control.set_max_postcopy_bandwidth(None);
        threads.join().unwrap();
        (serving.join().unwrap(), waiting.join().unwrap())
    });
    guest::check(&there, &here);
    assert!(received.progress.recoveries >= 1);
    report
}

/// Connections of the first link, in the order in which they are made: main, two channels, one for
/// pages that are asked for.
const MAIN: usize = 0;
const CHANNEL: usize = 2;
const URGENT: usize = 3;

#[test]
fn a_link_of_which_any_connection_is_cut_is_replaced_with_all_of_them() {
    if missing() {
        return;
    }
    for first in [MAIN, CHANNEL, URGENT] {
        let report = moved(&Move::default(), first, &[]);
        assert!(report.postcopy.unwrap().recoveries >= 1, "{first}");
        let of = |name: &str| report.progress.per_channel.iter().filter(|of| of.name == name).count();
        assert_eq!((of("channel 0"), of("channel 1"), of("urgent")), (2, 2, 2), "{first}");
    }
}

#[test]
fn a_link_is_replaced_with_its_codec_and_encrypted() {
    if missing() {
        return;
    }
    let codec = Arc::new(Zstd::level(1).unwrap());
    let how = Move { codec, tls: true, channels: 4, urgent: 2, ..Move::default() };
    let report = moved(&how, CHANNEL, &[]);
    assert!(pages_on(&report.progress, "channel") >= 2348, "{:?}", report.progress);
}

#[test]
fn a_link_that_breaks_while_it_is_set_up_or_soon_after_is_replaced_by_another() {
    if missing() {
        return;
    }
    let cut = |connection, after| Cut { connection, after };
    // Within the commands on main; within a channel's first packet, its header, its pages; within
    // the first record.
    let cuts =
        [cut(MAIN, 5), cut(MAIN, 20), cut(1, 30), cut(CHANNEL, 200), cut(CHANNEL, 9000), cut(URGENT, 8)];
    for cut in cuts {
        moved(&Move::default(), CHANNEL, &[cut]);
    }
    moved(&Move::default(), MAIN, &cuts);
}
