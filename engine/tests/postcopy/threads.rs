//! Threads of the engine that end by a panic, and an embedder that takes longer than the source's
//! timeout.

use std::num::NonZeroU64;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use multifd_engine::transports::Listener;
use multifd_engine::wire::Configuration;
use multifd_engine::{
    Control, Destination, DestinationBuilder, DeviceState, Error, ErrorKind, Incoming, Postcopy, PostcopyEnd,
    PostcopyGuest, RamBlock, Served, Source, SourceBuilder,
};

use crate::recovery::any;
use crate::{SOON, load, memory, missing, write};

/// A source's timeout, in tests of ends that take longer.
const SHORT: Duration = Duration::from_secs(2);

/// The memory of a guest at both ends; the source's pages are not zero.
fn guests() -> [Vec<RamBlock>; 2] {
    let [here, there] = [(); 2].map(|()| memory(false));
    here.iter().for_each(|block| (0..block.pages()).for_each(|page| write(block, page, 3)));
    [here, there]
}

fn source(here: &[RamBlock]) -> SourceBuilder {
    Source::builder(here.to_vec(), Configuration::new("test-10.0"))
        .paused_guest()
        .postcopy(true)
        .timeout(SOON)
}

fn destination(there: &[RamBlock]) -> DestinationBuilder {
    Destination::builder(there.to_vec()).postcopy(true).timeout(SOON)
}

fn devices() -> DeviceState {
    DeviceState::opaque("devices", 1, b"state")
}

/// Nothing happens on this thread for that long.
fn idle(time: Duration) {
    let (_sender, never) = mpsc::channel::<()>();
    let _ = never.recv_timeout(time);
}

/// A guest that runs at the destination, and a source that sends what is asked for on a connection
/// of its own, and nothing else.
fn running(source: SourceBuilder, destination: DestinationBuilder) -> (Postcopy, PostcopyGuest, Control) {
    let source = source.postcopy_preempt(true).max_postcopy_bandwidth(NonZeroU64::new(1)).build().unwrap();
    let (destination, control) = (destination.listen(&any()).unwrap(), source.control());
    let at = destination.endpoint();
    thread::scope(|scope| {
        let receiving = scope.spawn(|| {
            let Incoming::Postcopy(guest) = destination.receive_live().unwrap() else { panic!("no switch") };
            guest.loaded().unwrap();
            guest
        });
        let postcopy = source.connect(&at).unwrap().switch_to_postcopy(&devices()).unwrap();
        (postcopy, receiving.join().unwrap(), control)
    })
}

/// A new link for a post-copy that is paused at both ends.
fn recover(postcopy: &mut Postcopy, guest: &mut PostcopyGuest) {
    let listener = Listener::bind(&any()).unwrap();
    let at = listener.endpoint();
    thread::scope(|scope| {
        let recovering = scope.spawn(|| guest.recover(listener, SOON).unwrap());
        postcopy.recover(&at, SOON).unwrap();
        recovering.join().unwrap();
    });
}

fn paused(served: Served) -> Error {
    match served {
        Served::Paused(error) => error,
        Served::Completed(_) => panic!("completed"),
    }
}

fn pause(postcopy: &mut Postcopy, guest: &mut PostcopyGuest) {
    postcopy.control().pause_postcopy().unwrap();
    paused(postcopy.serve().unwrap());
    assert!(matches!(guest.wait().unwrap(), PostcopyEnd::Paused(_)));
}

/// A hook that panics on threads of this name while it is `armed`.
fn panics_on(name: &'static str, armed: &Arc<AtomicBool>) -> impl Fn(&str) + Send + Sync + 'static {
    let armed = Arc::clone(armed);
    move |thread| assert!(thread != name || !armed.load(Ordering::Acquire), "on purpose")
}

/// What follows goes to the end over a new link, and is what the source has.
fn complete(
    mut postcopy: Postcopy,
    mut guest: PostcopyGuest,
    control: &Control,
    [here, there]: &[Vec<RamBlock>; 2],
) {
    recover(&mut postcopy, &mut guest);
    control.set_max_postcopy_bandwidth(None);
    thread::scope(|scope| {
        let serving = scope.spawn(|| postcopy.serve().unwrap());
        assert!(matches!(guest.wait().unwrap(), PostcopyEnd::Completed(_)));
        assert!(matches!(serving.join().unwrap(), Served::Completed(_)));
    });
    for (there, here) in there.iter().zip(here) {
        (0..here.pages()).for_each(|page| assert!(load(there, page) == load(here, page), "page {page}"));
    }
}

#[test]
fn a_panic_of_the_thread_that_reads_urgent_pages_pauses_at_once_and_is_named() {
    if missing() {
        return;
    }
    let guests = guests();
    let armed = Arc::new(AtomicBool::new(false));
    let [here, there] = &guests;
    let there_too = destination(there).thread_hook(panics_on("mig-urgent", &armed));
    let (mut postcopy, mut guest, control) = running(source(here), there_too);
    pause(&mut postcopy, &mut guest);
    armed.store(true, Ordering::Release);
    recover(&mut postcopy, &mut guest);
    thread::scope(|scope| {
        let serving = scope.spawn(move || {
            paused(postcopy.serve().unwrap());
            postcopy
        });
        // Its page goes on the connection whose thread panics.
        let thread = scope.spawn(|| load(&there[0], 1000));
        let PostcopyEnd::Paused(error) = guest.wait().unwrap() else { panic!("completed") };
        assert_eq!(error.kind(), ErrorKind::Panicked, "{error}");
        assert!(error.chain().contains("mig-urgent") && error.chain().contains("on purpose"), "{error}");
        let postcopy = serving.join().unwrap();
        armed.store(false, Ordering::Release);
        complete(postcopy, guest, &control, &guests);
        assert!(thread.join().unwrap() == load(&here[0], 1000));
    });
}

#[test]
fn a_panic_of_the_thread_that_sends_urgent_pages_pauses_at_once_and_is_named() {
    if missing() {
        return;
    }
    let guests = guests();
    let armed = Arc::new(AtomicBool::new(false));
    let [here, there] = &guests;
    let here_too = source(here).thread_hook(panics_on("mig-urgent", &armed));
    let (mut postcopy, mut guest, control) = running(here_too, destination(there));
    pause(&mut postcopy, &mut guest);
    armed.store(true, Ordering::Release);
    recover(&mut postcopy, &mut guest);
    let error = paused(postcopy.serve().unwrap());
    assert_eq!(error.kind(), ErrorKind::Panicked, "{error}");
    assert!(error.chain().contains("mig-urgent") && error.chain().contains("on purpose"), "{error}");
    assert!(matches!(guest.wait().unwrap(), PostcopyEnd::Paused(_)));
    armed.store(false, Ordering::Release);
    complete(postcopy, guest, &control, &guests);
}

/// All of RAM has come long before.
#[test]
fn devices_may_take_longer_to_load_than_any_timeout() {
    if missing() {
        return;
    }
    let [here, there] = guests();
    let destination = destination(&there).listen(&any()).unwrap();
    let at = destination.endpoint();
    let source = source(&here).timeout(SHORT).build().unwrap();
    thread::scope(|scope| {
        let serving = scope
            .spawn(|| source.connect(&at).unwrap().switch_to_postcopy(&devices()).unwrap().serve().unwrap());
        let Incoming::Postcopy(mut guest) = destination.receive_live().unwrap() else { panic!("no switch") };
        idle(SHORT + SHORT / 2);
        guest.loaded().unwrap();
        let end = guest.wait().unwrap();
        assert!(matches!(end, PostcopyEnd::Completed(_)), "{end:?}");
        let served = serving.join().unwrap();
        assert!(matches!(served, Served::Completed(_)), "{served:?}");
    });
}

/// Over the second link, too, the destination says that it is alive while its embedder has the
/// guest; it closes the connection for pages that are asked for before that.
#[test]
fn a_guest_that_came_over_two_links_may_take_longer_to_be_taken_over_than_any_timeout() {
    for preempt in [false, true] {
        let [here, there] = guests();
        let destination = destination(&there).recover(SOON).listen(&any()).unwrap();
        let at = destination.endpoint();
        let source = source(&here).postcopy_preempt(preempt).timeout(SHORT).build().unwrap();
        thread::scope(|scope| {
            let receiving = scope.spawn(|| {
                let arrived = destination.receive().unwrap();
                idle(SHORT + SHORT / 2);
                arrived.accept().unwrap();
            });
            let mut postcopy = source.connect(&at).unwrap().switch_to_postcopy(&devices()).unwrap();
            postcopy.control().pause_postcopy().unwrap();
            paused(postcopy.serve().unwrap());
            // It may find the listener of the first link, which does not take it.
            while let Err(error) = postcopy.recover(&at, SOON) {
                assert!(!error.source_may_resume(), "{error}");
            }
            let served = postcopy.serve().unwrap();
            assert!(matches!(served, Served::Completed(_)), "{served:?}");
            receiving.join().unwrap();
        });
        assert!(load(&there[0], 7) == load(&here[0], 7));
    }
}
