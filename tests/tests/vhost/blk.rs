//! qemu-storage-daemon's vhost-user-blk: a real back-end, a real migration.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use multifd_engine::vhost::{VhostDevice, VhostDevices, VhostState};
use multifd_engine::vm_memory::GuestAddress;
use multifd_engine::{Destination, DeviceState, DirtyLog, RamBlock, RegionLog};
use multifd_tests::virtio::{Buffer, Disk, Memory, VERSION_1};
use multifd_tests::{Process, Scratch, skip::skipped};

use crate::guest::{
    Attached, HIGH, Replica, SOON, attach, bitmaps, blocks, devices, different, memory, place, set, source,
    wanted,
};
use crate::peers;

/// A guest with a disk that a qemu-storage-daemon serves.
struct Guest {
    memory: Memory,
    devices: VhostDevices,
    disk: Disk,
    daemon: Process,
    scratch: Scratch,
}

const AREA: GuestAddress = GuestAddress(HIGH.0 + 0x10_0000);

fn guest() -> Option<Guest> {
    if let Some(why) = peers::missing_storage_daemon() {
        skipped(&why).unwrap();
        return None;
    }
    let scratch = Scratch::new().unwrap();
    peers::disk_image(&scratch.path("disk"));
    let (daemon, socket) = peers::storage_daemon("disk0", &scratch.path("disk"), &scratch.path("disk0.sock"));
    let Attached { user, .. } = attach(socket, wanted());
    let memory = memory();
    let disk = Disk::new(&memory, AREA, 1).unwrap();
    let devices = devices(&memory);
    let device = VhostDevice::new("disk0", user, VERSION_1).finishes_requests();
    devices.add(device.ring(disk.queue.ring(), disk.queue.events().unwrap())).unwrap();
    devices.start().unwrap();
    Some(Guest { memory, devices, disk, daemon, scratch })
}

#[test]
fn the_log_has_exactly_what_the_back_end_wrote() {
    let Some(mut guest) = guest() else { return };
    let ram = blocks(&guest.memory);
    let mut log = guest.devices.log();
    let bitmaps = bitmaps(&ram);
    log.start(&ram).unwrap();
    // Two pages of data that begin in the middle of one, a status in a page of its own.
    let (header, data, status) = (AREA, GuestAddress(0x3800), GuestAddress(0x9010));
    let buffer = |at, len, device_writes| Buffer { at, len, device_writes };
    guest
        .disk
        .queue
        .add(&[buffer(header, 16, false), buffer(data, 8192, true), buffer(status, 1, true)])
        .unwrap();
    guest.disk.queue.kick().unwrap();
    let done = std::time::Instant::now() + SOON;
    while guest.disk.queue.used().unwrap().is_none() {
        assert!(std::time::Instant::now() < done, "the request is not done");
        std::thread::yield_now();
    }
    log.sync(&bitmaps).unwrap();
    let used = place(guest.disk.queue.used_page());
    assert_eq!(set(&bitmaps), [(0, 3), (0, 4), (0, 5), (0, 9), used]);
    log.stop();
}

#[test]
fn no_write_is_lost_in_a_thousand_rounds() {
    let Some(mut guest) = guest() else { return };
    let ram = blocks(&guest.memory);
    let (mut vhost, mut driver) = (guest.devices.log(), RegionLog::of_guest_memory(&guest.memory).unwrap());
    vhost.start(&ram).unwrap();
    driver.start(&ram).unwrap();
    let mut replica = Replica::of(&ram);
    for round in 1..=1000 {
        guest.disk.work(4).unwrap();
        // Some are always on their way, but never that many that no new ones are made.
        guest.disk.wait(8, SOON).unwrap();
        if round % 50 == 0 {
            guest.devices.stop().unwrap();
            vhost.last_sync(&replica.bitmaps).unwrap();
        }
        replica.follow(&mut [&mut driver, &mut vhost]);
        if round % 50 == 0 {
            assert_eq!(replica.different(), [], "round {round}");
            guest.devices.start().unwrap();
        }
    }
    vhost.stop();
    guest.disk.finish(SOON).unwrap();
    assert!(guest.disk.done > 1000, "{} requests", guest.disk.done);
}

#[test]
fn the_next_back_end_goes_on_where_the_first_stopped() {
    let Some(guest) = guest() else { return };
    let there = memory();
    let destination = Destination::builder(blocks(&there)).timeout(SOON);
    let destination = destination.listen(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap();
    let uri = destination.endpoint();
    let receiving = std::thread::Builder::new().spawn(move || {
        let arrived = destination.receive().unwrap();
        let (version, state) = arrived.opaque_state("disk0").unwrap();
        assert_eq!(version, 1);
        let state = VhostState::parse(state).unwrap();
        arrived.accept().unwrap();
        state
    });

    let running = AtomicBool::new(true);
    let disk = Mutex::new(guest.disk);
    let mut precopy = source(blocks(&guest.memory))
        .channels(2)
        .dirty_log(RegionLog::of_guest_memory(&guest.memory).unwrap())
        .dirty_log(guest.devices.log())
        .build()
        .unwrap()
        .connect(&uri)
        .unwrap();
    let dirtied = std::thread::scope(|scope| {
        scope.spawn(|| {
            while running.load(Ordering::Relaxed) {
                disk.lock().unwrap().work(4).unwrap();
                std::thread::yield_now();
            }
        });
        let mut dirtied = 0;
        while precopy.decisions().len() < 20 || !precopy.converged() {
            let before = disk.lock().unwrap().done;
            while disk.lock().unwrap().done < before + 20 {
                std::thread::yield_now();
            }
            dirtied += precopy.round().unwrap().remaining_bytes;
        }
        running.store(false, Ordering::Relaxed);
        dirtied
    });
    let disk = disk.into_inner().unwrap();
    guest.devices.stop().unwrap();
    let state = guest.devices.state("disk0").unwrap();
    let stopped = precopy.stop_copy().unwrap();
    stopped.commit(&DeviceState::opaque("disk0", 1, &state.encode())).unwrap();
    assert!(dirtied > 0);
    assert_eq!(receiving.unwrap().join().unwrap(), state);
    assert_eq!(different(&guest.memory, &there), []);

    drop(guest.daemon);
    goes_on(&guest.scratch, &there, disk, &state);
}

/// At the destination: a second daemon, the same ring, the same disk.
fn goes_on(scratch: &Scratch, there: &Memory, disk: Disk, state: &VhostState) {
    let (_daemon, socket) =
        peers::storage_daemon("disk0 there", &scratch.path("disk"), &scratch.path("there.sock"));
    let mut disk = disk.moved_to(there);
    let devices = devices(there);
    let user = attach(socket, wanted()).user;
    devices
        .add(VhostDevice::load("disk0", user, state, vec![disk.queue.events().unwrap()]).unwrap())
        .unwrap();
    devices.start().unwrap();
    disk.finish(SOON).unwrap();
    let before = disk.done;
    for _ in 0..100 {
        disk.work(8).unwrap();
    }
    disk.finish(SOON).unwrap();
    assert!(disk.done > before);
}

#[test]
fn a_daemon_that_is_killed_fails_the_migration_and_not_the_guest() {
    let Some(mut guest) = guest() else { return };
    let there = memory();
    let destination = Destination::builder(blocks(&there)).timeout(SOON);
    let destination = destination.listen(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap();
    let uri = destination.endpoint();
    let receiving = std::thread::Builder::new().spawn(move || destination.receive().is_err()).unwrap();
    let ram: Vec<RamBlock> = blocks(&guest.memory);
    let mut precopy =
        source(ram).paused_guest().dirty_log(guest.devices.log()).build().unwrap().connect(&uri).unwrap();
    guest.disk.work(4).unwrap();
    precopy.round().unwrap();
    guest.daemon.kill();
    let error = precopy.round().unwrap_err();
    assert_eq!(
        error.chain(),
        "active: dirty log vhost could not be read: vhost device disk0: its back-end is gone: vhost-user: socket \
         error: the back-end closed the connection"
    );
    assert!(error.source_may_resume());
    assert!(receiving.join().unwrap(), "the destination has no guest");

    // The guest is whole: with another back-end for its disk it goes on, and can be logged again.
    peers::disk_image(&guest.scratch.path("again"));
    let (_daemon, socket) =
        peers::storage_daemon("again", &guest.scratch.path("again"), &guest.scratch.path("again.sock"));
    assert!(guest.devices.remove("disk0").is_err(), "it cannot be stopped any more");
    let device = VhostDevice::new("disk0", attach(socket, wanted()).user, VERSION_1);
    let mut disk = Disk::new(&guest.memory, AREA, 2).unwrap();
    zero(&guest.memory, disk.queue.used_page());
    let ring = disk.queue.ring();
    guest.devices.add(device.ring(ring, disk.queue.events().unwrap())).unwrap();
    guest.devices.start().unwrap();
    let mut log = guest.devices.log();
    log.start(&blocks(&guest.memory)).unwrap();
    log.stop();
    disk.work(4).unwrap();
    disk.finish(SOON).unwrap();
}

/// A driver that is set up anew begins with rings of zeros.
fn zero(memory: &Memory, used: GuestAddress) {
    use multifd_engine::vm_memory::Bytes;
    memory.write_slice(&[0; 0x3000], GuestAddress(used.0 - 0x2000)).unwrap();
}
