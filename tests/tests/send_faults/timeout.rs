//! Destinations that are not there, or do nothing.

use std::time::Duration;

use multifd_engine::{Control, ErrorKind, MigrationState};
use multifd_tests::peer::{Sink, Stage};
use multifd_tests::{Failure, Outcome, Scratch};
use multifd_transports::Endpoint;

use crate::fixture::{TIMEOUT, Way, cancel_when};

const BOTH: [usize; 2] = [0, 2];

#[test]
fn no_peer_listens() -> Outcome {
    let scratch = Scratch::new()?;
    let free_port = Sink::tcp()?.endpoint().clone();
    for endpoint in [Endpoint::Unix(scratch.path("nobody")), free_port] {
        for channels in BOTH {
            let ended = Way::channels(channels).timeout(TIMEOUT).send_to(&endpoint)?;
            assert!(ended.took >= TIMEOUT, "{:?}", ended.took);
            let uri = endpoint.to_string();
            let error =
                ended.failed(true, &["connect, main: no connection", &uri, "gave up after", "limit is 400"]);
            assert_eq!(error.kind(), ErrorKind::Transport);
        }
    }
    Ok(())
}

#[test]
fn a_peer_answers_and_reads_no_page() -> Outcome {
    for (channels, codec, place) in
        [(0, "none", "active, main (unix:"), (2, "none", "active, channel "), (2, "zstd", "active, channel ")]
    {
        let way = Way { codec, ..Way::channels(channels) }.timeout(TIMEOUT);
        let ended = way.send(|destination| {
            destination.read_to(Stage::Started)?;
            destination.wait_for_the_end()
        })?;
        let error = ended.failed(true, &[place, "no byte moved for 400ms, the timeout"]);
        assert_eq!(error.kind(), ErrorKind::Deadline);
    }
    Ok(())
}

/// A QEMU that waits for another channel is such a one.
#[test]
fn a_peer_accepts_and_never_reads() -> Outcome {
    for channels in BOTH {
        let way = Way::channels(channels).timeout(TIMEOUT);
        let ended = way.send(|destination| destination.wait_for_the_end())?;
        let error = ended.failed(true, &["active, return path", "no PONG(0x6d666431) within 400ms"]);
        assert_eq!(error.kind(), ErrorKind::Deadline);
    }
    Ok(())
}

#[test]
fn a_peer_reads_and_never_answers() -> Outcome {
    for channels in BOTH {
        // All is in its hands, and it says nothing: which end has the guest is unknown.
        let way = Way::channels(channels).timeout(TIMEOUT);
        let ended = way.send(|destination| {
            destination.read_to(Stage::Finished)?;
            destination.wait_for_the_end()
        })?;
        let error = ended.failed(false, &["commit, return path", "did not confirm within 400ms"]);
        assert_eq!(error.kind(), ErrorKind::Deadline);
        // The same from the beginning.
        let ended = way.send(|destination| {
            destination.polite = false;
            while destination.read_to(Stage::RamSent).is_ok() {}
            Ok(())
        })?;
        assert_eq!(ended.failed(true, &["return path"]).kind(), ErrorKind::Deadline);
    }
    Ok(())
}

#[test]
fn a_cancel_wakes_a_source_wherever_it_is() -> Outcome {
    for channels in BOTH {
        let way = Way { checks: false, ..Way::channels(channels) }.timeout(Duration::from_secs(60));
        let asking = Way { checks: true, ..way.clone() };
        let nowhere = Endpoint::Unix(Scratch::new()?.path("nobody"));
        let deaf = Sink::unix()?;
        // It dials for as long as its timeout; or it waits to hear what the other end can do; or it
        // sends what no socket has room for.
        let dials: fn(&Control) -> bool = |control| control.state() == MigrationState::Setup;
        let sends: fn(&Control) -> bool = |control| control.progress().pages_normal > 0;
        let asks: fn(&Control) -> bool = |control| control.state() == MigrationState::Active;
        for (way, endpoint, reached) in
            [(&way, &nowhere, dials), (&way, deaf.endpoint(), sends), (&asking, deaf.endpoint(), asks)]
        {
            let source = way.source()?;
            let control = source.control();
            let (result, cancelled) = std::thread::scope(|scope| {
                let cancel = scope.spawn(|| cancel_when(|| reached(&control), &control));
                let result = source.connect(endpoint).and_then(|mut precopy| precopy.round().map(|_| ()));
                (result, cancel.join())
            });
            let error = result.expect_err("no peer reads");
            assert_eq!(error.kind(), ErrorKind::Cancelled, "{}", error.chain());
            assert!(error.source_may_resume());
            let cancelled = cancelled.map_err(|_| Failure::new("the canceller panicked"))?;
            // Not by its timeout.
            assert!(cancelled.elapsed() < way.timeout);
        }
    }
    Ok(())
}
