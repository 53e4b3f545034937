//! Links that do not come back, come back to less, or carry what was not sent.

use std::sync::Arc;
use std::time::Duration;

use multifd_codecs::Zstd;
use multifd_engine::ErrorKind;
use multifd_transports::{TlsClient, TlsServer};

use super::relay::{Fate, Relay};
use super::{Set, There, resuming, still_guest, still_source};
use crate::credentials::credentials;
use crate::guest::Guest;
use crate::{LOAD, PAGES, SOON, a_second_attempt_succeeds, assert_equal, move_over, no_devices, source};

const SHORT: Duration = Duration::from_millis(700);

#[test]
fn a_link_that_does_not_come_back_in_time_ends_the_move_and_the_guest_runs_on() {
    let guest = Guest::new("guest.ram", PAGES).run(LOAD);
    let there = There::waiting_for(Some(SHORT));
    let relay = Relay::to(&there.uri, 2, |_| Fate::Whole);
    let builder = source(&guest).channels(2).resume_for(Some(SHORT));
    let mut precopy = builder.build().unwrap().connect(&relay.uri).unwrap();
    precopy.round().unwrap();
    relay.go_down();
    let error = move_over(&guest, precopy, 9).unwrap_err();
    assert!(error.source_may_resume() && error.kind() == ErrorKind::Transport, "{}", error.chain());
    assert!(error.chain().contains("no new link within 700ms after the last one broke"), "{}", error.chain());
    let error = there.end().1.unwrap_err();
    assert!(error.chain().contains("the source has not come back within 700ms"), "{}", error.chain());
    guest.resume();
    a_second_attempt_succeeds(&guest);
}

#[test]
fn an_end_that_does_not_wait_ends_the_move_as_ever() {
    for (here, there) in [(None, Some(SOON)), (Some(SOON), None)] {
        let guest = Guest::new("guest.ram", PAGES).run(LOAD);
        let there = There::waiting_for(there);
        let relay = Relay::to(&there.uri, 2, |_| Fate::Whole);
        let builder = source(&guest).channels(2).resume_for(here);
        let mut precopy = builder.build().unwrap().connect(&relay.uri).unwrap();
        precopy.round().unwrap();
        relay.go_down();
        let error = move_over(&guest, precopy, 9).unwrap_err();
        assert!(error.source_may_resume(), "{}", error.chain());
        there.canceller.cancel();
        there.end().1.unwrap_err();
        guest.resume();
        a_second_attempt_succeeds(&guest);
    }
}

#[test]
fn a_cancel_ends_the_wait_for_a_link_at_either_end() {
    let guest = Guest::new("guest.ram", PAGES).run(LOAD);
    let there = There::waiting_for(Some(Duration::from_secs(3600)));
    let relay = Relay::to(&there.uri, 1, |_| Fate::Whole);
    let builder = source(&guest).channels(1).resume_for(Some(Duration::from_secs(3600)));
    let mut precopy = builder.build().unwrap().connect(&relay.uri).unwrap();
    precopy.round().unwrap();
    relay.go_down();
    let canceller = precopy.canceller();
    let cancel = std::thread::Builder::new().spawn(move || canceller.cancel()).unwrap();
    let error = move_over(&guest, precopy, 9).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Cancelled, "{}", error.chain());
    assert!(error.source_may_resume() && cancel.join().unwrap());
    there.canceller.cancel();
    assert_eq!(there.end().1.unwrap_err().kind(), ErrorKind::Cancelled);
}

#[test]
fn a_destination_that_knows_nothing_says_so_and_gets_everything_if_that_is_allowed() {
    for allowed in [false, true] {
        let guest = Guest::new("guest.ram", PAGES).run(LOAD);
        let (first, second) = (There::waiting_for(Some(SOON)), There::waiting_for(Some(SOON)));
        let relay = Relay::to(&first.uri, 2, |_| Fate::Whole);
        let way = |source: multifd_engine::SourceBuilder| {
            source.channels(2).codec(Arc::new(Zstd::default())).resume_anew(allowed)
        };
        let mut precopy = resuming(&guest, way, &relay.uri);
        precopy.round().unwrap();
        relay.turn_to(&second.uri);
        relay.cut();
        let moved = move_over(&guest, precopy, 4);
        first.canceller.cancel();
        first.end().1.unwrap_err();
        if !allowed {
            let error = moved.unwrap_err();
            assert!(
                error.source_may_resume() && error.kind() == ErrorKind::Incompatible,
                "{}",
                error.chain()
            );
            assert!(
                error.chain().contains("the destination knows nothing of this migration"),
                "{}",
                error.chain()
            );
            second.canceller.cancel();
            second.end().1.unwrap_err();
            guest.resume();
            a_second_attempt_succeeds(&guest);
            continue;
        }
        assert_eq!(moved.unwrap().progress.bytes_not_repeated, 0);
        let (block, received) = second.end();
        received.unwrap();
        assert_equal(&guest.block, &block);
    }
}

#[test]
fn an_encrypted_link_is_replaced_by_another() {
    let dir = credentials("CA");
    let guest = Guest::new("guest.ram", PAGES).run(LOAD);
    let there = There::with(Some(SOON), Some(TlsServer::from_directory(dir.path()).unwrap()));
    let relay = Relay::to(&there.uri, 2, |number| if number < 3 { Fate::Cut(900_000) } else { Fate::Whole });
    let client = TlsClient::from_directory(dir.path()).unwrap();
    let precopy = resuming(&guest, |source| source.channels(2).tls(client), &relay.uri);
    let sent = move_over(&guest, precopy, 3).unwrap();
    assert!(sent.progress.resumptions > 0);
    let (block, received) = there.end();
    received.unwrap();
    assert_equal(&guest.block, &block);
}

#[test]
fn channels_whose_network_is_gone_are_left_out_of_the_next_link() {
    let guest = Guest::new("guest.ram", PAGES).run(LOAD);
    let there = There::waiting_for(Some(SOON));
    let one = Relay::to(&there.uri, 2, |_| Fate::Whole);
    let other = one.another();
    let endpoints = vec![one.uri.clone(), other.uri.clone()];
    let way = |source: multifd_engine::SourceBuilder| source.channels(2).channel_endpoints(endpoints);
    let mut precopy = resuming(&guest, way, &one.uri);
    precopy.round().unwrap();
    other.end();
    let sent = move_over(&guest, precopy, 4).unwrap();
    assert!(sent.progress.resumptions > 0);
    let (block, received) = there.end();
    received.unwrap();
    assert_equal(&guest.block, &block);
}

/// A packet with checksums whose bit flips is asked for again, by a new link.
#[test]
fn a_bit_that_flips_on_the_way_is_found_and_the_pages_go_again() {
    let block = still_guest();
    let ways: [Set; 2] =
        [|source| source.channels(1), |source| source.channels(1).codec(Arc::new(Zstd::default()))];
    for way in ways {
        for byte in [1500, 1600, 2000, 30_000, 400_000, 1_000_001] {
            let there = There::waiting_for(Some(SOON));
            let plan = move |number| if number == 1 { Fate::Flip(byte) } else { Fate::Whole };
            let relay = Relay::to(&there.uri, 1, plan);
            let source = way(still_source(&block)).checksums(true).digest(true).resume_for(Some(SOON));
            let mut precopy = source.build().unwrap().connect(&relay.uri).unwrap();
            precopy.round().unwrap();
            let report = precopy.stop_copy().unwrap().commit(&no_devices()).unwrap();
            let (there, received) = there.end();
            received.unwrap();
            assert_equal(&block, &there);
            // A bit of a codec's own that changes no page is no fault.
            assert!(report.progress.resumptions <= 1, "{byte}");
        }
    }
}

#[test]
fn a_link_on_which_every_packet_changes_ends_the_move_with_words() {
    let block = still_guest();
    let there = There::waiting_for(Some(SOON));
    let plan = |number| if number % 2 == 1 { Fate::Flip(400_000) } else { Fate::Whole };
    let relay = Relay::to(&there.uri, 1, plan);
    let source = still_source(&block).channels(1).checksums(true).digest(true).resume_for(Some(SOON));
    let sent = source.build().unwrap().connect(&relay.uri).and_then(|mut precopy| {
        precopy.round()?;
        precopy.stop_copy()?.commit(&no_devices())
    });
    let (there, received) = there.end();
    match sent {
        // Fewer bytes than that were left in the end.
        Ok(_) => {
            received.unwrap();
            assert_equal(&block, &there);
        }
        Err(error) => {
            assert!(error.source_may_resume(), "{}", error.chain());
            assert!(received.unwrap_err().chain().contains("was changed on the way"));
        }
    }
}
