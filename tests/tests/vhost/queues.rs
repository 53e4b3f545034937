//! A back-end with several rings, each on a thread of its own, while memory comes and goes.

use std::time::Instant;

use multifd_engine::vhost::vhost::vhost_user::message::VhostUserProtocolFeatures;
use multifd_engine::vhost::{VhostDevices, VhostRegion};
use multifd_engine::vm_memory::GuestAddress;
use multifd_engine::{DirtyLog, PAGE, RegionLog};

use crate::backend::{Driver, Filler, drain, own};
use crate::guest::{HIGH, Replica, SOON, bitmaps, blocks, memory, place, set};

const QUEUES: usize = 4;
/// What the rings and orders of the drivers take of low memory.
const RINGS: u64 = 0x4000;
const FAR: u64 = 1 << 40;

/// Regions over the same two blocks: all of the low one, and each half of the high one where it is
/// said.
fn regions(all: &[multifd_engine::RamBlock], high: Option<u64>, far: Option<u64>) -> Vec<VhostRegion> {
    let half = all[1].used_len() / 2;
    let part = |at: u64, range| VhostRegion::new(GuestAddress(at), &all[1]).part(range);
    let low = VhostRegion::new(GuestAddress(0), &all[0]);
    let high = high.map(|at| part(at, 0..half));
    let far = far.map(|at| part(at, half..2 * half));
    [Some(low), high, far].into_iter().flatten().collect()
}

fn every_write_arrives(protocol: VhostUserProtocolFeatures) {
    let memory = memory();
    let ram = blocks(&memory);
    let mut drivers: Vec<_> =
        (0..QUEUES as u64).map(|queue| Driver::new(&memory, GuestAddress(queue * RINGS))).collect();
    let mut filler = Filler::new(QUEUES);
    filler.protocol &= protocol;
    let (_own, device) = own("own", filler, &drivers);
    let devices = VhostDevices::new(regions(&ram, Some(HIGH.0), None)).unwrap();
    devices.add(device).unwrap();
    devices.start().unwrap();
    let (mut vhost, mut written) = (devices.log(), RegionLog::of_guest_memory(&memory).unwrap());
    vhost.start(&ram).unwrap();
    written.start(&ram).unwrap();
    let mut replica = Replica::of(&ram);

    let half = ram[1].used_len() / 2;
    for round in 0..1000_u64 {
        for (queue, driver) in drivers.iter_mut().enumerate() {
            driver.take_done();
            // Each ring has its own part of what is filled: low memory first, then the half that is
            // always there.
            let part = 0x10_0000 * queue as u64;
            let offset = round * 64 % 0x2000;
            let at = match round % 3 {
                0 => GuestAddress(0x20_0000 + part + offset),
                _ => GuestAddress(HIGH.0 + part + offset),
            };
            let len = 1 + round as usize * 97 % (2 * PAGE);
            assert!(driver.order_apart(round as u8, round % 5 == 0, at, len));
            if round % 10 == 9 {
                driver.finish(SOON);
            }
        }
        match round % 200 {
            // The other half comes, far away; goes; and comes at another place.
            20 => devices.change_regions(regions(&ram, Some(HIGH.0), Some(FAR))).unwrap(),
            90 => devices.change_regions(regions(&ram, Some(HIGH.0), None)).unwrap(),
            110 => devices.change_regions(regions(&ram, Some(HIGH.0), Some(HIGH.0 + 8 * half))).unwrap(),
            180 => devices.change_regions(regions(&ram, Some(HIGH.0), None)).unwrap(),
            _ => {}
        }
        if round % 100 == 99 {
            devices.stop().unwrap();
            vhost.last_sync(&replica.bitmaps).unwrap();
        }
        replica.follow(&mut [&mut written, &mut vhost]);
        if round % 100 == 99 {
            assert_eq!(replica.different(), [], "round {round}");
            devices.start().unwrap();
        }
    }
    drain(&devices, &mut drivers, SOON);
    assert!(drivers.iter().all(|driver| driver.done == 1000));
    vhost.stop();
}

#[test]
fn every_write_of_several_rings_arrives_while_memory_slots_come_and_go() {
    every_write_arrives(VhostUserProtocolFeatures::all());
}

#[test]
fn every_write_of_several_rings_arrives_while_the_memory_table_changes() {
    every_write_arrives(!VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS);
}

#[test]
fn a_back_end_without_acknowledgements_is_waited_for_all_the_same() {
    every_write_arrives(!VhostUserProtocolFeatures::REPLY_ACK);
}

/// Memory that comes while the log is on is logged, at the place that it has then; what was written
/// before is told as it lay.
#[test]
fn new_memory_is_logged_and_old_logs_are_read() {
    let memory = memory();
    let ram = blocks(&memory);
    let mut drivers = [Driver::new(&memory, GuestAddress(0))];
    let (_own, device) = own("own", Filler::new(1), &drivers);
    let devices = VhostDevices::new(regions(&ram, Some(HIGH.0), None)).unwrap();
    devices.add(device).unwrap();
    devices.start().unwrap();
    let mut log = devices.log();
    let reported = bitmaps(&ram);
    log.start(&ram).unwrap();
    let used = place(drivers[0].queue.used_page());

    let mut fill = |at: u64| {
        assert!(drivers[0].order(7, false, GuestAddress(at), 16));
        // Not by its driver, whose memory has no such place: it is the block's other half.
        let deadline = Instant::now() + SOON;
        while drivers[0].queue.used().unwrap().is_none() {
            assert!(Instant::now() < deadline, "the order is not done");
            std::thread::yield_now();
        }
    };
    let half = ram[1].used_len() / 2;
    fill(HIGH.0 + 0x3000);
    devices.change_regions(regions(&ram, Some(FAR), Some(2 * FAR))).unwrap();
    fill(FAR + 0x5000);
    fill(2 * FAR + 0x6000);
    devices.change_regions(regions(&ram, None, None)).unwrap();
    log.sync(&reported).unwrap();
    let far = (1, half as usize / PAGE + 6);
    assert_eq!(set(&reported), [used, (1, 3), (1, 5), far]);
    log.stop();
}
