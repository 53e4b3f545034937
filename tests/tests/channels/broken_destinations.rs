//! A source whose destination is cut, stalls, or never begins, over every kind of channel.

use multifd_engine::{DeviceState, Error, ErrorKind, Report, Source, ZeroPages};
use multifd_tests::Outcome;
use multifd_tests::peer::{Memory, devices};
use multifd_transports::Endpoint;
use multifd_wire::Configuration;

use crate::wire::{Kind, TIMEOUT, Then, broken, says};

/// More pages than any channel holds.
fn source(return_path: Option<bool>) -> Outcome<Source> {
    let mut memory = Memory::zero(&[("pc.ram", 6000)]);
    memory.refill(&memory.all(), 3);
    let configuration = Configuration::new("pc-q35-10.0");
    let builder = Source::builder(memory.provide_content()?, configuration)
        .paused_guest()
        .zero_pages(ZeroPages::None)
        // These destinations read and do not answer: a source that wished to know what they can do
        // would not go on.
        .checksums(false)
        .digest(false)
        .timeout(TIMEOUT);
    let builder = match return_path {
        Some(return_path) => builder.return_path(return_path),
        None => builder,
    };
    Ok(builder.build()?)
}

fn send(source: Source, endpoint: &Endpoint) -> Result<Report, Error> {
    let tail = [devices::padding(100), devices::tail()].concat();
    let state = DeviceState::from_tail(tail).expect("a sound tail");
    let mut precopy = source.connect(endpoint)?;
    precopy.round()?;
    precopy.stop_copy()?.commit(&state)
}

/// What the source says when its destination reads that many bytes and no more.
fn sent(kind: Kind, read: usize, then: Then) -> Outcome<Error> {
    let mut wire = kind.wire(true)?;
    let (source, arriving) = (source(None)?, wire.accept()?);
    let (canceller, endpoint) = (source.canceller(), wire.endpoint.clone());
    let receive = move || {
        let peer = arriving.recv()?;
        peer.recv_exact(&mut vec![0; read])?;
        Ok(Some(peer).filter(|_| then == Then::Stall))
    };
    broken(canceller, || send(source, &endpoint).map(drop), receive)
}

#[test]
fn a_destination_that_breaks_off_stands_still_or_never_begins() -> Outcome {
    for kind in Kind::all() {
        for read in [0, 64, 500_000, 20_000_000] {
            let error = sent(kind, read, Then::Cut)?;
            assert_eq!(error.kind(), ErrorKind::Transport, "{kind:?} {read}: {}", error.chain());
            assert!(error.source_may_resume());
            says(&error, &[kind.name()]);

            let error = sent(kind, read, Then::Stall)?;
            assert_eq!(error.kind(), ErrorKind::Deadline, "{kind:?} {read}: {}", error.chain());
            assert!(error.source_may_resume());
            says(&error, &["active, ", kind.name()]);
            // The system's buffers may take all of a round.
            let chain = error.chain();
            assert!(chain.contains("no byte moved for 300ms") || chain.contains("no PONG("), "{chain}");
        }
    }
    Ok(())
}

/// What the source says of a command.
fn fed(command: &str, return_path: Option<bool>) -> Outcome<Error> {
    let source = source(return_path)?;
    let endpoint = Endpoint::Exec(command.to_owned());
    broken(source.canceller(), || send(source, &endpoint).map(drop), || Ok(()))
}

#[test]
fn a_command_that_breaks_off_fails_or_stands_still() -> Outcome {
    for read in [0, 64, 20_000_000] {
        let head = format!("head -c {read} > /dev/null");
        for (end, status) in
            [("exit 9", "exit status: 9"), ("exit 0", "exit status: 0"), ("kill -9 $$", "signal: 9")]
        {
            let error = fed(&format!("{head}; {end}"), None)?;
            assert_eq!(error.kind(), ErrorKind::Transport, "{}", error.chain());
            assert!(error.source_may_resume());
            says(&error, &["main (exec:head", status, "and not everything was read"]);
        }
        for stalls in ["exec sleep 1000", "exec 3<&0; sleep 1000 <&3 & exit 0"] {
            let error = fed(&format!("{head}; {stalls}"), None)?;
            assert_eq!(error.kind(), ErrorKind::Deadline, "{}", error.chain());
            says(&error, &["active, main (exec:head", "no byte moved for 300ms"]);
        }
    }
    Ok(())
}

#[test]
fn a_command_that_fails_after_the_last_byte_is_no_success() -> Outcome {
    let error = fed("cat > /dev/null; exit 9", None)?;
    assert!(!error.source_may_resume(), "it may have passed all of it on");
    says(&error, &["commit, main (exec:cat", "at the end", "ended with exit status: 9"]);

    let error = fed("cat > /dev/null; exec sleep 1000", None)?;
    assert_eq!(error.kind(), ErrorKind::Deadline);
    says(&error, &["commit, main (exec:cat", "did not end within 300ms"]);
    Ok(())
}

#[test]
fn a_command_that_does_not_answer_is_told_from_one_that_does() -> Outcome {
    let error = fed("cat > /dev/null", Some(true))?;
    says(&error, &["active, return path (exec:cat"]);

    let report = send(source(None)?, &Endpoint::Exec("cat > /dev/null".to_owned()))?;
    assert!(!report.confirmed);
    Ok(())
}

#[test]
fn what_one_channel_cannot_do_is_refused_before_anything_leaves() -> Outcome {
    let wire = Kind::Pipe.wire(true)?;
    let error = send(source(Some(true))?, &wire.endpoint).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ApiMisuse);
    says(&error, &["fd:", "a return path was asked for, but nothing comes back over a pipe"]);
    Ok(())
}
