//! Back-ends that do not answer, refuse or go, between any two messages of a post-copy.

use std::fs::File;
use std::time::Duration;

use multifd_engine::vhost::vhost::vhost_user::message::{FrontendReq, VhostUserProtocolFeatures};
use multifd_engine::vhost::{VhostPostcopy, VhostUser};
use multifd_engine::{Error, SoftwareLog};
use multifd_tests::virtio::Memory;

use super::pages::Faulting;
use super::{destination, fill, postcopy, silent_source, switch};
use crate::guest::{Attached, attach, blocks, memory};
use crate::script::{self, Answer};

/// Longer than any answer that comes takes on a busy machine.
pub const LONG: Duration = Duration::from_secs(1);

/// The requests of a post-copy, in their order, and what the engine was doing.
const BEFORE_RUN: [(FrontendReq, &str, &str); 3] = [
    (FrontendReq::POSTCOPY_ADVISE, "POSTCOPY_ADVISE", "announcing a post-copy"),
    (FrontendReq::POSTCOPY_LISTEN, "POSTCOPY_LISTEN", "telling it that post-copy begins"),
    (FrontendReq::SET_MEM_TABLE, "SET_MEM_TABLE", "sharing memory that comes by post-copy"),
];

/// Moves a guest whose device is refused: the errors of both ends. The guest goes on at the source.
fn refused(here: &Memory, there: &Memory, back_ends: &VhostPostcopy) -> Error {
    let destination = destination(there, back_ends);
    let to = destination.endpoint();
    let source = silent_source(here).dirty_log(SoftwareLog::new(&blocks(here))).build().unwrap();
    let sending = move || {
        let state = multifd_engine::DeviceState::opaque("device", 1, b"");
        let mut postcopy = source.connect(&to)?.switch_to_postcopy(&state)?;
        // A refusal may be on its way while the source lets go.
        postcopy.serve().map(|served| panic!("{served:?}"))
    };
    let sending = std::thread::Builder::new().spawn(sending).unwrap();
    let error = destination.receive_live().unwrap_err();
    let at_source = sending.join().unwrap().unwrap_err();
    assert!(at_source.source_may_resume(), "{}", at_source.chain());
    error
}

/// A migration to this back-end alone fails before the guest has left: why.
fn refusal(user: &VhostUser, there: &Memory) -> String {
    let here = memory();
    let back_ends = postcopy(there);
    back_ends.add("odd", user).unwrap();
    refused(&here, there, &back_ends).chain()
}

#[test]
fn a_back_end_that_says_nothing_or_goes_ends_the_move_before_the_guest_has_left() {
    for (request, name, doing) in BEFORE_RUN {
        for (answer, why) in [
            (false, format!("no reply to {name} within {LONG:?}")),
            (true, format!("{name}: the back-end closed the connection")),
        ] {
            let there = memory();
            let odd = move |asked| match asked == u32::from(request) {
                true if answer => Some(Answer::HangUp),
                true => Some(Answer::Silence),
                false => None,
            };
            let mut back_end = Faulting::start(&there, odd);
            let error = refusal(&back_end.take_user().timeout(LONG), &there);
            assert!(error.contains(&format!("vhost device odd: {doing}: ")), "{error}");
            assert!(error.ends_with(&why), "{error}");
        }
    }
}

#[test]
fn a_back_end_without_page_faults_is_named_before_anything_is_said_to_any() {
    let there = memory();
    let mut good = Faulting::start(&there, |_| None);
    let (socket, journal) = script::start(|_| Answer::Usual);
    let Attached { user, .. } = attach(socket, super::faulting() - VhostUserProtocolFeatures::PAGEFAULT);
    let back_ends = postcopy(&there);
    back_ends.add("good", &good.take_user()).unwrap();
    back_ends.add("old", &user).unwrap();
    let blocker = "vhost device old: cannot take part in a post-copy: VHOST_USER_PROTOCOL_F_PAGEFAULT is not negotiated \
        with its back-end";
    let blockers: Vec<_> = back_ends.blockers().iter().map(ToString::to_string).collect();
    assert_eq!(blockers, [blocker]);
    let error = refused(&memory(), &there, &back_ends).chain();
    assert!(error.ends_with(blocker), "{error}");
    let advise = u32::from(FrontendReq::POSTCOPY_ADVISE);
    assert!(journal.lock().unwrap().iter().all(|(request, _)| *request != advise));
    assert!(!good.asked().contains(&advise));
}

#[test]
fn what_is_no_userfaultfd_is_refused() {
    let there = memory();
    for (descriptor, why) in
        [(false, "its back-end made no userfaultfd"), (true, "expected anon_inode:[userfaultfd]")]
    {
        let odd = move |asked| {
            (asked == u32::from(FrontendReq::POSTCOPY_ADVISE)).then(|| match descriptor {
                true => Answer::Descriptor(File::open("/dev/null").unwrap().into()),
                false => Answer::Body(Vec::new()),
            })
        };
        let mut back_end = Faulting::start(&there, odd);
        let error = refusal(&back_end.take_user(), &there);
        assert!(error.contains(why), "{error}");
    }
}

/// QEMU's library answers so: the reply is the request.
#[test]
fn a_back_end_that_answers_with_our_addresses_is_refused_before_the_guest_has_left() {
    let there = memory();
    let (socket, _) = script::start_with_bodies({
        let userfault = super::pages::Userfault::new();
        move |asked, body| match body.len() {
            0 if asked == u32::from(FrontendReq::POSTCOPY_ADVISE) => {
                Answer::Descriptor(userfault.duplicate())
            }
            72 => Answer::Body(body.to_vec()),
            _ => Answer::Usual,
        }
    });
    let Attached { user, .. } = attach(socket, super::faulting());
    let error = refusal(&user, &there);
    assert!(error.contains("its answer to SET_MEM_TABLE has our own address 0x"), "{error}");
    assert!(error.contains("libvhost-user"), "{error}");
}

#[test]
fn a_back_end_that_does_not_end_is_named_and_the_guest_is_whole() {
    for hang_up in [false, true] {
        let (here, there) = (memory(), memory());
        fill(&here);
        let odd = move |asked| match asked == u32::from(FrontendReq::POSTCOPY_END) {
            true if hang_up => Some(Answer::HangUp),
            true => Some(Answer::Silence),
            false => None,
        };
        let mut back_end = Faulting::start(&there, odd);
        let back_ends = postcopy(&there);
        back_ends.add("odd", &back_end.take_user().timeout(LONG)).unwrap();
        let source = silent_source(&here).dirty_log(SoftwareLog::new(&blocks(&here))).build().unwrap();
        let mut moved = switch(source, destination(&there, &back_ends), Vec::new()).unwrap();
        moved.guest().loaded().unwrap();
        moved.complete();
        assert_eq!(crate::guest::different(&here, &there), []);
        let failures: Vec<_> = back_ends.failures().iter().map(ToString::to_string).collect();
        assert_eq!(failures.len(), 1, "{failures:?}");
        // A connection that is closed may be seen before the answer is missed.
        let known = ["telling it that post-copy is over", "the back-end closed the connection"];
        assert!(known.iter().any(|why| failures[0].contains(why)), "{failures:?}");
    }
}

/// One that is added twice would hear everything twice.
#[test]
fn a_back_end_takes_part_in_one_post_copy() {
    let there = memory();
    let mut back_end = Faulting::start(&there, |_| None);
    let (first, second) = (postcopy(&there), postcopy(&there));
    let user = back_end.take_user();
    first.add("disk", &user).unwrap();
    let error = second.add("disk", &user).unwrap_err().to_string();
    assert_eq!(error, "vhost device disk: its back-end takes part in a post-copy already");
}
