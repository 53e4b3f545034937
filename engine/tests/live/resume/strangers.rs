//! Connections that are not the source's, and the hand-over.

use std::io::{Read, Write};
use std::net::TcpStream;

use multifd_wire::{InitialPacket, MigrationId, ResumeOpening, ReturnMessage, StreamHeader};

use super::relay::{Fate, Relay, address};
use super::{There, resuming, still_guest, still_source};
use crate::guest::Guest;
use crate::{LOAD, PAGES, SOON, assert_equal, move_over, no_devices};
use multifd_engine::{Error, Report};
use std::time::Duration;

/// What the destination answers to these bytes, until it ends the connection.
fn answer(to: &str, bytes: &[u8], more: impl Fn(&[u8]) -> Vec<u8>) -> Vec<u8> {
    let mut stream = loop {
        // It listens again in a moment.
        match TcpStream::connect(to) {
            Ok(stream) => break stream,
            Err(_) => std::thread::yield_now(),
        }
    };
    stream.set_read_timeout(Some(SOON)).unwrap();
    stream.write_all(bytes).unwrap();
    let (mut said, mut piece) = (Vec::new(), [0; 256]);
    loop {
        match stream.read(&mut piece) {
            Ok(0) => return said,
            Ok(count) => said.extend(&piece[..count]),
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return said,
            Err(error) => panic!("the destination keeps a stranger waiting: {error}"),
        }
        let more = more(&said);
        if stream.write_all(&more).is_err() {
            return said;
        }
    }
}

/// What the destination has said that it knows the migration by, in the clear.
fn id_in(said: &[u8]) -> MigrationId {
    let at = said.windows(4).position(|bytes| bytes == [0x4d, 0x50, 0, 16]).unwrap() + 4;
    MigrationId(said[at..at + 16].try_into().unwrap())
}

#[test]
fn strangers_that_would_go_on_with_the_move_are_refused_and_the_source_still_comes() {
    let guest = Guest::new("guest.ram", PAGES).run(LOAD);
    let there = There::waiting_for(Some(SOON));
    let to = address(&there.uri);
    let relay = Relay::to(&there.uri, 2, |_| Fate::Whole);
    let mut precopy = resuming(&guest, |source| source.channels(2), &relay.uri);
    precopy.round().unwrap();
    relay.go_down();
    let id = id_in(&relay.said());
    let mut not_known = Vec::new();
    ReturnMessage::NotKnown.encode(&mut not_known);
    let nothing = |_: &[u8]| Vec::new();
    // Of another migration.
    let other = ResumeOpening { id: MigrationId([7; 16]), nonce: [1; 32] };
    assert_eq!(answer(&to, &other.encode(), nothing), not_known);
    // It knows the id, as all do that hear the link, and nothing of the secret.
    let opening = ResumeOpening { id, nonce: [2; 32] };
    for proof in [[0; 32], [0xff; 32]] {
        let said = answer(&to, &opening.encode(), |said| match said.len() {
            68 => [&[0x08, 0x4d, 0x52, 0, 32][..], &proof].concat(),
            _ => Vec::new(),
        });
        let (challenge, used) = ReturnMessage::parse(&said).unwrap().unwrap();
        assert!(matches!(challenge, ReturnMessage::Challenge { .. }) && used == said.len(), "{said:?}");
    }
    // The destination's own proof is not that of a source.
    let said = answer(&to, &opening.encode(), |said| match said.len() {
        68 => [&[0x08, 0x4d, 0x52, 0, 32][..], &said[36..68]].concat(),
        _ => Vec::new(),
    });
    assert_eq!(said.len(), 68);
    // A channel, and a move of another guest.
    let hello = InitialPacket { uuid: [0; 16], channel: 0 };
    assert!(answer(&to, &hello.encode(), nothing).is_empty());
    let mut header = Vec::new();
    StreamHeader.encode(&mut header);
    assert!(answer(&to, &header, nothing).is_empty());
    relay.come_back();
    let sent = move_over(&guest, precopy, 3).unwrap();
    assert!(sent.progress.resumptions > 0);
    let (block, received) = there.end();
    received.unwrap();
    assert_equal(&guest.block, &block);
}

/// Neither the keys nor what is made of them tell the secret; each link asks for a proof of its
/// own.
#[test]
fn a_proof_of_one_link_is_none_of_another() {
    let guest = Guest::new("guest.ram", PAGES).run(LOAD);
    let there = There::waiting_for(Some(SOON));
    let relay = Relay::to(&there.uri, 0, |_| Fate::Whole);
    let mut precopy = resuming(&guest, |source| source, &relay.uri);
    for _ in 0..2 {
        precopy.round().unwrap();
        relay.cut();
        guest.wait_for_writes();
    }
    move_over(&guest, precopy, 4).unwrap();
    let said = relay.said();
    let challenges: Vec<_> =
        said.windows(4).enumerate().filter(|(_, bytes)| *bytes == [0x4d, 0x52, 0, 64]).collect();
    let numbers: Vec<_> = challenges.iter().map(|(at, _)| &said[at + 4..at + 36]).collect();
    assert!(numbers.len() >= 2 && numbers[0] != numbers[1]);
    let (block, received) = there.end();
    received.unwrap();
    assert_equal(&guest.block, &block);
}

/// Bytes of main, and what both ends say, of a move that is cut when so many have gone there.
fn cut_on_main(after: Option<u64>) -> (u64, Result<Report, Error>, Result<Report, Error>) {
    const LIMIT: Duration = Duration::from_millis(500);
    let block = still_guest();
    let there = There::waiting_for(Some(LIMIT));
    let plan = move |number| match after {
        Some(after) if number == 0 => Fate::CutAll(after),
        _ => Fate::Whole,
    };
    let relay = Relay::to(&there.uri, 1, plan);
    let source = still_source(&block).channels(1).resume_for(Some(LIMIT)).build().unwrap();
    let sent = source.connect(&relay.uri).and_then(|mut precopy| {
        precopy.round()?;
        precopy.stop_copy()?.commit(&no_devices())
    });
    let (there, received) = there.end();
    if received.is_ok() {
        assert_equal(&block, &there);
    }
    (relay.passed_on(0), sent, received)
}

#[test]
fn a_cut_anywhere_around_the_hand_over_leaves_one_guest() {
    let (all, sent, received) = cut_on_main(None);
    assert!(sent.is_ok() && received.is_ok());
    for before_end in [1, 2, 10, 40, 41, 42, 43, 44, 60, 70, 80, 100, 130] {
        let (_, sent, received) = cut_on_main(Some(all - before_end));
        let here = match &sent {
            Ok(_) => false,
            Err(error) if error.source_may_resume() => true,
            // It may run there: the operator has to look.
            Err(_) => continue,
        };
        assert_ne!(here, received.is_ok(), "{before_end}: {sent:?}, {received:?}");
    }
}
