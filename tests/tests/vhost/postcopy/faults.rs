//! Page faults of back-ends, where there is something odd about them.

use std::sync::Arc;

use multifd_engine::vhost::{VhostDevice, VhostDevices, VhostRegion};
use multifd_engine::vm_memory::{GuestAddress, MmapRegion};
use multifd_engine::{PAGE, SoftwareLog};
use multifd_tests::virtio::{Memory, VERSION_1};

use super::pages::{Faulting, read_word};
use super::{Peer, Switched, destination, fill, postcopy, silent_source, switch};
use crate::backend::Driver;
use crate::guest::{HIGH, SOON, blocks, different, memory};

pub fn word(block: usize, page: usize) -> u64 {
    (block as u64) << 32 | page as u64 | 1 << 63
}

/// A guest that has switched, before any of its pages has come.
pub fn switched(here: &Memory, there: &Memory, back_ends: &multifd_engine::vhost::VhostPostcopy) -> Switched {
    fill(here);
    let source = silent_source(here).dirty_log(SoftwareLog::new(&blocks(here))).build().unwrap();
    let mut moved = switch(source, destination(there, back_ends), Vec::new()).unwrap();
    moved.guest().loaded().unwrap();
    moved
}

#[test]
fn each_thread_of_each_back_end_gets_the_page_that_it_touches() {
    let (here, there) = (memory(), memory());
    let mut both = [(); 2].map(|()| Faulting::start(&there, |_| None));
    let back_ends = postcopy(&there);
    for (name, back_end) in ["a", "b"].iter().zip(&mut both) {
        back_ends.add(name, &back_end.take_user()).unwrap();
    }
    let moved = switched(&here, &there, &back_ends);
    // The same pages by all, and each its own.
    let mut waiting = Vec::new();
    for turn in 0..40 {
        for (number, back_end) in both.iter().enumerate() {
            for (block, page) in [(0, turn), (1, 2 * turn + number + 100)] {
                waiting.push((block, page, back_end.read(block, page)));
            }
        }
    }
    for (block, page, reading) in waiting {
        assert_eq!(reading.word(), word(block, page));
    }
    let report = moved.complete().faults.unwrap();
    assert!(report.back_ends.iter().all(|back_end| back_end.faults >= 40), "{report:?}");
    assert_eq!(different(&here, &there), []);
    assert!(back_ends.failures().is_empty());
}

#[test]
fn ten_thousand_faults_on_one_page_ask_for_it_once() {
    let (here, there) = (memory(), memory());
    let mut back_end = Faulting::start(&there, |_| None);
    let back_ends = postcopy(&there);
    back_ends.add("busy", &back_end.take_user()).unwrap();
    let mut moved = switched(&here, &there, &back_ends);
    // Without a link nothing is answered: each wake without a page is a fault again.
    moved.cut();
    let readers: Vec<_> = (0..4).map(|_| back_end.read(1, 7)).collect();
    for _ in 0..10_000 {
        back_end.userfault.wake(&back_end.mapped[1], 7);
        std::thread::yield_now();
    }
    assert!(readers.iter().all(|reader| reader.waits()));
    moved.recover();
    for reader in readers {
        assert_eq!(reader.word(), word(1, 7));
    }
    let report = moved.complete();
    // Once when it was touched, and once over the new link at most.
    assert!(report.pages_requested <= 2, "{report:?}");
    let faults = &report.faults.unwrap().back_ends[0];
    assert!(faults.faults >= 1, "{faults:?}");
    assert!(back_ends.failures().is_empty(), "{:?}", back_ends.failures());
}

#[test]
fn a_fault_outside_of_all_regions_costs_the_back_end_and_not_the_guest() {
    let (here, there) = (memory(), memory());
    let mut odd = Faulting::start(&there, |_| None);
    let mut good = Faulting::start(&there, |_| None);
    let back_ends = postcopy(&there);
    back_ends.add("odd", &odd.take_user()).unwrap();
    back_ends.add("good", &good.take_user()).unwrap();
    let moved = switched(&here, &there, &back_ends);
    let elsewhere = Arc::new(MmapRegion::new(16 * PAGE).unwrap());
    odd.userfault.register(&elsewhere);
    let lost = Arc::clone(&elsewhere);
    let stray = std::thread::Builder::new().spawn(move || read_word(&lost, 3)).unwrap();
    let deadline = std::time::Instant::now() + SOON;
    while back_ends.failures().is_empty() {
        assert!(std::time::Instant::now() < deadline, "the fault is not heard of");
        std::thread::yield_now();
    }
    let failure = back_ends.failures()[0].to_string();
    let at = elsewhere.as_ptr() as u64 + 3 * PAGE as u64;
    assert!(
        failure.starts_with(&format!(
            "vhost device odd: lost to the post-copy: a page fault at {at:#x}, outside"
        ))
    );
    assert_eq!(good.read(0, 5).word(), word(0, 5), "the others are served");
    moved.complete();
    assert_eq!(different(&here, &there), []);
    odd.userfault.unregister(&elsewhere);
    assert_eq!(stray.join().unwrap(), 0);
}

#[test]
fn a_back_end_that_is_killed_while_it_waits_costs_no_page() {
    let Some(mut peer) = Peer::start("disk", 1) else { return };
    let (here, there) = (memory(), memory());
    let mut good = Faulting::start(&there, |_| None);
    let back_ends = postcopy(&there);
    let user = peer.take_user();
    back_ends.add("disk", &user).unwrap();
    back_ends.add("good", &good.take_user()).unwrap();
    let mut moved = switched(&here, &there, &back_ends);
    let driver = Driver::new(&there, GuestAddress(0x10_0000));
    let devices = crate::guest::devices(&there);
    devices.add(crate::backend::device("disk", user, std::slice::from_ref(&driver))).unwrap();
    devices.start().unwrap();
    // It waits for its ring.
    moved.cut();
    driver.queue.kick().unwrap();
    peer.process.kill();
    let deadline = std::time::Instant::now() + SOON;
    while back_ends.failures().is_empty() {
        assert!(std::time::Instant::now() < deadline, "that it is gone is not noticed");
        std::thread::yield_now();
    }
    let failure = back_ends.failures()[0].to_string();
    assert_eq!(failure, "vhost device disk: lost to the post-copy: the back-end closed the connection");
    let error = devices.stop().unwrap_err().chain();
    assert!(error.contains("the back-end closed the connection"), "{error}");
    moved.recover();
    assert_eq!(good.read(1, 9).word(), word(1, 9));
    moved.complete();
    assert_eq!(different(&here, &there), []);
}

/// Memory that a device did not have before: its pages come like all others.
#[test]
fn a_region_that_is_added_while_pages_come_is_faulted_on_like_the_others() {
    let Some(mut peer) = Peer::start("disk", 1) else { return };
    let (here, there) = (memory(), memory());
    let both = VhostRegion::of_guest_memory(&there).unwrap();
    let back_ends = multifd_engine::vhost::VhostPostcopy::new(both[..1].to_vec()).unwrap();
    let user = peer.take_user();
    back_ends.add("disk", &user).unwrap();
    let driver_here = Driver::new(&here, GuestAddress(0x10_0000));
    fill(&here);
    let mut driver = clear_rings(driver_here, &here);
    assert!(driver.order(33, false, GuestAddress(0x30_0000), 0x800));
    let source = silent_source(&here).dirty_log(SoftwareLog::new(&blocks(&here))).build().unwrap();
    let mut moved = switch(source, destination(&there, &back_ends), Vec::new()).unwrap();
    moved.guest().loaded().unwrap();
    let mut driver = driver.moved_to(&there);
    let devices = VhostDevices::new(both[..1].to_vec()).unwrap();
    let device =
        VhostDevice::new("disk", user, VERSION_1).ring(driver.queue.ring(), driver.queue.events().unwrap());
    devices.add(device).unwrap();
    devices.start().unwrap();
    driver.finish(SOON);
    devices.change_regions(both).unwrap();
    assert!(driver.order(34, false, GuestAddress(HIGH.0 + 0x1000), 0x800));
    driver.finish(SOON);
    let report = moved.complete();
    assert!(report.faults.unwrap().back_ends[0].faults > 0);
    assert!(back_ends.failures().is_empty(), "{:?}", back_ends.failures());
}

/// Rings of zeros, as a driver makes them, in memory that was filled.
pub fn clear_rings(driver: Driver, memory: &Memory) -> Driver {
    let zeros = vec![0_u8; 0x4000];
    multifd_engine::vm_memory::Bytes::write_slice(memory, &zeros, driver.queue.ring().descriptors).unwrap();
    driver
}

/// A device that is plugged in at the destination takes part from then on.
#[test]
fn a_back_end_that_joins_after_the_switch_faults_like_the_others() {
    let (here, there) = (memory(), memory());
    let back_ends = postcopy(&there);
    let moved = switched(&here, &there, &back_ends);
    let mut late = Faulting::start(&there, |_| None);
    back_ends.add("late", &late.take_user()).unwrap();
    assert_eq!(late.read(0, 77).word(), word(0, 77));
    moved.complete();
}
