//! Links that break while back-ends wait, and answers that wait for pages.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use multifd_engine::vhost::VhostDevice;
use multifd_engine::vhost::vhost::vhost_user::message::FrontendReq;
use multifd_engine::vm_memory::GuestAddress;
use multifd_tests::virtio::VERSION_1;

use super::faults::{switched, word};
use super::messages::LONG;
use super::pages::{Faulting, read_word};
use super::postcopy;
use crate::backend::Driver;
use crate::guest::{SOON, devices, different, memory};

#[test]
fn a_back_end_that_waits_while_the_link_breaks_goes_on_over_the_next() {
    let (here, there) = (memory(), memory());
    let mut back_end = Faulting::start(&there, |_| None);
    let back_ends = postcopy(&there);
    back_ends.add("disk", &back_end.take_user()).unwrap();
    let mut moved = switched(&here, &there, &back_ends);
    assert_eq!(back_end.read(0, 1).word(), word(0, 1));
    for turn in 0..2 {
        moved.cut();
        let reading = back_end.read(1, 3 + turn);
        assert!(reading.waits());
        moved.recover();
        assert_eq!(reading.word(), word(1, 3 + turn));
    }
    moved.complete();
    assert_eq!(different(&here, &there), []);
}

/// The thread that would answer waits for a page, for longer than answers may take.
#[test]
fn an_answer_that_waits_for_a_page_is_waited_for_as_long_as_the_page_is() {
    let (here, there) = (memory(), memory());
    let touched = Arc::new(AtomicBool::new(false));
    let seen = Arc::clone(&touched);
    let mut back_end = Faulting::start_with(&there, move |_, mapped| {
        let region = Arc::clone(&mapped[0]);
        move |asked| {
            if asked == u32::from(FrontendReq::SET_VRING_NUM) {
                seen.store(true, Ordering::Release);
                read_word(&region, 99);
            }
            None
        }
    });
    let user = back_end.take_user().timeout(LONG);
    let back_ends = postcopy(&there);
    back_ends.add("slow", &user).unwrap();
    let mut moved = switched(&here, &there, &back_ends);
    moved.cut();
    let driver = Driver::new(&there, GuestAddress(0x10_0000));
    let device =
        VhostDevice::new("slow", user, VERSION_1).ring(driver.queue.ring(), driver.queue.events().unwrap());
    let all = devices(&there);
    all.add(device).unwrap();
    let starting = {
        let all = all.clone();
        std::thread::Builder::new().spawn(move || all.start()).unwrap()
    };
    let deadline = std::time::Instant::now() + SOON;
    while !touched.load(Ordering::Acquire) {
        assert!(std::time::Instant::now() < deadline, "the back-end was not asked");
        std::thread::yield_now();
    }
    // For twice as long as an answer may take.
    let begun = std::time::Instant::now();
    while begun.elapsed() < 2 * LONG {
        assert!(!starting.is_finished(), "{:?}", starting.join());
        std::thread::yield_now();
    }
    moved.recover();
    starting.join().unwrap().unwrap();
    moved.complete();
    assert!(back_ends.failures().is_empty(), "{:?}", back_ends.failures());
}
