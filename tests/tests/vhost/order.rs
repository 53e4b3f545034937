//! The order in which a guest is stopped, the right one and a wrong one.

use std::sync::Arc;

use multifd_engine::vhost::VhostLog;
use multifd_engine::vm_memory::GuestAddress;
use multifd_engine::{
    Coverage, Destination, DeviceState, DirtyBitmap, DirtyLog, DirtyLogError, PAGE, RamBlock, RegionLog,
};
use multifd_tests::virtio::Memory;

use crate::backend::{Driver, Filler, own};
use crate::guest::{HIGH, SOON, blocks, devices, different, memory, place, source};

/// A log that does not mind when its last sync is: what an embedder gets that reads a log with its
/// own code.
struct Careless(VhostLog);

impl DirtyLog for Careless {
    fn name(&self) -> &str {
        "careless"
    }

    fn start(&mut self, ram: &[RamBlock]) -> Result<(), DirtyLogError> {
        self.0.start(ram)
    }

    fn covers(&self, block: &RamBlock) -> Coverage {
        self.0.covers(block)
    }

    fn sync(&mut self, bitmaps: &[Arc<DirtyBitmap>]) -> Result<(), DirtyLogError> {
        self.0.sync(bitmaps)
    }

    fn stop(&mut self) {
        self.0.stop();
    }
}

const SLOW: GuestAddress = GuestAddress(HIGH.0 + 0x5000);

/// Moves a guest with a request in flight that the back-end does when its ring is stopped, which is
/// before or after the last sync. What is lost?
fn moves(stop_first: bool) -> (Memory, Vec<(usize, usize)>, (usize, usize)) {
    let (here, there) = (memory(), memory());
    let destination = Destination::builder(blocks(&there)).timeout(SOON);
    let destination = destination.listen(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap();
    let uri = destination.endpoint();
    let receiving =
        std::thread::Builder::new().spawn(move || destination.receive().unwrap().accept().unwrap()).unwrap();

    let mut drivers = [Driver::new(&here, GuestAddress(0))];
    let (slow, device) = own("slow", Filler::new(1), &drivers);
    let devices = devices(&here);
    devices.add(device).unwrap();
    devices.start().unwrap();
    let written = RegionLog::of_guest_memory(&here).unwrap();
    let source = source(blocks(&here)).dirty_log(written).dirty_log(Careless(devices.log()));
    let mut precopy = source.build().unwrap().connect(&uri).unwrap();
    precopy.round().unwrap();
    assert!(drivers[0].order(0xaa, true, SLOW, 16));
    slow.wait_for_held(SOON);
    precopy.round().unwrap();
    if stop_first {
        devices.stop().unwrap();
    }
    let stopped = precopy.stop_copy().unwrap();
    devices.stop().unwrap();
    stopped.commit(&DeviceState::none()).unwrap();
    receiving.join().unwrap();
    drivers[0].take_done();
    assert_eq!(drivers[0].done, 1, "the request is done, and the guest has seen it");
    let lost = different(&here, &there);
    (here, lost, place(drivers[0].queue.used_page()))
}

#[test]
fn rings_that_are_stopped_before_the_last_sync_lose_nothing() {
    assert_eq!(moves(true).1, []);
}

#[test]
fn rings_that_are_stopped_after_the_last_sync_lose_a_page() {
    let (_, lost, used) = moves(false);
    assert_eq!(lost, [used, place(SLOW)], "the used ring, and the page with the data");
}

#[test]
fn the_last_sync_refuses_while_a_device_runs_and_the_guest_goes_on() {
    let memory = memory();
    let destination = Destination::builder(blocks(&self::memory())).timeout(SOON);
    let destination = destination.listen(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap();
    let uri = destination.endpoint();
    let receiving = std::thread::Builder::new().spawn(move || destination.receive().is_err()).unwrap();
    let mut drivers = [Driver::new(&memory, GuestAddress(0))];
    let (_own, device) = own("eager", Filler::new(1), &drivers);
    let devices = devices(&memory);
    devices.add(device).unwrap();
    devices.start().unwrap();
    let log = devices.log();
    let written = RegionLog::of_guest_memory(&memory).unwrap();
    let source = source(blocks(&memory)).dirty_log(written).dirty_log(log).build().unwrap();
    let precopy = source.connect(&uri).unwrap();
    let error = precopy.stop_copy().err().unwrap();
    assert_eq!(
        error.chain(),
        "active: dirty log vhost could not be read: vhost device eager still runs: it must be stopped before the last \
         sync"
    );
    assert!(error.source_may_resume());
    assert!(receiving.join().unwrap());
    a_failed_migration_leaves_the_log_off(&mut drivers[0], &memory, &devices);
}

#[test]
fn a_log_of_devices_does_not_stand_in_for_the_log_of_the_vcpus() {
    let memory = memory();
    let devices = devices(&memory);
    let nowhere = "unix:/nonexistent".parse().unwrap();
    let error =
        source(blocks(&memory)).dirty_log(devices.log()).build().unwrap().connect(&nowhere).err().unwrap();
    assert!(error.to_string().contains("2048 of 2048 pages are in no dirty log"), "{error}");
}

/// The ring goes on, and what it writes is logged only by the next migration.
fn a_failed_migration_leaves_the_log_off(
    driver: &mut Driver,
    memory: &Memory,
    devices: &multifd_engine::vhost::VhostDevices,
) {
    assert!(driver.order(1, false, SLOW, PAGE));
    driver.finish(SOON);
    let ram = blocks(memory);
    let reported = crate::guest::bitmaps(&ram);
    let mut log = devices.log();
    log.start(&ram).unwrap();
    log.sync(&reported).unwrap();
    assert_eq!(crate::guest::set(&reported), []);
    let error = devices.log().start(&ram).unwrap_err();
    assert_eq!(error.to_string(), "the vhost devices serve another migration");
    assert!(driver.order(2, false, SLOW, PAGE));
    driver.finish(SOON);
    devices.stop().unwrap();
    log.last_sync(&reported).unwrap();
    assert_eq!(crate::guest::set(&reported), [place(driver.queue.used_page()), place(SLOW)]);
    log.stop();
}
