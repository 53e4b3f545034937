//! Links that break, destinations that fail or say what they must not, cancels.

use std::net::TcpListener;

use multifd_engine::transports::{Channel, Endpoint};
use multifd_engine::wire::{Configuration, ReturnMessage};
use multifd_engine::{Error, ErrorKind, MigrationState, PAGE, Postcopy, RamBlock, Served, Source};

use crate::open_files::{is_open, socket};
use crate::peer::{LinkEnd, Peer, Script};
use crate::{SOON, There, completed, devices, guest, paused, preempted, request};

/// What became of a post-copy whose first link was cut.
enum Ended {
    /// The guest may run on at the source.
    Here(Error),
    Paused(Box<Postcopy>),
}

fn first_link(blocks: &[RamBlock], script: Script) -> (Ended, Peer, LinkEnd) {
    let (main, there) = There::start(Peer::new(blocks), script, false);
    let source = crate::source(blocks).paused_guest().build().unwrap();
    let switched =
        source.connect_over(main, Vec::new()).and_then(|precopy| precopy.switch_to_postcopy(&devices()));
    let ended = match switched {
        Err(error) => Ended::Here(error),
        Ok(mut postcopy) => match postcopy.serve() {
            Ok(Served::Paused(error)) => {
                assert!(!error.source_may_resume(), "{error}");
                Ended::Paused(Box::new(postcopy))
            }
            Ok(Served::Completed(_)) => panic!("completed over a link that was cut"),
            Err(error) => Ended::Here(error),
        },
    };
    let (peer, end) = there.end();
    (ended, peer, end)
}

fn script(cut: usize) -> Script {
    let requests = vec![request("pc.ram", 90, 1), request("vga.vram", 1, 1)];
    Script { cut: Some(cut), requests, ..Script::default() }
}

#[test]
fn a_link_that_is_cut_after_any_message_loses_nothing() {
    let blocks = guest();
    let (mut here, mut recovered) = (0, 0);
    // About 160 items and records; a sample of those, the switch whole.
    for cut in (0..40).chain((40..150).step_by(13)) {
        let (ended, mut peer, end) = first_link(&blocks, script(cut));
        assert_eq!(end, LinkEnd::Cut, "cut at {cut}");
        let mut postcopy = match ended {
            Ended::Here(error) => {
                assert!(error.source_may_resume(), "cut at {cut}: {error}");
                assert!(!peer.runs, "cut at {cut}: the guest runs at both ends");
                here += 1;
                continue;
            }
            Ended::Paused(postcopy) => postcopy,
        };
        assert_eq!(postcopy.control().state(), MigrationState::PostcopyPaused);
        // A second cut while the first is being recovered from, after that later.
        for second in [Some(cut % 7), Some(30), None] {
            let (main, there) = There::start(peer, Script { cut: second, ..script(0) }, true);
            match postcopy.recover_over(main, None) {
                Ok(()) => match postcopy.serve().unwrap() {
                    Served::Completed(report) => {
                        assert!(report.postcopy.unwrap().recoveries > 0);
                        recovered += 1;
                    }
                    Served::Paused(error) => assert!(second.is_some(), "cut at {cut}: {error}"),
                },
                Err(error) => {
                    assert!(second.is_some() && !error.source_may_resume(), "cut at {cut}: {error}");
                    assert_eq!(postcopy.control().state(), MigrationState::PostcopyPaused);
                }
            }
            peer = there.end().0;
            if peer.ended {
                break;
            }
        }
        peer.check(&blocks);
    }
    assert!(here > 10 && recovered > 10, "{here} before the hand-over, {recovered} recovered");
}

#[test]
fn a_channel_of_pages_that_are_asked_for_that_is_cut_pauses_both() {
    let (_, served, mut postcopy, ..) = preempted(Some(1));
    let Served::Paused(error) = served else { panic!("completed") };
    assert!(!error.source_may_resume(), "{error}");
    assert_eq!(postcopy.control().state(), MigrationState::PostcopyPaused);
    let error = postcopy.serve().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ApiMisuse, "{error}");
}

#[test]
fn a_destination_that_gives_up_before_its_devices_are_loaded_gives_the_guest_back() {
    let blocks = guest();
    let (precopy, there) = paused(&blocks, Script { shut_before_devices: Some(1), ..Script::default() });
    let control = precopy.control();
    let mut postcopy = precopy.switch_to_postcopy(&devices()).unwrap();
    let error = postcopy.serve().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::PeerAborted(1));
    assert!(error.source_may_resume() && error.to_string().contains("may run on at the source"), "{error}");
    assert_eq!(control.state(), MigrationState::Failed);
    there.end();
}

#[test]
fn a_destination_that_gives_up_later_has_lost_the_guest() {
    let blocks = guest();
    let (precopy, there) = paused(&blocks, Script { shut_at_run: Some(1), ..Script::default() });
    let mut postcopy = precopy.switch_to_postcopy(&devices()).unwrap();
    let error = postcopy.serve().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::PeerAborted(1));
    assert!(!error.source_may_resume() && error.to_string().contains("the guest is lost there"), "{error}");
    there.end();
}

fn encoded(message: &ReturnMessage) -> Vec<u8> {
    let mut bytes = Vec::new();
    message.encode(&mut bytes);
    bytes
}

fn asks(block: Option<&str>, offset: usize, len: usize) -> Vec<u8> {
    let block = block.map(|name| name.try_into().unwrap());
    encoded(&ReturnMessage::RequestPages { block, offset: offset as u64, len: len as u32 })
}

#[test]
fn a_request_for_what_is_not_there_pauses_and_is_named() {
    let blocks = guest();
    let bitmap = encoded(&ReturnMessage::RecvBitmap("pc.ram".try_into().unwrap()));
    for (answer, says) in [
        (asks(Some("pc.ram"), 96 * PAGE, PAGE), "a request for 4096 bytes at 0x60000"),
        (asks(Some("pc.ram"), 1, PAGE), "expected whole pages"),
        (asks(Some("pc.ram"), 0, 0), "a request for 0 bytes"),
        (asks(Some("nvram"), 0, PAGE), "RAM block nvram, which is not in this guest"),
        (asks(None, 0, PAGE), "names no RAM block"),
        (bitmap, "a bitmap of RAM block pc.ram, none was asked for"),
        (vec![0, 9, 0, 0], "return path message type"),
    ] {
        // Hangs up later, so that the source does not come to its end before it has read this.
        let script =
            Script { raw_answer: Some(answer), shut_at_run: None, cut: Some(60), ..Script::default() };
        let (precopy, there) = paused(&blocks, script);
        let mut postcopy = precopy.switch_to_postcopy(&devices()).unwrap();
        let Served::Paused(error) = postcopy.serve().unwrap() else { panic!("completed: {says}") };
        assert!(!error.source_may_resume());
        // Which of the two ends of the link shows first is chance.
        assert!(
            error.chain().contains(says) || error.kind() == ErrorKind::Transport,
            "{says}: {}",
            error.chain()
        );
        there.end();
    }
}

#[test]
fn a_flood_of_requests_is_answered_once_a_page() {
    let blocks = guest();
    let requests = (0..20_000).map(|n| request("pc.ram", n % 96, 1)).chain([request("pc.ram", 0, 96)]);
    let (precopy, there) = paused(&blocks, Script { requests: requests.collect(), ..Script::default() });
    let mut postcopy = precopy.switch_to_postcopy(&devices()).unwrap();
    completed(postcopy.serve().unwrap());
    there.end().0.check(&blocks);
}

#[test]
fn a_bitmap_that_cannot_be_is_refused_and_the_next_recovery_succeeds() {
    let blocks = guest();
    let bitmap = |name: &str, len: u64, mark: u64| {
        let mut bytes = encoded(&ReturnMessage::RecvBitmap(name.try_into().unwrap()));
        bytes.extend(len.to_be_bytes());
        bytes.extend(vec![0; len.min(1 << 12) as usize]);
        bytes.extend(mark.to_be_bytes());
        bytes
    };
    const MARK: u64 = 0x0123_4567_89ab_cdef;
    let (ended, mut peer, _) = first_link(&blocks, script(60));
    let Ended::Paused(mut postcopy) = ended else { panic!("not handed over") };
    for (bytes, says) in [
        (bitmap("pc.ram", 8, MARK), "a bitmap of 8 bytes for RAM block pc.ram, expected 16"),
        (bitmap("pc.ram", u64::MAX, MARK), "expected 16"),
        (bitmap("vga.vram", 8, MARK), "a bitmap of RAM block vga.vram, that of pc.ram was asked for"),
        (bitmap("nvram", 16, MARK), "a bitmap of RAM block nvram, which is not in this guest"),
        (bitmap("pc.ram", 16, MARK + 1), "behind the bitmap of RAM block pc.ram"),
    ] {
        let (main, there) = There::start(peer, Script { raw_bitmap: Some(bytes), ..Script::default() }, true);
        let error = postcopy.recover_over(main, None).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::PeerMisbehaved, "{says}");
        assert!(error.to_string().contains(says) && !error.source_may_resume(), "{says}: {error}");
        peer = there.end().0;
    }
    let (main, there) = There::start(peer, Script::default(), true);
    postcopy.recover_over(main, None).unwrap();
    completed(postcopy.serve().unwrap());
    there.end().0.check(&blocks);
}

#[test]
fn a_cancel_before_the_hand_over_is_a_cancel_and_after_it_is_refused() {
    let blocks = guest();
    let (precopy, there) = paused(&blocks, Script::default());
    assert!(precopy.canceller().cancel());
    let error = precopy.switch_to_postcopy(&devices()).err().unwrap();
    assert!(error.kind() == ErrorKind::Cancelled && error.source_may_resume(), "{error}");
    there.end();

    let (precopy, there) = paused(&blocks, Script::default());
    let canceller = precopy.canceller();
    let mut postcopy = precopy.switch_to_postcopy(&devices()).unwrap();
    assert!(!canceller.cancel(), "the guest is at the destination");
    completed(postcopy.serve().unwrap());
    there.end().0.check(&blocks);
}

#[test]
fn a_caller_can_cut_the_link_and_go_on_over_another() {
    let blocks = guest();
    let (precopy, there) = paused(&blocks, Script::default());
    let control = precopy.control();
    let mut postcopy = precopy.switch_to_postcopy(&devices()).unwrap();
    control.pause_postcopy().unwrap();
    let Served::Paused(error) = postcopy.serve().unwrap() else { panic!("completed") };
    assert!(error.to_string().contains("paused by the caller"), "{error}");
    let (peer, _) = there.end();
    let (main, there) = There::start(peer, Script::default(), true);
    postcopy.recover_over(main, None).unwrap();
    completed(postcopy.serve().unwrap());
    there.end().0.check(&blocks);
}

/// Whether the destination runs the guest by now cannot be told: it must not run here, too.
#[test]
fn a_link_that_this_end_cuts_before_the_devices_were_loaded_does_not_give_the_guest_back() {
    let blocks = guest();
    let requests = vec![request("pc.ram", 90, 1)];
    let (precopy, there) = paused(&blocks, Script { mute: true, requests, ..Script::default() });
    let control = precopy.control();
    let error = control.pause_postcopy().unwrap_err();
    assert!(error.kind() == ErrorKind::ApiMisuse && error.to_string().contains("is active"), "{error}");
    let mut postcopy = precopy.switch_to_postcopy(&devices()).unwrap();
    // It has RUN.
    while control.progress().requests == 0 {
        std::thread::yield_now();
    }
    control.pause_postcopy().unwrap();
    let Served::Paused(error) = postcopy.serve().unwrap() else { panic!("completed") };
    assert!(!error.source_may_resume(), "{error}");
    let (peer, _) = there.end();
    assert!(peer.runs);
    let (main, there) = There::start(peer, Script::default(), true);
    postcopy.recover_over(main, None).unwrap();
    completed(postcopy.serve().unwrap());
    assert_eq!(control.pause_postcopy().unwrap_err().kind(), ErrorKind::ApiMisuse);
    there.end().0.check(&blocks);
}

#[test]
fn a_link_that_was_replaced_leaves_no_descriptor_open() {
    let blocks = guest();
    let (ended, mut peer, _) = first_link(&blocks, script(60));
    let Ended::Paused(mut postcopy) = ended else { panic!("not handed over") };
    let (mut sent, mut links) = (0, Vec::new());
    for cut in [3, 4, 5, 6, 7] {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        links.push(socket(&ours));
        let script = Script { cut: Some(cut), ..script(0) };
        let there = There::over(theirs.try_into().unwrap(), peer, script, true);
        // It breaks while it is set up, or when pages go.
        if postcopy.recover_over(ours.try_into().unwrap(), None).is_ok() {
            assert!(matches!(postcopy.serve().unwrap(), Served::Paused(_)));
        }
        peer = there.end().0;
        assert_eq!(links.iter().filter(|link| is_open(link)).count(), 0, "cut at {cut}");
        let now = postcopy.progress().now().wire_bytes;
        assert!(now > sent, "what went over a link that is gone is counted");
        sent = now;
    }
    let (main, there) = There::start(peer, Script::default(), true);
    postcopy.recover_over(main, None).unwrap();
    completed(postcopy.serve().unwrap());
    there.end().0.check(&blocks);
}

#[test]
fn a_switch_that_was_not_allowed_is_refused_and_the_guest_runs_on() {
    let blocks = guest();
    let (main, there) = There::start(Peer::new(&blocks), Script::default(), false);
    let source = crate::source(&blocks).postcopy(false).paused_guest().build().unwrap();
    let precopy = source.connect_over(main, Vec::new()).unwrap();
    let error = precopy.switch_to_postcopy(&devices()).err().unwrap();
    assert!(error.kind() == ErrorKind::ApiMisuse && error.source_may_resume(), "{error}");
    there.end();
}

/// Its QEMU waits for both connections before it reads the first.
#[test]
fn a_destination_of_an_old_machine_type_gets_its_second_connection_before_it_is_asked_anything() {
    let blocks = guest();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let at: Endpoint = format!("tcp:{}", listener.local_addr().unwrap()).parse().unwrap();
    let accept = |peer, script, resumed| {
        let [main, urgent] = [(); 2].map(|()| Channel::try_from(listener.accept().unwrap().0).unwrap());
        (There::over(main, peer, script, resumed), urgent)
    };
    let source = Source::builder(blocks.clone(), Configuration::new("pc-q35-7.2"))
        .paused_guest()
        .postcopy(true)
        .postcopy_preempt(true)
        .timeout(SOON)
        .build()
        .unwrap();
    std::thread::scope(|scope| {
        let first = scope.spawn(|| accept(Peer::new(&blocks), script(60), false));
        let precopy = source.connect(&at).unwrap();
        let mut postcopy = precopy.switch_to_postcopy(&devices()).unwrap();
        assert!(matches!(postcopy.serve().unwrap(), Served::Paused(_)));
        let (there, _urgent) = first.join().unwrap();
        let (peer, _) = there.end();
        let second = scope.spawn(|| accept(peer, Script::default(), true));
        postcopy.recover(&at, SOON).unwrap();
        completed(postcopy.serve().unwrap());
        let (there, urgent) = second.join().unwrap();
        there.end().0.check(&blocks);
        assert_eq!(urgent.recv(&mut [0]).ok(), Some(1), "the record that ends it");
    });
}
