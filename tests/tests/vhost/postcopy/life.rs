//! Rings that are taken over while descriptors, buffers and used rings are missing.

use multifd_engine::vhost::{VhostDevice, VhostDevices, VhostState};
use multifd_engine::vm_memory::{Bytes, GuestAddress};
use multifd_engine::{Incoming, PAGE, PageFaults, Precopy};
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

/// Their names, and where their rings are.
const DEVICES: [(&str, [u64; 2]); 2] = [("disk", [RINGS[0], RINGS[1]]), ("nic", [RINGS[2], RINGS[3]])];

/// The drivers of both devices.
type Drivers = [Vec<Driver>; 2];

/// Both devices at the source, and their back-ends.
fn at_source(here: &Memory, drivers: &Drivers) -> (VhostDevices, Vec<Own>) {
    let before = devices(here);
    let start = |((name, _), drivers): (&(&str, _), &Vec<Driver>)| {
        let (own, device) = own(name, Filler::new(2), drivers);
        before.add(device).unwrap();
        own
    };
    let owns = DEVICES.iter().zip(drivers).map(start).collect();
    before.start().unwrap();
    (before, owns)
}

/// A round while the devices work; then they stop, with requests in flight: their states.
fn leave(precopy: &mut Precopy, before: &VhostDevices, drivers: &mut Drivers, here: &Memory) -> [Vec<u8>; 2] {
    let all = |drivers: &mut Drivers, seed| {
        for ((_, at), drivers) in DEVICES.iter().zip(drivers) {
            work(drivers, at, seed);
        }
    };
    all(drivers, 1);
    precopy.round().unwrap();
    // Pages that nothing but the process reads.
    here.write_slice(&vec![7; 0x8_0000], GuestAddress(0x1000)).unwrap();
    // What is written from here on, by vCPUs and devices, is missing after the switch.
    all(drivers, 5);
    before.stop().unwrap();
    order_each(drivers, 100);
    DEVICES.map(|(name, _)| before.state(name).unwrap().encode())
}

/// Eight more orders on each ring.
fn order_each(drivers: &mut Drivers, seed: u8) {
    for ((_, at), drivers) in DEVICES.iter().zip(drivers) {
        for (driver, at) in drivers.iter_mut().zip(at) {
            (0..8).for_each(|turn| assert!(order(driver, *at, seed + turn)));
        }
    }
}

#[test]
fn two_back_ends_and_threads_of_the_process_fault_their_way_through_one_memory() {
    let (Some(mut disk), Some(mut nic)) = (Peer::start("disk", 2), Peer::start("nic", 2)) else { return };
    let (here, there) = (memory(), memory());
    fill(&here);
    let mut drivers = DEVICES.map(|(_, at)| drivers(&here, &at));
    let (before, _owns) = at_source(&here, &drivers);
    let source = logged(silent_source(&here), &here, &before);
    let back_ends = postcopy(&there);
    let users = [disk.take_user(), nic.take_user()];
    DEVICES.iter().zip(&users).for_each(|((name, _), user)| back_ends.add(name, user).unwrap());
    assert!(back_ends.blockers().is_empty());
    let (give, taken) = std::sync::mpsc::channel();
    let source_memory = here.clone();
    let mut moved = switch_after(source, destination(&there, &back_ends), move |precopy| {
        let states = leave(precopy, &before, &mut drivers, &source_memory);
        let first = states[0].clone();
        give.send((drivers, states)).unwrap();
        first
    })
    .unwrap();
    let (drivers, states) = taken.recv_timeout(SOON).unwrap();
    let moved_to = |driver: Driver| driver.moved_to(&there);
    let mut drivers: Drivers = drivers.map(|all| all.into_iter().map(moved_to).collect());
    moved.guest().loaded().unwrap();
    // A back-end looks at its rings when it is told of them: nothing else has touched these.
    let parts = users.into_iter().zip(&states).zip(DEVICES.iter().zip(&drivers));
    let after: Vec<_> = parts
        .map(|((user, state), ((name, _), drivers))| {
            take_over(&there, name, user, &VhostState::parse(state).unwrap(), drivers)
        })
        .collect();
    let reading = [1, 1237].map(|step| {
        let there = there.clone();
        std::thread::Builder::new().spawn(move || read_all(&there, step)).unwrap()
    });
    let finish = |drivers: &mut Drivers| drivers.iter_mut().flatten().for_each(|driver| driver.finish(SOON));
    drivers.iter().flatten().for_each(|driver| driver.queue.kick().unwrap());
    finish(&mut drivers);
    // And more, while the rest comes.
    order_each(&mut drivers, 50);
    finish(&mut drivers);
    for thread in reading {
        thread.join().unwrap();
    }
    check_faults(&moved.complete().faults.unwrap());
    assert!(back_ends.failures().is_empty(), "{:?}", back_ends.failures());
    // After the end, as any device: rings stop, and go on.
    for devices in &after {
        devices.stop().unwrap();
        devices.start().unwrap();
    }
    order_each(&mut drivers, 77);
    finish(&mut drivers);
    for driver in drivers.iter().flatten() {
        assert_eq!((driver.done, driver.in_flight()), (4 + 4 + 3 * 8, 0), "every order is accounted for");
    }
    assert_eq!(unexplained(&here, &there), []);
}

/// Those of the back-ends are counted by device, and apart from the process's own.
fn check_faults(faults: &PageFaults) {
    let names: Vec<_> = faults.back_ends.iter().map(|back_end| &back_end.device[..]).collect();
    assert_eq!(names, ["disk", "nic"]);
    assert!(faults.back_ends.iter().all(|back_end| back_end.faults > 0), "{faults:?}");
    assert!(faults.back_ends.iter().all(|back_end| back_end.fault_us.max <= back_end.blocktime_us));
    assert!(faults.faults > 0, "{faults:?}");
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
    after.add(VhostDevice::load("disk", user, &moved.state(), events).unwrap()).unwrap();
    let error = after.start().unwrap_err().chain();
    assert!(error.contains("its pages are still coming by post-copy"), "{error}");
    moved.complete();
    after.start().unwrap();
}
