//! A guest's device in another process, in post-copy: the guest runs at the destination before any
//! of its RAM is there, and the device's back-end takes a ring over whose descriptors, buffers and
//! used ring come on demand.
//!
//! `cargo run --release --example vhost_user_postcopy PROGRAM`: a back-end with the protocol
//! feature PAGEFAULT that listens on its standard input, as `tests/peers/back_end` of this
//! repository does. Without it nothing is done.
//!
//! ```text
//!  source                                             destination
//!   ring <──vhost-user──> back-end                     VhostPostcopy <──vhost-user──> the next back-end
//!   ring stopped, requests in flight, switch ────────> devices
//!   RAM as it is asked for ──────────────────────────> ring goes on: each page that is touched is waited for
//! ```

#[path = "../../tests/src/virtio.rs"]
#[expect(dead_code, reason = "the tests do more with it")]
mod virtio;

use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use multifd_engine::vhost::vhost::VhostBackend;
use multifd_engine::vhost::vhost::vhost_user::message::VhostUserProtocolFeatures;
use multifd_engine::vhost::vhost::vhost_user::{Frontend, VhostUserFrontend};
use multifd_engine::vhost::{VhostDevice, VhostDevices, VhostPostcopy, VhostRegion, VhostState, VhostUser};
use multifd_engine::vm_memory::{Bytes, GuestAddress};
use multifd_engine::wire::Configuration;
use multifd_engine::{
    Destination, DeviceState, Incoming, PostcopyEnd, RamBlock, RegionLog, Report, Served, Source,
};

use virtio::{Buffer, Memory, Queue, Result, VERSION_1};

const REGIONS: [(GuestAddress, usize); 2] = [(GuestAddress(0), 16 << 20), (GuestAddress(4 << 30), 16 << 20)];
const RING: GuestAddress = GuestAddress((4 << 30) + (1 << 20));
/// What is asked of the device: a page for the order, and what it fills.
const ORDERS: u64 = 0x20_0000;
const FILLED: u64 = 0x40_0000;
const REQUESTS: u16 = 32;
const SOON: Duration = Duration::from_secs(20);

/// A back-end, which ends with this value.
struct BackEnd(Child);

impl BackEnd {
    /// What speaks to it is negotiated: the embedder's part.
    fn start(program: &Path, socket: &Path) -> Result<(Self, VhostUser)> {
        let listener = UnixListener::bind(socket)?;
        let stream = UnixStream::connect(socket)?;
        let child = Command::new(program).stdin(Stdio::from(OwnedFd::from(listener))).spawn()?;
        let mut front_end = Frontend::from_stream(stream, 1);
        front_end.set_owner()?;
        front_end.get_features()?;
        let wanted = VhostUserProtocolFeatures::PAGEFAULT | VhostUserProtocolFeatures::REPLY_ACK;
        let features = front_end.get_protocol_features()? & wanted;
        front_end.set_protocol_features(features)?;
        Ok((Self(child), VhostUser::new(&front_end, features)?))
    }
}

impl Drop for BackEnd {
    fn drop(&mut self) {
        // Both fail only for a process that has ended.
        _ = self.0.kill();
        _ = self.0.wait();
    }
}

/// Asks the device to fill a part of the memory for each request: with its number.
fn order(memory: &Memory, ring: &mut Queue, requests: std::ops::Range<u16>) -> Result<()> {
    for number in requests {
        let (order, fill) = (ORDERS + 64 * u64::from(number), FILLED + 0x3000 * u64::from(number));
        memory.write_obj(number.to_le_bytes(), GuestAddress(order))?;
        ring.add(&[
            Buffer { at: GuestAddress(order), len: 64, device_writes: false },
            Buffer { at: GuestAddress(fill), len: 0x2800, device_writes: true },
        ])?;
    }
    ring.kick()
}

/// Waits until the device has done everything, and looks at what it has filled.
fn check(memory: &Memory, ring: &mut Queue, requests: std::ops::Range<u16>) -> Result<()> {
    let deadline = Instant::now() + SOON;
    while ring.in_flight() > 0 {
        _ = ring.used()?;
        if Instant::now() > deadline {
            return Err(format!("{} requests are not done", ring.in_flight()).into());
        }
        thread::yield_now();
    }
    for number in requests {
        let mut filled = vec![0; 0x2800];
        memory.read_slice(&mut filled, GuestAddress(FILLED + 0x3000 * u64::from(number)))?;
        if filled.iter().any(|byte| *byte != number.to_le_bytes()[0]) {
            return Err(format!("request {number} was filled with something else").into());
        }
    }
    Ok(())
}

/// The part to copy at the source: the rings stop, and then the guest leaves.
fn leave(source: Source, to: &multifd_engine::transports::Endpoint, state: &VhostState) -> Result<()> {
    let precopy = source.connect(to)?;
    let state = DeviceState::opaque("device", 1, &state.encode());
    let mut postcopy = precopy.switch_to_postcopy(&state)?;
    match postcopy.serve()? {
        Served::Completed(_) => Ok(()),
        Served::Paused(why) => Err(why.into()),
    }
}

/// The part to copy at the destination: back-ends are part of the migration before the source
/// comes.
fn arrive(
    destination: Destination,
    user: VhostUser,
    there: &Memory,
    mut ring: Queue,
) -> Result<(Report, VhostDevices)> {
    let Incoming::Postcopy(mut guest) = destination.receive_live()? else { return Err("no switch".into()) };
    let (_, state) = guest.opaque_state("device").ok_or("no state of the device")?;
    let state = VhostState::parse(state)?;
    let devices = VhostDevices::new(VhostRegion::of_guest_memory(there)?)?;
    devices.add(VhostDevice::load("device", user, &state, vec![ring.events()?])?)?;
    guest.loaded()?;
    // The ring goes on, and none of its pages is here.
    devices.start()?;
    ring.kick()?;
    check(there, &mut ring, REQUESTS..2 * REQUESTS)?;
    match guest.wait()? {
        PostcopyEnd::Completed(report) => Ok((*report, devices)),
        PostcopyEnd::Paused(why) => Err(why.into()),
    }
}

fn main() -> Result<()> {
    let program = std::env::args().nth(1).map(PathBuf::from).filter(|program| program.exists());
    let Some(program) = program else {
        println!("vhost_user_postcopy: skipped: there is no back-end to run");
        return Ok(());
    };
    let scratch = tempfile::tempdir()?;
    let (_first, user) = BackEnd::start(&program, &scratch.path().join("first.sock"))?;
    let (here, there) = (virtio::memory(&REGIONS)?, virtio::memory(&REGIONS)?);
    let mut ring = Queue::new(&here, RING, 128)?;
    let devices = VhostDevices::new(VhostRegion::of_guest_memory(&here)?)?;
    devices.add(VhostDevice::new("device", user, VERSION_1).ring(ring.ring(), ring.events()?))?;
    devices.start()?;
    order(&here, &mut ring, 0..REQUESTS)?;
    check(&here, &mut ring, 0..REQUESTS)?;
    devices.stop()?;
    let state = devices.state("device")?;
    // In flight at the switch.
    order(&here, &mut ring, REQUESTS..2 * REQUESTS)?;

    let (_second, user) = BackEnd::start(&program, &scratch.path().join("second.sock"))?;
    let back_ends = VhostPostcopy::new(VhostRegion::of_guest_memory(&there)?)?;
    back_ends.add("device", &user)?;
    let destination = Destination::builder(RamBlock::of_guest_memory(&there)?)
        .postcopy(true)
        .vhost_postcopy(&back_ends)
        .listen(&"tcp:127.0.0.1:0".parse()?)?;
    let to = destination.endpoint();
    // No round is made here. With rounds, devices.log() goes beside the vCPUs'.
    let source = Source::builder(RamBlock::of_guest_memory(&here)?, Configuration::new("my-vmm-1.0"))
        .dirty_log(RegionLog::of_guest_memory(&here)?)
        .postcopy(true)
        .build()?;
    let ring = ring.moved_to(&there);
    let (report, _devices) = thread::scope(|scope| {
        let leaving = scope.spawn(|| leave(source, &to, &state));
        let arrived = arrive(destination, user, &there, ring);
        leaving.join().map_err(|_| "the source panicked")??;
        arrived
    })?;
    if let Some(lost) = back_ends.failures().into_iter().next() {
        return Err(lost.into());
    }
    let faults = report.postcopy.and_then(|postcopy| postcopy.faults).ok_or("no figures")?;
    let of_device: u64 = faults.back_ends.iter().map(|back_end| back_end.faults).sum();
    println!(
        "vhost_user_postcopy: {REQUESTS} requests in flight are done, {of_device} faults of the back-end"
    );
    Ok(())
}
