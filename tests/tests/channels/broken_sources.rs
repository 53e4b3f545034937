//! A destination whose source is cut, stalls, or never begins, over every kind of channel.

use multifd_engine::{Destination, Error, ErrorKind};
use multifd_tests::peer::{Lane, Memory, Recorder, Style};
use multifd_tests::{Outcome, Scratch};
use multifd_transports::{Channel, Endpoint};

use crate::wire::{Kind, TIMEOUT, Then, broken, says};

/// A sound migration's bytes, 1.6 MB: more than any channel holds by itself.
fn stream() -> (Memory, Vec<u8>) {
    let mut memory = Memory::zero(&[("pc.ram", 400)]);
    memory.refill(&memory.all(), 7);
    // Without a return path: whether an answer or the next byte fails first is chance.
    let style = Style { return_path: false, ..Style::default() };
    let bytes = Recorder::migration(style, &mut memory.clone()).bytes(Lane::Main);
    (memory, bytes)
}

/// What the destination says when its source sends `bytes` and no more.
fn received(kind: Kind, memory: &Memory, bytes: &[u8], then: Then) -> Outcome<Error> {
    let mut wire = kind.wire(false)?;
    let destination = Destination::builder(memory.provide(0)?).timeout(TIMEOUT).listen(&wire.endpoint)?;
    let there = destination.endpoint();
    let send = move || {
        let peer: Channel = wire.connect(&there)?;
        peer.send_all(bytes)?;
        Ok(Some(peer).filter(|_| then == Then::Stall))
    };
    broken(destination.canceller(), || destination.receive().map(drop), send)
}

#[test]
fn a_source_that_never_begins() -> Outcome {
    let (memory, bytes) = stream();
    for kind in Kind::all() {
        for sent in [0, 2] {
            let error = received(kind, &memory, &bytes[..sent], Then::Stall)?;
            assert_eq!(error.kind(), ErrorKind::Deadline, "{kind:?} {sent}: {}", error.chain());
            // Either of two waits that begin together may end first.
            let chain = error.chain();
            assert!(chain.contains("said nothing for") || chain.contains("no main channel on "), "{chain}");

            let error = received(kind, &memory, &bytes[..sent], Then::Cut)?;
            if kind.takes_several() {
                assert_eq!(error.kind(), ErrorKind::Deadline, "{kind:?} {sent}: {}", error.chain());
                let ended = format!("1 connection refused, the last: accept, {}", kind.name());
                says(&error, &["accept: no main channel on ", "within 300ms", &ended]);
                says(&error, &[&format!("ended after {sent} bytes")]);
            } else {
                assert_eq!(error.kind(), ErrorKind::Transport, "{kind:?} {sent}: {}", error.chain());
                says(&error, &["accept, ", &format!("ended after {sent} bytes")]);
            }
        }
    }
    Ok(())
}

#[test]
fn a_source_that_breaks_off_or_stands_still() -> Outcome {
    let (memory, bytes) = stream();
    for kind in Kind::all() {
        for sent in [4, 9, 64, 5_000, bytes.len() / 2, bytes.len() - 400_000] {
            let error = received(kind, &memory, &bytes[..sent], Then::Cut)?;
            assert_eq!(error.kind(), ErrorKind::Transport, "{kind:?} {sent}: {}", error.chain());
            says(&error, &["main (", kind.name(), "the stream ended after"]);

            let error = received(kind, &memory, &bytes[..sent], Then::Stall)?;
            assert_eq!(error.kind(), ErrorKind::Deadline, "{kind:?} {sent}: {}", error.chain());
            says(&error, &["main (", kind.name(), "no byte moved for 300ms, the timeout"]);
        }
    }
    Ok(())
}

/// What the destination says of a command.
fn printed(memory: &Memory, command: &str) -> Outcome<Error> {
    let endpoint = Endpoint::Exec(command.to_owned());
    let destination = Destination::builder(memory.provide(0)?).timeout(TIMEOUT).listen(&endpoint)?;
    broken(destination.canceller(), || destination.receive().map(drop), || Ok(()))
}

#[test]
fn a_command_that_breaks_off_fails_or_stands_still() -> Outcome {
    let (memory, bytes) = stream();
    let scratch = Scratch::new()?;
    let file = scratch.path("stream");
    std::fs::write(&file, &bytes)?;
    for sent in [0, 2, 4, 64, 5_000, bytes.len() / 2] {
        let head = format!("head -c {sent} {}", file.display());
        let error = printed(&memory, &format!("{head}; exit 7"))?;
        assert_eq!(error.kind(), ErrorKind::Transport, "{}", error.chain());
        says(&error, &["exec:head", "ended with exit status: 7"]);

        let error = printed(&memory, &head)?;
        assert_eq!(error.kind(), ErrorKind::Transport, "{}", error.chain());
        says(&error, &["exec:head", "ended after"]);

        for stalls in ["exec sleep 1000", "sleep 1000 & exit 0"] {
            let error = printed(&memory, &format!("{head}; {stalls}"))?;
            assert_eq!(error.kind(), ErrorKind::Deadline, "{}", error.chain());
            says(&error, &["exec:head"]);
        }
    }
    let error = printed(&memory, "kill -9 $$")?;
    says(&error, &["ended with signal: 9"]);
    Ok(())
}

#[test]
fn a_command_behind_a_sound_stream_must_end_well() -> Outcome {
    let (memory, bytes) = stream();
    let scratch = Scratch::new()?;
    let file = scratch.path("stream");
    std::fs::write(&file, &bytes)?;
    let command = |after: &str| format!("cat {}{after}", file.display());
    let endpoint = Endpoint::Exec(command(""));
    Destination::builder(memory.provide(0)?).listen(&endpoint)?.receive()?.accept()?;

    let failed = printed(&memory, &command("; exit 7"))?;
    says(&failed, &["device, main (exec:cat", "ended with exit status: 7"]);
    let stays = printed(&memory, &command("; exec sleep 1000"))?;
    assert_eq!(stays.kind(), ErrorKind::Deadline, "{}", stays.chain());
    says(&stays, &["device, main (exec:cat", "the stream is still open after 300ms"]);
    assert!(failed.source_may_resume() && stays.source_may_resume());
    Ok(())
}

#[test]
fn a_pipe_that_another_process_keeps_open_holds_nothing_up_for_ever() -> Outcome {
    let (memory, bytes) = stream();
    let mut wire = Kind::Pipe.wire(false)?;
    let destination = Destination::builder(memory.provide(0)?).timeout(TIMEOUT).listen(&wire.endpoint)?;
    let there = destination.endpoint();
    std::thread::scope(|scope| -> Outcome {
        let send = || -> Outcome<Channel> {
            let peer = wire.connect(&there)?;
            peer.send_all(&bytes)?;
            Ok(peer)
        };
        let sender = scope.spawn(send);
        destination.receive()?.accept()?;
        sender.join().expect("it does not panic").map(drop)
    })
}

#[test]
fn parallel_channels_are_refused_where_there_can_be_none() -> Outcome {
    for kind in [Kind::Pipe, Kind::SocketPair] {
        let wire = kind.wire(false)?;
        let builder = Destination::builder(stream().0.provide(0)?).channels(2);
        let error = builder.listen(&wire.endpoint).err().expect("it listens");
        assert_eq!(error.kind(), ErrorKind::ApiMisuse);
        says(&error, &["2 parallel channels over fd:", "which is one channel"]);
    }
    // The command has not been started for it: it would say so in a file, before it is heard to say
    // nothing.
    let scratch = Scratch::new()?;
    let trace = scratch.path("trace");
    let command = Endpoint::Exec(format!("echo started > {}", trace.display()));
    let refused = Destination::builder(stream().0.provide(0)?).channels(2).listen(&command);
    says(&refused.err().expect("it listens"), &["2 parallel channels over exec:", "which is one channel"]);
    assert!(!trace.exists());
    Ok(())
}
