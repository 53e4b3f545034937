//! virtiofsd: the log of a file system's back-end.

use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use multifd_engine::DirtyLog;
use multifd_engine::vhost::vhost::vhost_user::message::VhostUserProtocolFeatures;
use multifd_engine::vhost::{VhostDevice, VhostState};
use multifd_engine::vm_memory::{Bytes, GuestAddress};
use multifd_tests::skip::skipped;
use multifd_tests::virtio::{Buffer, Memory, Queue, VERSION_1};
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

/// A virtiofsd that serves `dir`, and a connection to it.
fn virtiofsd(dir: &Path, scratch: &Scratch, name: &str) -> Option<(Process, UnixStream)> {
    let program = peers::dir().join("bin/virtiofsd");
    if !program.exists() {
        skipped("no virtiofsd (tests/peers/install gets it)").unwrap();
        return None;
    }
    let listener = UnixListener::bind(scratch.path(name)).unwrap();
    let socket = UnixStream::connect(scratch.path(name)).unwrap();
    let mut command = Command::new(program);
    command.arg("--shared-dir").arg(dir).args(["--sandbox=none", "--fd=0"]);
    command.stdin(Stdio::from(OwnedFd::from(listener))).stdout(Stdio::null());
    Some((Process::spawn("virtiofsd", &mut command).unwrap(), socket))
}

#[test]
fn virtiofsd_logs_what_it_writes() {
    let scratch = Scratch::new().unwrap();
    let Some((_virtiofsd, socket)) = virtiofsd(scratch.dir(), &scratch, "fs.sock") else { return };
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

const LOOKUP: u32 = 1;
const OPEN: u32 = 14;
const READ: u32 = 15;
/// Root of a file system.
const ROOT: u64 = 1;

/// The driver of a file system.
struct Fuse {
    memory: Memory,
    requests: Queue,
}

impl Fuse {
    const REQUEST: GuestAddress = GuestAddress(0x10000);
    const ANSWER: GuestAddress = GuestAddress(HIGH.0 + 0x5000);

    /// Does a request, and gives what is behind the head of its answer.
    fn ask(&mut self, request: &[u8], room: u32) -> Vec<u8> {
        self.memory.write_slice(request, Self::REQUEST).unwrap();
        let sent = Buffer { at: Self::REQUEST, len: request.len() as u32, device_writes: false };
        let answer = Buffer { at: Self::ANSWER, len: 16 + room, device_writes: true };
        self.requests.add(&[sent, answer]).unwrap();
        self.requests.kick().unwrap();
        let deadline = Instant::now() + SOON;
        while self.requests.used().unwrap().is_none() {
            assert!(Instant::now() < deadline, "a request is not answered");
            std::thread::yield_now();
        }
        let [len, error]: [u32; 2] = self.memory.read_obj(Self::ANSWER).unwrap();
        assert_eq!(error as i32, 0, "the request is refused");
        let mut body = vec![0; len as usize - 16];
        self.memory.read_slice(&mut body, GuestAddress(Self::ANSWER.0 + 16)).unwrap();
        body
    }

    fn operation(&mut self, operation: u32, node: u64, body: &[u8], room: u32) -> Vec<u8> {
        let mut request = [40 + body.len() as u32, operation].map(u32::to_le_bytes).concat();
        request.extend([9, node].map(u64::to_le_bytes).concat());
        request.extend([0_u32; 4].map(u32::to_le_bytes).concat());
        request.extend(body);
        self.ask(&request, room)
    }

    /// The first bytes of an open file.
    fn read(&mut self, node: u64, handle: u64) -> Vec<u8> {
        let mut body = [handle, 0].map(u64::to_le_bytes).concat();
        body.extend([100_u32, 0].map(u32::to_le_bytes).concat());
        body.extend([0_u8; 16]);
        self.operation(READ, node, &body, 100)
    }
}

fn number(bytes: &[u8]) -> u64 {
    u64::from_le_bytes(bytes[..8].try_into().unwrap())
}

#[test]
fn an_open_file_of_virtiofsd_is_open_at_the_destination() {
    let (scratch, shared) = (Scratch::new().unwrap(), Scratch::new().unwrap());
    std::fs::write(shared.path("file"), b"what the guest reads").unwrap();
    let Some((_here, socket)) = virtiofsd(shared.dir(), &scratch, "here.sock") else { return };
    let with_state = wanted() | VhostUserProtocolFeatures::DEVICE_STATE;
    let memory = memory();
    let urgent = Queue::new(&memory, GuestAddress(0), 64).unwrap();
    let requests = Queue::new(&memory, GuestAddress(0x4000), 64).unwrap();
    let device = VhostDevice::new("fs", attach(socket, with_state).user, VERSION_1)
        .finishes_requests()
        .ring(urgent.ring(), urgent.events().unwrap())
        .ring(requests.ring(), requests.events().unwrap());
    let here = devices(&memory);
    here.add(device).unwrap();
    here.start().unwrap();
    let mut fuse = Fuse { memory: memory.clone(), requests };
    fuse.ask(&init(), 64);
    let node = number(&fuse.operation(LOOKUP, ROOT, b"file\0", 128));
    let handle = number(&fuse.operation(OPEN, node, &[0; 8], 16));
    assert_eq!(fuse.read(node, handle), b"what the guest reads");
    here.stop().unwrap();
    let state = here.state("fs").unwrap();
    assert!(state.back_end.as_ref().is_some_and(|state| !state.is_empty()));
    let state = VhostState::parse(&state.encode()).unwrap();

    let Some((_there, socket)) = virtiofsd(shared.dir(), &scratch, "there.sock") else { return };
    let there = devices(&memory);
    let events = vec![urgent.events().unwrap(), fuse.requests.events().unwrap()];
    let user = attach(socket, with_state).user;
    there.add(VhostDevice::load("fs", user, &state, events).unwrap()).unwrap();
    there.start().unwrap();
    assert_eq!(fuse.read(node, handle), b"what the guest reads");
    there.stop().unwrap();

    // A back-end without that feature is refused: its guest's files would be closed.
    let Some((_third, socket)) = virtiofsd(shared.dir(), &scratch, "third.sock") else { return };
    let user = attach(socket, wanted()).user;
    let events = vec![urgent.events().unwrap(), fuse.requests.events().unwrap()];
    let error = VhostDevice::load("fs", user, &state, events).map(drop).unwrap_err().to_string();
    assert!(error.contains("the state needs protocol features 0x80001"), "{error}");
}
