//! Rings that are taken over while descriptors, buffers and used rings are missing.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use multifd_engine::vhost::VhostState;
use multifd_engine::vm_memory::{Bytes, GuestAddress};
use multifd_engine::{Incoming, PAGE};
use multifd_tests::virtio::Memory;

use super::{Peer, destination, fill, logged, postcopy, silent_source, switch_after, take_over};
use crate::backend::{Driver, Filler, Own, own};
use crate::guest::{HIGH, SOON, blocks, devices, different, memory, place, source};

/// Where the driver of each device has its rings, and what it has filled.
const RINGS: [u64; 4] = [0x10_0000, 0x20_0000, HIGH.0 + 0x10_0000, HIGH.0 + 0x20_0000];
const AREA: u64 = 0x8_0000;

/// Bytes of the part of the memory that a driver and its device write: rings, orders, what is
/// filled.
const OWN: u64 = AREA + Driver::SLOTS as u64 * 0x4000;

fn drivers(memory: &Memory, at: &[u64]) -> Vec<Driver> {
    at.iter().map(|at| Driver::new(memory, GuestAddress(*at))).collect()
}

fn order(driver: &mut Driver, at: u64, seed: u8) -> bool {
    driver.order_apart(seed, false, GuestAddress(at + AREA), 0x2800)
}

/// Has a device at the source do some work.
fn work(drivers: &mut [Driver], at: &[u64], seed: u8) {
    for (driver, at) in drivers.iter_mut().zip(at) {
        (0..4).for_each(|turn| assert!(order(driver, *at, seed + turn)));
        driver.finish(SOON);
    }
    assert!(drivers.iter().all(|driver| driver.in_flight() == 0));
}

/// Pages that differ and are not of a driver's own part.
fn unexplained(here: &Memory, there: &Memory) -> Vec<(usize, usize)> {
    let own = |at: &u64| {
        let (block, first) = place(GuestAddress(*at));
        (block, first..first + OWN as usize / PAGE)
    };
    let parts: Vec<_> = RINGS.iter().map(own).collect();
    let explained =
        |(block, page): &(usize, usize)| parts.iter().any(|(of, pages)| of == block && pages.contains(page));
    different(here, there).into_iter().filter(|page| !explained(page)).collect()
}

/// Reads all of memory, as a vCPU would.
fn read_all(there: &Memory, step: usize) -> u64 {
    let mut sum = 0_u64;
    for block in blocks(there) {
        for page in (0..block.pages()).map(|turn| turn * step % block.pages()) {
            let word: u64 = block.memory().slice(page * PAGE, 8).unwrap().read_obj(0).unwrap();
            sum = sum.wrapping_add(word);
        }
    }
    sum
}

#[test]
fn two_back_ends_and_threads_of_the_process_fault_their_way_through_one_memory() {
    let (Some(mut disk), Some(mut nic)) = (Peer::start("disk", 2), Peer::start("nic", 2)) else { return };
    let (here, there) = (memory(), memory());
    fill(&here);
    // At the source: two devices that work, with their log.
    let [a, b, c, d] = RINGS;
    let (mut first, mut second) = (drivers(&here, &[a, b]), drivers(&here, &[c, d]));
    let (_disk, disk_there) = own("disk", Filler::new(2), &first);
    let (_nic, nic_there) = own("nic", Filler::new(2), &second);
    let before = devices(&here);
    before.add(disk_there).unwrap();
    before.add(nic_there).unwrap();
    before.start().unwrap();
    let source = logged(silent_source(&here), &here, &before);

    let back_ends = postcopy(&there);
    let (disk_user, nic_user) = (disk.take_user(), nic.take_user());
    back_ends.add("disk", &disk_user).unwrap();
    back_ends.add("nic", &nic_user).unwrap();
    assert!(back_ends.blockers().is_empty());
    let fresh = here.clone();
    let (give, taken) = std::sync::mpsc::channel();
    let mut moved = switch_after(source, destination(&there, &back_ends), move |precopy| {
        work(&mut first, &[a, b], 1);
        work(&mut second, &[c, d], 1);
        precopy.round().unwrap();
        // Pages that nothing but the process reads.
        let again = fresh.write_slice(&vec![7; 0x8_0000], GuestAddress(0x1000));
        again.unwrap();
        // What is written from here on, by vCPUs and devices, is missing after the switch.
        work(&mut first, &[a, b], 5);
        work(&mut second, &[c, d], 5);
        before.stop().unwrap();
        // In flight at the switch.
        for (driver, at) in first.iter_mut().zip([a, b]).chain(second.iter_mut().zip([c, d])) {
            (0..8).for_each(|turn| assert!(order(driver, at, 100 + turn)));
        }
        let states = ["disk", "nic"].map(|name| before.state(name).unwrap().encode());
        give.send((first, second, states.clone())).unwrap();
        states[0].clone()
    })
    .unwrap();
    let (first, second, states) = taken.recv_timeout(SOON).unwrap();
    let [disk_state, nic_state] = states.map(|state| VhostState::parse(&state).unwrap());
    let mut first: Vec<_> = first.into_iter().map(|driver| driver.moved_to(&there)).collect();
    let mut second: Vec<_> = second.into_iter().map(|driver| driver.moved_to(&there)).collect();
    moved.guest().loaded().unwrap();
    // A back-end looks at its rings when it is told of them: nothing else has touched these.
    let disk_here = take_over(&there, "disk", disk_user, &disk_state, &first);
    let nic_here = take_over(&there, "nic", nic_user, &nic_state, &second);
    let running = Arc::new(AtomicBool::new(true));
    let reading: Vec<_> = [1, 1237]
        .map(|step| {
            let (there, running) = (there.clone(), Arc::clone(&running));
            let read = move || {
                let sum = read_all(&there, step);
                while running.load(Ordering::Acquire) {
                    std::thread::yield_now();
                }
                sum
            };
            std::thread::Builder::new().spawn(read).unwrap()
        })
        .into();
    for driver in first.iter().chain(&second) {
        driver.queue.kick().unwrap();
    }
    for driver in first.iter_mut().chain(&mut second) {
        driver.finish(SOON);
    }
    // And more, while the rest comes.
    for (driver, at) in first.iter_mut().zip([a, b]).chain(second.iter_mut().zip([c, d])) {
        (0..8).for_each(|turn| assert!(order(driver, at, 50 + turn)));
        driver.finish(SOON);
    }
    running.store(false, Ordering::Release);
    for thread in reading {
        thread.join().unwrap();
    }
    let report = moved.complete();
    for driver in first.iter().chain(&second) {
        assert_eq!((driver.done, driver.in_flight()), (4 + 4 + 8 + 8, 0), "every order is accounted for");
    }
    let faults = report.faults.unwrap();
    let names: Vec<_> = faults.back_ends.iter().map(|back_end| &back_end.device[..]).collect();
    assert_eq!(names, ["disk", "nic"]);
    assert!(faults.back_ends.iter().all(|back_end| back_end.faults > 0), "{faults:?}");
    assert!(faults.back_ends.iter().all(|back_end| back_end.fault_us.max <= back_end.blocktime_us));
    assert!(faults.faults > 0, "those of the process are counted apart");
    assert!(back_ends.failures().is_empty(), "{:?}", back_ends.failures());
    // After the end, as any device: rings stop, and go on.
    for devices in [&disk_here, &nic_here] {
        devices.stop().unwrap();
        devices.start().unwrap();
    }
    assert!(order(&mut first[0], a, 77));
    first[0].finish(SOON);
    assert_eq!(unexplained(&here, &there), []);
}

#[test]
fn a_source_that_may_switch_and_does_not_leaves_back_ends_that_run_as_always() {
    let Some(mut peer) = Peer::start("disk", 1) else { return };
    let (here, there) = (memory(), memory());
    fill(&here);
    let mut drivers = drivers(&here, &RINGS[..1]);
    let (_own, device) = own("disk", Filler::new(1), &drivers);
    let before = devices(&here);
    before.add(device).unwrap();
    before.start().unwrap();
    let back_ends = postcopy(&there);
    let user = peer.take_user();
    back_ends.add("disk", &user).unwrap();
    let source = logged(source(blocks(&here)).postcopy(true), &here, &before);
    let destination = destination(&there, &back_ends);
    let to = destination.endpoint();
    let sending = std::thread::Builder::new()
        .spawn(move || {
            let precopy = source.connect(&to).unwrap();
            work(&mut drivers, &RINGS[..1], 1);
            before.stop().unwrap();
            assert!(order(&mut drivers[0], RINGS[0], 9));
            let state = before.state("disk").unwrap();
            let stopped = precopy.stop_copy().unwrap();
            let device = multifd_engine::DeviceState::opaque("device", 1, &state.encode());
            stopped.commit(&device).unwrap();
            (drivers, state)
        })
        .unwrap();
    let Incoming::Arrived(arrived) = destination.receive_live().unwrap() else { panic!("it switched") };
    arrived.accept().unwrap();
    let (drivers, state) = sending.join().unwrap();
    let mut drivers: Vec<_> = drivers.into_iter().map(|driver| driver.moved_to(&there)).collect();
    let _devices = take_over(&there, "disk", user, &state, &drivers);
    drivers[0].queue.kick().unwrap();
    drivers[0].finish(SOON);
    assert_eq!(drivers[0].done, 5);
    assert!(back_ends.failures().is_empty(), "{:?}", back_ends.failures());
}

/// A device whose back-end is not told would read zeros: it is refused its memory until all of that
/// is here.
#[test]
fn a_back_end_that_does_not_wait_for_pages_gets_no_memory_that_misses_some() {
    let (here, there) = (memory(), memory());
    fill(&here);
    let drivers_here = drivers(&here, &RINGS[..1]);
    let (_own, device) = own("disk", Filler::new(1), &drivers_here);
    let before = devices(&here);
    before.add(device).unwrap();
    before.start().unwrap();
    before.stop().unwrap();
    let state = before.state("disk").unwrap();
    let back_ends = postcopy(&there);
    let source = logged(silent_source(&here), &here, &before);
    let encoded = state.encode();
    let mut moved = super::switch(source, destination(&there, &back_ends), encoded).unwrap();
    moved.guest().loaded().unwrap();
    let (_late, socket) = Own::start(Filler::new(1));
    let user = crate::guest::attach(socket, crate::guest::wanted()).user;
    let moved_drivers: Vec<_> = drivers_here.into_iter().map(|driver| driver.moved_to(&there)).collect();
    let events = moved_drivers.iter().map(|driver| driver.queue.events().unwrap()).collect();
    let after = devices(&there);
    after
        .add(multifd_engine::vhost::VhostDevice::load("disk", user, &moved.state(), events).unwrap())
        .unwrap();
    let error = after.start().unwrap_err().chain();
    assert!(error.contains("its pages are still coming by post-copy"), "{error}");
    moved.complete();
    after.start().unwrap();
}
