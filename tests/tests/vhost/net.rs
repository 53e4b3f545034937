//! DPDK's testpmd as the back-end of a network card that sends every packet back: its log, and
//! SEND_RARP.

use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Command, Stdio};
use std::time::Instant;

use multifd_engine::vhost::{Announcement, VhostDevice, VhostDevices};
use multifd_engine::vm_memory::{Bytes, GuestAddress};
use multifd_engine::{DirtyLog, RegionLog};
use multifd_tests::skip::skipped;
use multifd_tests::virtio::{Buffer, Memory, Queue, VERSION_1};
use multifd_tests::{Process, Scratch};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::guest::{
    Attached, HIGH, MAC, Replica, SOON, attach, bitmaps, blocks, devices, memory, place, set, wanted,
};
use crate::peers;

/// Bytes of virtio_net_hdr with VERSION_1.
pub const HEADER: usize = 12;
/// Longer than the shortest frame there is.
const FRAME: usize = HEADER + 100;
pub const RX: GuestAddress = GuestAddress(0x10_0000);
pub const TX: GuestAddress = GuestAddress(HIGH.0 + 0x20_0000);

struct Guest {
    memory: Memory,
    devices: VhostDevices,
    receive: Queue,
    send: Queue,
    _testpmd: Process,
    _scratch: Scratch,
}

/// A testpmd that has connected to us: nothing has to be waited for but that. `None`: it is not
/// there, which was said. `options`: more of them for its device.
pub fn testpmd(pairs: u64, options: &str) -> Option<(Process, Scratch, UnixStream)> {
    let dpdk = peers::dir().join("dpdk/usr");
    if !dpdk.join("bin/dpdk-testpmd").exists() {
        skipped("no dpdk-testpmd (tests/peers/install gets it)").unwrap();
        return None;
    }
    let scratch = Scratch::new().unwrap();
    let listener = UnixListener::bind(scratch.path("net.sock")).unwrap();
    let libraries = dpdk.join("lib/x86_64-linux-gnu");
    // What the driver and the memory pool are in: named by the version, and not loaded by
    // themselves.
    let library = |name: &str| {
        let all = std::fs::read_dir(&libraries).unwrap().map(|entry| entry.unwrap().path());
        let mut named = all.filter(|path| path.to_string_lossy().contains(name));
        named.next().unwrap().display().to_string()
    };
    let iface = scratch.path("net.sock");
    let device = format!("net_vhost0,iface={},queues={pairs},client=1{options}", iface.display());
    let mut command = Command::new(dpdk.join("bin/dpdk-testpmd"));
    command
        .env("LD_LIBRARY_PATH", &libraries)
        .env("LD_PRELOAD", ["librte_mempool_ring.so.", "librte_net_vhost.so."].map(library).join(":"))
        .args(["-l", "0,1", "--no-huge", "-m", "128", "--no-pci", "--no-shconf", "--no-telemetry"])
        .args(["--file-prefix", &format!("multifd-{}", std::process::id()), "--vdev", &device])
        .args(["--", "--forward-mode=io", "--auto-start", "--total-num-mbufs=2048", "--no-mlockall"])
        .args(["--stats-period", "100", &format!("--rxq={pairs}"), &format!("--txq={pairs}")])
        .stdin(Stdio::null())
        .stdout(Stdio::null());
    let testpmd = Process::spawn("testpmd", &mut command).unwrap();
    let timeout = Timespec::try_from(SOON).unwrap();
    let connected = poll(&mut [PollFd::new(&listener, PollFlags::IN)], Some(&timeout)).unwrap();
    assert_eq!(connected, 1, "{:?}", testpmd.explain("does not connect"));
    let (socket, _) = listener.accept().unwrap();
    Some((testpmd, scratch, socket))
}

fn guest() -> Option<Guest> {
    guest_with(1)
}

/// The same with several queue pairs at the back-end, of which the guest uses the first.
fn guest_with(pairs: u64) -> Option<Guest> {
    let (testpmd, scratch, socket) = testpmd(pairs, "")?;
    let Attached { user, .. } = attach(socket, wanted());

    let memory = memory();
    let (receive, send) = (Queue::new(&memory, RX, 64).unwrap(), Queue::new(&memory, TX, 64).unwrap());
    let devices = devices(&memory);
    let mut device = VhostDevice::new("nic", user, VERSION_1)
        .ring(receive.ring(), receive.events().unwrap())
        .ring(send.ring(), send.events().unwrap());
    for unused in 2..2 * pairs {
        let queue = Queue::new(&memory, GuestAddress(0x40_0000 + 0x4000 * unused), 64).unwrap();
        let (mut ring, events) = (queue.ring(), queue.events().unwrap());
        ring.enabled = false;
        device = device.ring(ring, events);
    }
    devices.add(device).unwrap();
    devices.start().unwrap();
    Some(Guest { memory, devices, receive, send, _testpmd: testpmd, _scratch: scratch })
}

impl Guest {
    /// Gives the card a buffer, and sends `frame`, until it comes back: the first ones are lost
    /// while testpmd starts.
    fn echo(&mut self, frame: &[u8], into: GuestAddress, from: GuestAddress) -> Vec<u8> {
        self.receive.add(&[Buffer { at: into, len: 2048, device_writes: true }]).unwrap();
        self.memory.write_slice(&[&[0; HEADER], frame].concat(), from).unwrap();
        let deadline = Instant::now() + SOON;
        loop {
            if self.send.in_flight() == 0 {
                let packet = Buffer { at: from, len: (HEADER + frame.len()) as u32, device_writes: false };
                self.send.add(&[packet]).unwrap();
                self.send.kick().unwrap();
            }
            _ = self.send.used().unwrap();
            if let Some((_, len)) = self.receive.used().unwrap() {
                let mut packet = vec![0; len as usize];
                self.memory.read_slice(&mut packet, into).unwrap();
                self.drain_sent(deadline);
                return packet.split_off(HEADER);
            }
            assert!(Instant::now() < deadline, "no packet came back");
            std::thread::yield_now();
        }
    }

    fn drain_sent(&mut self, deadline: Instant) {
        while self.send.in_flight() > 0 {
            assert!(Instant::now() < deadline, "a packet is not sent");
            _ = self.send.used().unwrap();
        }
    }
}

pub fn frame(seed: u8) -> Vec<u8> {
    (0..FRAME - HEADER).map(|byte| byte as u8 ^ seed).collect()
}

#[test]
fn testpmd_logs_what_it_writes_and_announces_the_guest() {
    let Some(mut guest) = guest() else { return };
    let (into, from) = (GuestAddress(HIGH.0 + 0x3000), GuestAddress(0x30_0000));
    assert_eq!(guest.echo(&frame(1), into, from), frame(1));
    // Nothing is on its way any more: what follows is exact.
    guest.devices.stop().unwrap();
    while guest.receive.used().unwrap().is_some() {}
    guest.devices.start().unwrap();
    let ram = blocks(&guest.memory);
    let mut log = guest.devices.log();
    log.start(&ram).unwrap();
    assert_eq!(guest.echo(&frame(2), into, from), frame(2));
    let reported = bitmaps(&ram);
    log.sync(&reported).unwrap();
    let mut written = [place(into), place(guest.receive.used_page()), place(guest.send.used_page())];
    written.sort_unstable();
    assert_eq!(set(&reported), written);

    // The next packet that comes in is its announcement: a broadcast from the guest's address,
    // RARP.
    guest.receive.add(&[Buffer { at: into, len: 2048, device_writes: true }]).unwrap();
    assert_eq!(guest.devices.announce("nic", MAC).unwrap(), Announcement::ByBackEnd);
    let deadline = Instant::now() + SOON;
    while guest.receive.used().unwrap().is_none() {
        assert!(Instant::now() < deadline, "no announcement");
        std::thread::yield_now();
    }
    let mut packet = [0; 14];
    guest.memory.read_slice(&mut packet, GuestAddress(into.0 + HEADER as u64)).unwrap();
    assert_eq!(packet[..], [&[0xff; 6][..], &MAC, &[0x80, 0x35]].concat());
    log.stop();
}

#[test]
fn no_packet_is_lost_from_the_log_in_rounds() {
    let Some(mut guest) = guest() else { return };
    let ram = blocks(&guest.memory);
    let (mut vhost, mut driver) = (guest.devices.log(), RegionLog::of_guest_memory(&guest.memory).unwrap());
    vhost.start(&ram).unwrap();
    driver.start(&ram).unwrap();
    let mut replica = Replica::of(&ram);
    for round in 0..200_u64 {
        let into = GuestAddress(HIGH.0 + 0x30_0000 + round * 2048);
        let came = guest.echo(&frame(round as u8), into, GuestAddress(0x30_0000 + round % 3 * 0x1000));
        // One that was sent twice while testpmd started.
        assert!(came == frame(round as u8) || came == frame(round.wrapping_sub(1) as u8), "round {round}");
        if round % 20 == 19 {
            guest.devices.stop().unwrap();
            vhost.last_sync(&replica.bitmaps).unwrap();
        }
        replica.follow(&mut [&mut driver, &mut vhost]);
        if round % 20 == 19 {
            assert_eq!(replica.different(), [], "round {round}");
            guest.devices.start().unwrap();
        }
    }
    vhost.stop();
}

#[test]
fn a_guest_uses_one_of_two_queue_pairs_of_testpmd() {
    let Some(mut guest) = guest_with(2) else { return };
    let (into, from) = (GuestAddress(HIGH.0 + 0x3000), GuestAddress(0x30_0000));
    assert_eq!(guest.echo(&frame(1), into, from), frame(1));
    guest.devices.stop().unwrap();
    let state = guest.devices.state("nic").unwrap();
    let enabled: Vec<_> = state.rings.iter().map(|ring| ring.map(|ring| ring.enabled)).collect();
    assert_eq!(enabled, [Some(true), Some(true), Some(false), Some(false)]);
    while guest.receive.used().unwrap().is_some() {}
    guest.devices.start().unwrap();
    assert_eq!(guest.echo(&frame(2), into, from), frame(2));
}
