//! virtiofsd: the log of a file system's back-end.

use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Command, Stdio};
use std::time::Instant;

use multifd_engine::DirtyLog;
use multifd_engine::vhost::VhostDevice;
use multifd_engine::vm_memory::{Bytes, GuestAddress};
use multifd_tests::skip::skipped;
use multifd_tests::virtio::{Buffer, Queue, VERSION_1};
use multifd_tests::{Process, Scratch};

use crate::guest::{HIGH, SOON, attach, bitmaps, blocks, devices, memory, place, set, wanted};
use crate::peers;

/// FUSE_INIT: header, version 7.31, read-ahead, flags.
fn init() -> Vec<u8> {
    let mut request = [56_u32, 26].map(u32::to_le_bytes).concat();
    request.extend([7_u64, 0].map(u64::to_le_bytes).concat());
    request.extend([0_u32; 4].map(u32::to_le_bytes).concat());
    request.extend([7_u32, 31, 0x2_0000, 0].map(u32::to_le_bytes).concat());
    request
}

#[test]
fn virtiofsd_logs_what_it_writes() {
    let program = peers::dir().join("bin/virtiofsd");
    if !program.exists() {
        return skipped("no virtiofsd (tests/peers/install gets it)").unwrap();
    }
    let scratch = Scratch::new().unwrap();
    let listener = UnixListener::bind(scratch.path("fs.sock")).unwrap();
    let socket = UnixStream::connect(scratch.path("fs.sock")).unwrap();
    let mut command = Command::new(program);
    command.arg("--shared-dir").arg(scratch.dir()).args(["--sandbox=none", "--fd=0"]);
    command.stdin(Stdio::from(OwnedFd::from(listener))).stdout(Stdio::null());
    let _virtiofsd = Process::spawn("virtiofsd", &mut command).unwrap();

    let memory = memory();
    let urgent = Queue::new(&memory, GuestAddress(0), 64).unwrap();
    let mut requests = Queue::new(&memory, GuestAddress(0x4000), 64).unwrap();
    let device = VhostDevice::new("fs", attach(socket, wanted()).user, VERSION_1)
        .finishes_requests()
        .ring(urgent.ring(), urgent.events().unwrap())
        .ring(requests.ring(), requests.events().unwrap());
    let devices = devices(&memory);
    devices.add(device).unwrap();
    devices.start().unwrap();
    let ram = blocks(&memory);
    let mut log = devices.log();
    log.start(&ram).unwrap();
    let (request, answer) = (GuestAddress(0x10000), GuestAddress(HIGH.0 + 0x5000));
    memory.write_slice(&init(), request).unwrap();
    requests
        .add(&[
            Buffer { at: request, len: init().len() as u32, device_writes: false },
            Buffer { at: answer, len: 80, device_writes: true },
        ])
        .unwrap();
    requests.kick().unwrap();
    let deadline = Instant::now() + SOON;
    while requests.used().unwrap().is_none() {
        assert!(Instant::now() < deadline, "FUSE_INIT is not answered");
        std::thread::yield_now();
    }
    devices.stop().unwrap();
    let [len, error]: [u32; 2] = memory.read_obj(answer).unwrap();
    assert_eq!((len, error), (80, 0), "the answer to FUSE_INIT");
    let reported = bitmaps(&ram);
    log.last_sync(&reported).unwrap();
    let rings = [place(urgent.used_page()), place(requests.used_page())];
    assert_eq!(set(&reported), [rings[0], rings[1], place(answer)]);
    log.stop();
}
