//! Between the last byte and the SHUT that confirms the guest: both ends must believe the same.

use std::io::Write;
use std::sync::mpsc::channel;
use std::thread;
use std::time::{Duration, Instant};

use multifd_engine::{CheckpointWriter, Destination, ErrorKind};
use multifd_tests::peer::{Recorder, Recording, Socket, Style, TIMEOUT, Trial};
use multifd_tests::{Outcome, Scratch};
use multifd_transports::Endpoint;
use multifd_wire::{Command, Item, ReturnMessage};

use crate::fixture::{memory, multifd, recording, single};

#[test]
fn a_cancel_before_the_last_word_leaves_the_guest_at_the_source() -> Outcome {
    for return_path in [true, false] {
        for recording in
            [Style::default(), Style::multifd(2)].map(|style| recording(&Style { return_path, ..style }))
        {
            let scratch = Scratch::new()?;
            let destination = Destination::builder(memory().provide(0)?).timeout(TIMEOUT);
            let destination = destination.listen(&Endpoint::Unix(scratch.path("socket")))?;
            let (endpoint, canceller) = (destination.endpoint(), destination.canceller());
            let (done, over) = channel();
            let (result, heard) = thread::scope(|scope| {
                let player =
                    scope.spawn(|| multifd_tests::peer::Player::new(&endpoint).play(&recording, &{ over }));
                let arrived = destination.receive();
                canceller.cancel();
                let result = arrived.and_then(|arrived| arrived.accept());
                drop(done);
                (result, player.join().unwrap())
            });
            let error = result.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Cancelled, "{}", error.chain());
            assert!(error.source_may_resume());
            let said = heard.replies.last();
            assert_eq!(said == Some(&ReturnMessage::Shut(1)), return_path, "{:?}", heard.replies);
        }
    }
    Ok(())
}

#[test]
fn a_cancel_before_the_checkpoint_has_its_name_leaves_nothing() -> Outcome {
    for named in [false, true] {
        let scratch = Scratch::new()?;
        let target = scratch.path("checkpoint");
        let writer = CheckpointWriter::create(&target)?;
        let destination = Destination::builder(writer.ram()).timeout(TIMEOUT);
        let destination = destination.listen(&Endpoint::Unix(scratch.path("socket")))?;
        let (endpoint, canceller) = (destination.endpoint(), destination.canceller());
        let (done, over) = channel();
        let (result, heard) = thread::scope(|scope| {
            let player =
                scope.spawn(|| multifd_tests::peer::Player::new(&endpoint).play(&multifd(), &{ over }));
            let result = destination.receive().and_then(|arrived| {
                if !named {
                    canceller.cancel();
                }
                writer.finish(&arrived)?;
                canceller.cancel();
                arrived.accept()
            });
            drop(done);
            (result, player.join().unwrap())
        });
        // Once the checkpoint can be sent on, it is too late.
        assert_eq!(result.is_ok(), named, "{result:?}");
        assert_eq!(target.exists(), named);
        assert_eq!(
            heard.replies.last(),
            Some(&ReturnMessage::Shut(u32::from(!named))),
            "{:?}",
            heard.replies
        );
        assert_eq!(multifd_tests::peer::command::names(scratch.dir())?.len(), usize::from(named));
    }
    Ok(())
}

#[test]
fn a_guest_that_is_not_accepted_runs_on_at_the_source() -> Outcome {
    let destination = Destination::builder(memory().provide(0)?).timeout(TIMEOUT);
    let verdict = Trial::unix()?.run(&multifd(), destination, |arrived| {
        drop(arrived);
        Ok(())
    })?;
    verdict.result?;
    assert_eq!(verdict.replies.last(), Some(&ReturnMessage::Shut(1)));
    Ok(())
}

#[test]
fn a_stranger_who_knocks_after_the_last_byte_changes_nothing() -> Outcome {
    let scratch = Scratch::new()?;
    let destination = Destination::builder(memory().provide(0)?).timeout(TIMEOUT);
    let destination = destination.listen(&Endpoint::Unix(scratch.path("socket")))?;
    let endpoint = destination.endpoint();
    let (done, over) = channel();
    let (result, heard) = thread::scope(|scope| {
        let player = scope.spawn(|| multifd_tests::peer::Player::new(&endpoint).play(&single(), &{ over }));
        let result = destination.receive().and_then(|arrived| {
            // Refused or not heard, either will do.
            let stranger = Socket::connect(&endpoint);
            let _ = stranger.and_then(|mut stranger| stranger.write_all(b"GET / HTTP/1.1\r\n\r\n"));
            arrived.accept()
        });
        drop(done);
        (result, player.join().unwrap())
    });
    result?;
    assert_eq!(heard.replies.last(), Some(&ReturnMessage::Shut(0)));
    Ok(())
}

/// A source that asks and asks and never listens: the answers fill its socket, and the destination
/// blocks on the next.
fn deaf() -> Recording {
    let mut recorder = Recorder::new(Style::default());
    recorder.header();
    (0..50_000).for_each(|value| recorder.command(Command::Ping(value)));
    recorder.recording()
}

#[test]
fn a_source_that_never_listens_runs_into_the_deadline() -> Outcome {
    let error = Trial::unix()?.refuses(&deaf(), &["return path", "sending Pong(", "the timeout"])?;
    assert_eq!(error.kind(), ErrorKind::Deadline);
    Ok(())
}

#[test]
fn a_source_that_never_listens_does_not_hold_up_a_cancel() -> Outcome {
    let scratch = Scratch::new()?;
    let destination = Destination::builder(memory().provide(0)?).timeout(Duration::from_secs(60));
    let destination = destination.listen(&Endpoint::Unix(scratch.path("socket")))?;
    let (endpoint, canceller) = (destination.endpoint(), destination.canceller());
    let (result, took) = thread::scope(|scope| {
        let deaf = scope.spawn(|| {
            let mut socket = Socket::connect(&endpoint).unwrap();
            socket.limit(Duration::from_millis(300)).unwrap();
            let bytes = deaf().bytes(multifd_tests::peer::Lane::Main);
            let mut pings = Vec::new();
            (0..50_000).for_each(|value| Item::Command(Command::Ping(value)).encode(&mut pings));
            // How much goes into the sockets and buffers is the machine's to say: more and more,
            // until they are full.
            let full =
                socket.write_all(&bytes).is_err() || (0..1000).any(|_| socket.write_all(&pings).is_err());
            assert!(full, "the destination never stopped reading");
            let begun = Instant::now();
            canceller.cancel();
            (socket, begun)
        });
        let result = destination.receive();
        let (_, begun) = deaf.join().unwrap();
        (result, begun.elapsed())
    });
    assert_eq!(result.err().map(|error| error.kind()), Some(ErrorKind::Cancelled));
    // Not by its timeout.
    assert!(took < Duration::from_secs(60), "{took:?}");
    Ok(())
}
