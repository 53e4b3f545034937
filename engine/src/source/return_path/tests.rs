//! What a destination says, as the sending threads see it.

use multifd_wire::ReturnMessage;

use super::*;
use crate::source::shared::tests::{ram, shared};
use crate::work::{Place, UrgentPages};

/// A return path of a source with one block `a` of 8 pages; and the destination's end.
fn return_path(crew: &Crew, shared: &Arc<SourceShared>) -> (ReturnPathReader, Channel) {
    let (ours, theirs) = Channel::pair().unwrap();
    let (ours, last_words) = (Arc::new(ours), LastWords::default());
    last_words.close_behind(ours.closer(), crew.stop());
    (ReturnPathReader::start(ours, Arc::clone(shared), crew, &last_words).unwrap(), theirs)
}

fn say(destination: &Channel, messages: &[ReturnMessage]) {
    let mut bytes = Vec::new();
    messages.iter().for_each(|message| message.encode(&mut bytes));
    destination.send_all(&bytes).unwrap();
}

fn request(offset: u64, len: u32) -> ReturnMessage {
    ReturnMessage::RequestPages { block: Some("a".try_into().unwrap()), offset, len }
}

#[test]
fn pages_that_the_destination_asks_for_are_the_next_that_a_worker_claims() {
    let shared = shared(ram(&[("a", 8)]));
    shared.urgent.set(UrgentPages::new(8, &shared.ram.dirty)).unwrap();
    let crew = Crew::new(shared.session.stop.clone());
    let (reader, destination) = return_path(&crew, &shared);
    say(&destination, &[request(5 * 4096, 8192), request(3 * 4096, 4096), ReturnMessage::Pong(7)]);
    reader.wait_for_pong(7, Duration::from_secs(60)).unwrap();
    let round = shared.ram.round(1);
    let mut place = Place::default();
    let next = shared.next(&round);
    assert_eq!(next.claim(&mut place, 2).unwrap().pages, [5, 6]);
    assert_eq!(next.claim(&mut place, 2).unwrap().pages, [3]);
    assert_eq!(next.claim(&mut place, 8).unwrap().pages, [0, 1, 2, 4, 7]);
    reader.expect_shut();
    say(&destination, &[ReturnMessage::Shut(0)]);
    reader.wait_for_shut(Duration::from_secs(60)).unwrap();
    crew.join();
}

#[test]
fn a_request_for_pages_ends_a_migration_that_has_no_queue_for_them() {
    let shared = shared(ram(&[("a", 8)]));
    let crew = Crew::new(shared.session.stop.clone());
    let (_reader, destination) = return_path(&crew, &shared);
    say(&destination, &[request(0, 4096)]);
    crew.join();
    let error = shared.session.stop.cause_or(Error::stopped(Phase::Active));
    assert_eq!(error.kind(), ErrorKind::Incompatible);
    assert!(error.to_string().contains("RequestPages"), "{error}");
}

/// A destination that fails says why on main, and hangs up on all connections.
#[test]
fn a_refusal_is_read_though_another_connection_has_shown_the_end_before() {
    let shared = shared(ram(&[("a", 8)]));
    let crew = Crew::new(shared.session.stop.clone());
    let (reader, destination) = return_path(&crew, &shared);
    let reset = Error::new(ErrorKind::Transport, Phase::Active, "a channel was reset");
    std::thread::scope(|scope| {
        scope.spawn(|| crew.stop().trip(reset));
        while !crew.stop().tripped() {
            std::thread::yield_now();
        }
        assert!(reader.refusal().is_none());
        let failure = Failure { phase: 5, reason: "no room".to_owned() };
        say(&destination, &[ReturnMessage::Failure(failure), ReturnMessage::Shut(1)]);
    });
    crew.join();
    let refusal = reader.refusal().unwrap();
    assert!(refusal.to_string().contains("the destination failed: no room"), "{refusal}");
}

#[test]
fn a_migration_that_is_cancelled_waits_for_no_word() {
    let shared = shared(ram(&[("a", 8)]));
    let crew = Crew::new(shared.session.stop.clone());
    let (_reader, destination) = return_path(&crew, &shared);
    crew.stop().trip(Error::new(ErrorKind::Cancelled, Phase::Active, "by the caller"));
    crew.join();
    assert_eq!(destination.recv(&mut [0]).unwrap(), 0, "main is closed");
}
