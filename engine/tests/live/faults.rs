//! Whatever breaks, wherever: the guest runs on, and a second attempt brings it over whole.

use std::time::Duration;

use multifd_engine::{CheckpointWriter, Error, Precopy};

use crate::guest::Guest;
use crate::relay::{Cut, Relay};
use crate::{LOAD, PAGES, There, a_second_attempt_succeeds, move_over, no_devices, source};

/// A migration that must fail, then one that must not.
fn fails_then_moves(attempt: impl FnOnce(&Guest, &There) -> Result<(), Error>) -> Error {
    let guest = Guest::new("guest.ram", PAGES).run(LOAD);
    let there = There::listen();
    let error = attempt(&guest, &there).unwrap_err();
    assert!(error.channel().is_some() || error.source_may_resume(), "{}", error.chain());
    assert!(there.end().1.is_err());
    guest.resume();
    a_second_attempt_succeeds(&guest);
    error
}

/// Three connections: main, and two channels.
fn connect(guest: &Guest, relay: &Relay) -> Result<Precopy, Error> {
    source(guest).channels(2).build().unwrap().connect(&relay.uri)
}

#[test]
fn a_connection_cut_at_any_byte() {
    for connection in 0..3 {
        // In the greeting, in the first header, in the first pages, in later ones.
        for after in [1, 70, 1000, 1500, 40_000, 1_000_000] {
            if connection == 0 && after > 100 {
                continue; // main carries little beside the pages
            }
            let error = fails_then_moves(|guest, there| {
                let relay = Relay::to(&there.uri, Some(Cut { connection, after }));
                let precopy = connect(guest, &relay)?;
                move_over(guest, precopy, 20).map(drop)
            });
            assert!(error.source_may_resume(), "{connection} {after}: {}", error.chain());
        }
    }
}

#[test]
fn everything_cut_between_rounds() {
    let error = fails_then_moves(|guest, there| {
        let relay = Relay::to(&there.uri, None);
        let mut precopy = connect(guest, &relay)?;
        precopy.round()?;
        relay.cut();
        guest.wait_for_writes();
        precopy.round()?;
        precopy.round().map(drop)
    });
    assert!(error.source_may_resume());
}

#[test]
fn everything_cut_at_the_switch_over() {
    let error = fails_then_moves(|guest, there| {
        let relay = Relay::to(&there.uri, None);
        let mut precopy = connect(guest, &relay)?;
        precopy.round()?;
        guest.pause();
        relay.cut();
        precopy.stop_copy()?.commit(&no_devices()).map(drop)
    });
    // Sent into a connection that is cut already: known to have failed, or not known to have
    // arrived.
    assert!(error.channel().is_some(), "{}", error.chain());
}

#[test]
fn a_destination_that_refuses_the_guest() {
    let guest = Guest::new("guest.ram", PAGES).run(LOAD);
    let there = There::listen_with(|arrived| {
        drop(arrived);
        // No place to keep it.
        Err(CheckpointWriter::create("/proc/guest".as_ref()).err().unwrap())
    });
    let precopy = source(&guest).channels(2).build().unwrap().connect(&there.uri).unwrap();
    let error = move_over(&guest, precopy, 2).unwrap_err();
    assert_eq!(error.kind(), multifd_engine::ErrorKind::PeerAborted(1));
    assert!(error.source_may_resume(), "everything was sent, but the destination said no");
    assert_eq!(error.phase(), multifd_engine::Phase::Device, "where it was, not who may run");
}

#[test]
fn a_cancel_at_any_moment() {
    for moment in 0..12 {
        fails_then_moves(|guest, there| {
            let mut precopy = source(guest).channels(2).build().unwrap().connect(&there.uri)?;
            let control = precopy.control();
            let waiting = std::thread::Builder::new()
                .spawn(move || {
                    let begun = std::time::Instant::now();
                    while begun.elapsed() < Duration::from_micros(1 << moment) {
                        std::thread::yield_now();
                    }
                    control.cancel();
                })
                .unwrap();
            let result = loop {
                if let Err(error) = precopy.round() {
                    break Err(error);
                }
            };
            waiting.join().unwrap();
            result
        });
    }
}
