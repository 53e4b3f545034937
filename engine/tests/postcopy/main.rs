//! Post-copy from this engine to this engine: the guest's threads read its memory at the
//! destination while it comes.
#![allow(
    clippy::cast_possible_truncation,
    clippy::explicit_write,
    clippy::indexing_slicing,
    clippy::unwrap_used,
    reason = "test code may panic"
)]

#[path = "../live/credentials.rs"]
mod credentials;
mod ram;
mod recovery;
mod relay;
#[path = "../dirty/skip.rs"]
mod skip;
mod threads;

use std::num::NonZeroU64;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use multifd_engine::transports::{Endpoint, Listener, TlsClient, TlsServer};
use multifd_engine::wire::Configuration;
use multifd_engine::{
    Control, Destination, DeviceState, DirtyMarker, Incoming, PAGE, Postcopy, PostcopyEnd, PostcopyGuest,
    ProgressReader, RamBlock, Report, Served, SoftwareLog, Source, UserfaultLog,
};

use ram::{load, memory, write};

const SOON: Duration = Duration::from_secs(60);

/// How a guest moves.
#[derive(Clone, Copy, Debug, Default)]
struct Move {
    /// Its memory is shared with a file, at both ends.
    memfd: bool,
    /// Pages that are asked for have a connection of their own.
    preempt: bool,
    /// The link is cut after the first request, and replaced.
    cut: bool,
    /// All connections are encrypted.
    tls: bool,
}

/// A guest in its rounds: writes here and there until it is stopped.
fn run(blocks: &[RamBlock], marker: &DirtyMarker, stopped: &AtomicBool) {
    for turn in 1.. {
        for (number, block) in blocks.iter().enumerate() {
            let page = turn * 7 % block.pages();
            write(block, page, turn);
            marker.mark(number, (page * PAGE) as u64, PAGE as u64);
        }
        if stopped.load(Ordering::Acquire) {
            return;
        }
        thread::yield_now();
    }
}

/// Two rounds, while the guest writes; then a third of its pages are stale, and it switches.
fn rounds_and_switch(source: Source, here: &[RamBlock], marker: &DirtyMarker, to: &Endpoint) -> Postcopy {
    let mut precopy = source.connect(to).unwrap();
    let stopped = AtomicBool::new(false);
    thread::scope(|scope| {
        let guest = scope.spawn(|| run(here, marker, &stopped));
        let rounds = [precopy.round().map(drop), precopy.round().map(drop)];
        stopped.store(true, Ordering::Release);
        guest.join().unwrap();
        rounds.into_iter().for_each(Result::unwrap);
    });
    for (number, block) in here.iter().enumerate() {
        for page in (0..block.pages()).step_by(3) {
            write(block, page, 0xabc);
            marker.mark(number, (page * PAGE) as u64, PAGE as u64);
        }
    }
    precopy.switch_to_postcopy(&DeviceState::opaque("devices", 1, b"state")).unwrap()
}

/// Serves to the end; `recover`: where the destination waits after a link was cut.
fn serve(mut postcopy: Postcopy, recover: Option<&Endpoint>) -> Report {
    match (postcopy.serve().unwrap(), recover) {
        (Served::Completed(report), None) => *report,
        (Served::Paused(error), Some(to)) => {
            assert!(!error.source_may_resume(), "{error}");
            postcopy.recover(to, SOON).unwrap();
            serve(postcopy, None)
        }
        (Served::Completed(_), Some(_)) => panic!("completed over a link that was cut"),
        (Served::Paused(error), None) => panic!("paused: {}", error.chain()),
    }
}

/// A guest whose threads do not wait for ever when the test fails.
struct Awaited(Option<PostcopyGuest>);

impl Drop for Awaited {
    fn drop(&mut self) {
        let guest = self.0.take().filter(|_| thread::panicking());
        // Those that wait for a page get SIGBUS, or the process ends at once: what failed has been
        // said.
        if guest.is_some_and(|guest| guest.poison_missing().is_err()) {
            std::process::abort();
        }
    }
}

/// Waits for the RAM to the end; `recover`: where to wait for the source after a link was cut.
fn wait(guest: PostcopyGuest, recover: Option<Listener>) -> Report {
    let mut awaited = Awaited(Some(guest));
    let guest = awaited.0.as_mut().unwrap();
    match (guest.wait().unwrap(), recover) {
        (PostcopyEnd::Completed(report), None) => *report,
        (PostcopyEnd::Paused(_), Some(listener)) => {
            guest.recover(listener, SOON).unwrap();
            wait(awaited.0.take().unwrap(), None)
        }
        (PostcopyEnd::Completed(_), Some(_)) => panic!("completed over a link that was cut"),
        (PostcopyEnd::Paused(error), None) => panic!("paused: {}", error.chain()),
    }
}

/// Until the first request nothing goes that is not asked for; then the link is cut, or all goes.
fn after_the_first_request(progress: &ProgressReader, control: &Control, cut: bool) {
    let begun = std::time::Instant::now();
    let asked = || progress.now().requests > 0;
    while !asked() && begun.elapsed() < SOON {
        thread::yield_now();
    }
    if cut {
        // The switch may not have come back at the source by now.
        control.pause_postcopy().unwrap();
    }
    control.set_max_postcopy_bandwidth(None);
    // Last: the others wait for no page for ever.
    assert!(asked(), "no request for a page");
}

/// Reads each page of all blocks once, in the order of `step` (odd), and compares it with the
/// source's.
fn read_all(there: &[RamBlock], here: &[RamBlock], step: usize) {
    for (ours, source) in there.iter().zip(here) {
        let round = ours.pages().next_power_of_two();
        for page in (0..round).map(|turn| turn * step % round).filter(|page| *page < ours.pages()) {
            assert!(load(ours, page) == load(source, page), "page {page} of {}", ours.name());
        }
    }
}

/// Moves a guest whose threads read all of its memory as soon as it runs at the destination: the
/// reports of both ends.
fn moved(how: Move) -> (Report, Report) {
    let (here, there) = (memory(how.memfd), memory(how.memfd));
    for block in &here {
        (0..block.pages()).filter(|page| page % 4 != 0).for_each(|page| write(block, page, 1));
    }
    let log = SoftwareLog::new(&here);
    let marker = log.marker();
    let any: Endpoint = "tcp:127.0.0.1:0".parse().unwrap();
    let credentials = how.tls.then(|| credentials::credentials("CA"));
    let server = credentials.as_ref().map(|dir| TlsServer::from_directory(dir.path()).unwrap());
    let mut destination = Destination::builder(there.clone()).postcopy(true).timeout(SOON);
    if let Some(server) = &server {
        destination = destination.tls(server.clone());
    }
    let destination = destination.listen(&any).unwrap();
    let to = destination.endpoint();
    let again = how.cut.then(|| Listener::bind(&any).unwrap().tls(server));
    let again_at = again.as_ref().map(Listener::endpoint);
    let mut source = Source::builder(here.clone(), Configuration::new("test-10.0"))
        .dirty_log(log)
        .postcopy(true)
        .postcopy_preempt(how.preempt)
        .max_postcopy_bandwidth(NonZeroU64::new(1))
        .timeout(SOON);
    if let Some(dir) = &credentials {
        source = source.tls(TlsClient::from_directory(dir.path()).unwrap());
    }
    let source = source.build().unwrap();
    let (progress, control) = (source.progress(), source.control());
    thread::scope(|scope| {
        let serving =
            scope.spawn(|| serve(rounds_and_switch(source, &here, &marker, &to), again_at.as_ref()));
        let Incoming::Postcopy(guest) = destination.receive_live().unwrap() else { panic!("no switch") };
        assert_eq!(guest.opaque_state("devices"), Some((1, &b"state"[..])));
        guest.loaded().unwrap();
        for step in [1, 1237, 4095] {
            let (there, here) = (&there, &here);
            scope.spawn(move || read_all(there, here, step));
        }
        scope.spawn(|| after_the_first_request(&progress, &control, how.cut));
        let received = wait(guest, again);
        (serving.join().unwrap(), received)
    })
}

/// Moves, and looks at both reports; the guest's threads have compared every page.
fn check(how: Move) {
    let (sent, received) = moved(how);
    let (sent, received) = (sent.postcopy.unwrap(), received.postcopy.unwrap());
    assert!(sent.run_after.is_some(), "{how:?}");
    let recoveries = u64::from(how.cut);
    assert_eq!((sent.recoveries, received.recoveries), (recoveries, recoveries), "{how:?}");
    // What was asked for last may have come before the source read of it.
    assert!((1..=received.requests).contains(&sent.requests), "{how:?}: {sent:?} {received:?}");
    assert!((1..=received.pages_requested).contains(&sent.pages_requested), "{how:?}: {sent:?} {received:?}");
    let faults = received.faults.as_ref().unwrap();
    let waits = &faults.fault_us;
    assert!(faults.faults > 0 && waits.p50 <= waits.p99 && waits.p99 <= waits.max, "{received:?}");
    assert_eq!(faults.threads.iter().map(|thread| thread.faults).sum::<u64>(), faults.faults);
}

/// Says why there is no post-copy here, if so.
fn missing() -> bool {
    let missing = UserfaultLog::new().err();
    if let Some(error) = &missing {
        skip::skipped(&format!("userfaultfd: {error}"));
    }
    missing.is_some()
}

#[test]
fn threads_read_anonymous_memory_while_it_comes() {
    if !missing() {
        check(Move::default());
        check(Move { preempt: true, ..Move::default() });
    }
}

#[test]
fn threads_read_memory_that_is_shared_with_a_file_while_it_comes() {
    if !missing() {
        check(Move { memfd: true, ..Move::default() });
        check(Move { memfd: true, preempt: true, ..Move::default() });
    }
}

#[test]
fn a_link_that_is_cut_is_replaced_at_both_ends_while_threads_wait() {
    if !missing() {
        check(Move { cut: true, ..Move::default() });
        check(Move { cut: true, preempt: true, ..Move::default() });
    }
}

#[test]
fn all_connections_of_a_postcopy_are_encrypted_those_of_a_recovery_too() {
    if !missing() {
        for cut in [false, true] {
            check(Move { tls: true, cut, ..Move::default() });
            check(Move { tls: true, cut, preempt: true, ..Move::default() });
        }
    }
}
