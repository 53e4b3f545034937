//! A guest's disk in another process: qemu-storage-daemon serves a virtio-blk ring while the
//! guest's memory moves, and a second daemon goes on serving the same ring at the destination.
//!
//! `cargo run --release --example vhost_user_blk`
//!
//! ```text
//!  source                                             destination
//!   ring <──vhost-user──> qemu-storage-daemon          RAM
//!     │ I/O all the time    │ logs what it writes
//!   rounds over tcp: the daemon's log and the driver's ──────────>
//!   vCPUs stand, ring stopped, last sync ─────────────> RAM, the ring's state
//!                                                      ring <──vhost-user──> the next daemon
//! ```

mod daemon;
#[path = "../../tests/src/virtio.rs"]
#[expect(dead_code, reason = "the tests do more with it")]
mod virtio;

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use multifd_engine::vhost::{VhostDevice, VhostDevices, VhostRegion, VhostState};
use multifd_engine::vm_memory::GuestAddress;
use multifd_engine::wire::Configuration;
use multifd_engine::{Destination, DeviceState, PAGE, Precopy, RamBlock, RegionLog, Report, Source};

use daemon::Daemon;
use virtio::{Disk, Memory, Result, VERSION_1};

const REGIONS: [(GuestAddress, usize); 2] = [(GuestAddress(0), 32 << 20), (GuestAddress(4 << 30), 32 << 20)];
/// Where the driver has its ring and its buffers.
const DISK: GuestAddress = GuestAddress((4 << 30) + (1 << 20));
const ROUNDS: usize = 10;
const SOON: Duration = Duration::from_secs(20);

/// The part to copy: a guest with a device in another process moves.
fn migrate(
    mut precopy: Precopy,
    devices: &VhostDevices,
    pause_vcpus: impl FnOnce() -> Result<()>,
) -> Result<Report> {
    while !precopy.converged() || precopy.decisions().len() < ROUNDS {
        println!("{}", precopy.round()?);
    }
    // Returns when no vCPU writes any more.
    pause_vcpus()?;
    // Now the rings, and only then the last sync: what a back-end writes after it is lost.
    let moved = devices.stop().map_err(Into::into).and_then(|()| {
        let stopped = precopy.stop_copy()?;
        let state = devices.state("disk")?.encode();
        Ok(stopped.commit(&DeviceState::opaque("disk", 1, &state))?)
    });
    // Nothing is lost by a failure: the log is off, the rings go on.
    moved.or_else(|error| devices.start().map_err(Into::into).and(Err(error)))
}

/// The other host's part: RAM, and where the rings stopped.
fn receive(destination: Destination) -> Result<VhostState> {
    let arrived = destination.receive()?;
    let (_, state) = arrived.opaque_state("disk").ok_or("no state of the disk")?;
    let state = VhostState::parse(state)?;
    arrived.accept()?;
    Ok(state)
}

fn main() -> Result<()> {
    let scratch = tempfile::tempdir()?;
    let image = scratch.path().join("disk.img");
    std::fs::File::create(&image)?.set_len(Disk::LEN as u64)?;
    let Some((first, backend)) = Daemon::start(&image, &scratch.path().join("first.sock"))? else {
        println!("vhost_user_blk: skipped: there is no qemu-storage-daemon");
        return Ok(());
    };

    let (here, there) = (virtio::memory(&REGIONS)?, virtio::memory(&REGIONS)?);
    let disk = Disk::new(&here, DISK, 1)?;
    let devices = VhostDevices::new(VhostRegion::of_guest_memory(&here)?)?;
    let device = VhostDevice::new("disk", backend, VERSION_1).finishes_requests();
    devices.add(device.ring(disk.queue.ring(), disk.queue.events()?))?;
    devices.start()?;

    let destination =
        Destination::builder(RamBlock::of_guest_memory(&there)?).listen(&"tcp:127.0.0.1:0".parse()?)?;
    let endpoint = destination.endpoint();
    let configuration = Configuration::new("my-vmm-1.0");
    let source = Source::builder(RamBlock::of_guest_memory(&here)?, configuration)
        .channels(2)
        .dirty_log(RegionLog::of_guest_memory(&here)?)
        .dirty_log(devices.log())
        .build()?;
    let (running, disk) = (AtomicBool::new(true), Mutex::new(disk));
    let (report, state) = thread::scope(|scope| {
        let receiving = scope.spawn(|| receive(destination));
        let vcpu = scope.spawn(|| vcpu(&disk, &running));
        let pause_vcpus = || {
            running.store(false, Ordering::Release);
            vcpu.join().map_err(|_| "the vCPU panicked")?
        };
        let report = source
            .connect(&endpoint)
            .map_err(Into::into)
            .and_then(|precopy| migrate(precopy, &devices, pause_vcpus));
        running.store(false, Ordering::Release);
        let state = receiving.join().map_err(|_| "the destination panicked")?;
        Ok::<_, Box<dyn std::error::Error + Send + Sync>>((report?, state?))
    })?;
    println!("{report}");
    assert!(equal(&here, &there)?, "memory differs");
    drop((devices, first));

    let disk = disk.into_inner().map_err(|_| "the vCPU panicked")?.moved_to(&there);
    let (before, after) = go_on(disk, &there, &state, &image, &scratch.path().join("second.sock"))?;
    println!(
        "vhost_user_blk: RAM arrived equal after {before} requests during the move, and the next daemon did {after} more \
         on the same ring"
    );
    Ok(())
}

/// Stands for the guest: keeps the disk busy, checks what it reads.
fn vcpu(disk: &Mutex<Disk>, running: &AtomicBool) -> Result<()> {
    while running.load(Ordering::Acquire) {
        disk.lock().map_err(|_| "a panic")?.work(4)?;
        thread::yield_now();
    }
    Ok(())
}

/// At the destination: another daemon, the ring as it stopped, the guest's driver as it was.
fn go_on(
    mut disk: Disk,
    memory: &Memory,
    state: &VhostState,
    image: &std::path::Path,
    socket: &std::path::Path,
) -> Result<(u64, u64)> {
    let (_second, backend) = Daemon::start(image, socket)?.ok_or("the daemon is gone")?;
    let devices = VhostDevices::new(VhostRegion::of_guest_memory(memory)?)?;
    let device = VhostDevice::load("disk", backend, state, vec![disk.queue.events()?])?;
    devices.add(device.finishes_requests())?;
    devices.start()?;
    disk.finish(SOON)?;
    let before = disk.done;
    while disk.done < before + 200 {
        disk.work(8)?;
        disk.finish(SOON)?;
    }
    Ok((before, disk.done - before))
}

fn equal(here: &Memory, there: &Memory) -> Result<bool> {
    let (mut a, mut b) = ([0; PAGE], [0; PAGE]);
    let blocks = RamBlock::of_guest_memory(here)?.into_iter().zip(RamBlock::of_guest_memory(there)?);
    Ok(blocks.into_iter().all(|(here, there)| {
        (0..here.pages()).all(|page| here.read_page(page, &mut a) && there.read_page(page, &mut b) && a == b)
    }))
}
