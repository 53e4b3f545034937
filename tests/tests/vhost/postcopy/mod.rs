//! Back-ends that take over while the guest's memory comes by post-copy.

mod faults;
mod life;
mod links;
mod messages;
mod net;
mod pages;

use std::process::{Command, Stdio};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;

use multifd_engine::transports::{Endpoint, Listener};
use multifd_engine::vhost::vhost::vhost_user::message::VhostUserProtocolFeatures;
use multifd_engine::vhost::{VhostDevice, VhostDevices, VhostPostcopy, VhostRegion, VhostState, VhostUser};
use multifd_engine::{
    Control, Destination, DeviceState, Error, Incoming, Postcopy, PostcopyEnd, PostcopyGuest, PostcopyReport,
    RegionLog, Served, Source,
};
use multifd_tests::skip::skipped;
use multifd_tests::virtio::Memory;
use multifd_tests::{Process, Scratch};

use crate::backend::Driver;
use crate::guest::{SOON, attach, blocks, devices, source, wanted};
use crate::peers;

/// What the tests here negotiate.
pub fn faulting() -> VhostUserProtocolFeatures {
    wanted() | VhostUserProtocolFeatures::PAGEFAULT
}

/// The back-end on the crate `vhost-user-backend`, in a process of its own.
pub struct Peer {
    pub process: Process,
    pub user: Option<VhostUser>,
    _scratch: Scratch,
}

impl Peer {
    /// `None`: it is not there, which was said.
    pub fn start(name: &str, queues: usize) -> Option<Self> {
        let program = peers::dir().join("bin/multifd-back-end");
        if !program.exists() {
            skipped("no multifd-back-end (tests/peers/install builds it)").unwrap();
            return None;
        }
        let scratch = Scratch::new().unwrap();
        let listener = std::os::unix::net::UnixListener::bind(scratch.path("peer.sock")).unwrap();
        let socket = std::os::unix::net::UnixStream::connect(scratch.path("peer.sock")).unwrap();
        let mut command = Command::new(program);
        command
            .env("MULTIFD_QUEUES", queues.to_string())
            .stdin(Stdio::from(std::os::fd::OwnedFd::from(listener)))
            .stdout(Stdio::null());
        let process = Process::spawn(name, &mut command).unwrap();
        let user = Some(attach(socket, faulting()).user);
        Some(Self { process, user, _scratch: scratch })
    }

    pub fn take_user(&mut self) -> VhostUser {
        self.user.take().unwrap()
    }
}

pub fn postcopy(memory: &Memory) -> VhostPostcopy {
    VhostPostcopy::new(VhostRegion::of_guest_memory(memory).unwrap()).unwrap()
}

/// Fills guest memory: each page with words of its own.
pub fn fill(memory: &Memory) {
    for (number, block) in blocks(memory).iter().enumerate() {
        for page in 0..block.pages() {
            let word = (number as u64) << 32 | page as u64 | 1 << 63;
            let bytes = word.to_le_bytes().repeat(multifd_engine::PAGE / 8);
            let place = block.memory().slice(page * multifd_engine::PAGE, multifd_engine::PAGE).unwrap();
            multifd_engine::vm_memory::Bytes::write_slice(&place, &bytes, 0).unwrap();
        }
    }
}

/// A destination that gives its back-ends the guest's faults.
pub fn destination(there: &Memory, back_ends: &VhostPostcopy) -> Destination {
    Destination::builder(blocks(there))
        .postcopy(true)
        .vhost_postcopy(back_ends)
        .timeout(SOON)
        .listen(&"tcp:127.0.0.1:0".parse().unwrap())
        .unwrap()
}

/// A source that sends nothing by itself: pages go that are asked for.
pub fn silent_source(here: &Memory) -> multifd_engine::SourceBuilder {
    source(blocks(here)).postcopy(true).max_postcopy_bandwidth(std::num::NonZeroU64::new(1))
}

/// A guest that has switched: it may run here, its memory is at the source.
pub struct Switched {
    /// Taken by the end.
    guest: Option<PostcopyGuest>,
    control: Control,
    serving: Option<JoinHandle<Result<(), String>>>,
    again: SyncSender<Endpoint>,
}

impl Switched {
    pub fn guest(&mut self) -> &mut PostcopyGuest {
        self.guest.as_mut().unwrap()
    }

    /// The state of the device at the source.
    pub fn state(&self) -> VhostState {
        let (_, state) = self.guest.as_ref().unwrap().opaque_state("device").unwrap();
        VhostState::parse(state).unwrap()
    }

    /// The source sends on its own from now on.
    pub fn let_all_go(&self) {
        self.control.set_max_postcopy_bandwidth(None);
    }

    /// The link breaks; gives why it is paused.
    pub fn cut(&mut self) -> Error {
        self.control.pause_postcopy().unwrap();
        match self.guest().wait().unwrap() {
            PostcopyEnd::Paused(why) => why,
            PostcopyEnd::Completed(_) => panic!("completed over a link that was cut"),
        }
    }

    /// The link is made anew.
    pub fn recover(&mut self) {
        let listener = Listener::bind(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap();
        self.again.send(listener.endpoint()).unwrap();
        self.guest().recover(listener, SOON).unwrap();
    }

    /// Waits until all of RAM is here and both ends know it.
    pub fn complete(mut self) -> PostcopyReport {
        self.let_all_go();
        let report = match self.guest().wait().unwrap() {
            PostcopyEnd::Completed(report) => report.postcopy.unwrap(),
            PostcopyEnd::Paused(why) => panic!("paused: {}", why.chain()),
        };
        self.guest = None;
        self.serving.take().unwrap().join().unwrap().unwrap();
        report
    }
}

impl Drop for Switched {
    fn drop(&mut self) {
        let guest = self.guest.take().filter(|_| std::thread::panicking());
        // Threads that wait for a page get SIGBUS, or the process ends at once: what failed was
        // said.
        if guest.is_some_and(|guest| guest.poison_missing().is_err()) {
            std::process::abort();
        }
    }
}

fn serve(mut postcopy: Postcopy, again: &Receiver<Endpoint>) -> Result<(), String> {
    loop {
        match postcopy.serve().map_err(|error| error.chain())? {
            Served::Completed(_) => return Ok(()),
            Served::Paused(why) => {
                let Ok(endpoint) = again.recv_timeout(SOON) else { return Err(why.chain()) };
                postcopy.recover(&endpoint, SOON).map_err(|error| error.chain())?;
            }
        }
    }
}

/// Switches at once: `state` is what the device is at the source.
pub fn switch(source: Source, destination: Destination, state: Vec<u8>) -> Result<Switched, Error> {
    switch_after(source, destination, |_| state)
}

/// Does what is to be done before the pause, and switches.
pub fn switch_after(
    source: Source,
    destination: Destination,
    before: impl FnOnce(&mut multifd_engine::Precopy) -> Vec<u8> + Send + 'static,
) -> Result<Switched, Error> {
    let (again, recovered_at) = sync_channel(1);
    let (control, to) = (source.control(), destination.endpoint());
    let serving = move || {
        let mut precopy = source.connect(&to).map_err(|error| error.chain())?;
        let state = before(&mut precopy);
        let state = DeviceState::opaque("device", 1, &state);
        let postcopy = precopy.switch_to_postcopy(&state).map_err(|error| error.chain())?;
        serve(postcopy, &recovered_at)
    };
    let serving = Some(std::thread::Builder::new().spawn(serving).unwrap());
    match destination.receive_live()? {
        Incoming::Postcopy(guest) => Ok(Switched { guest: Some(guest), control, serving, again }),
        Incoming::Arrived(_) => panic!("it did not switch"),
    }
}

/// The device of a moved guest on a back-end here, started.
pub fn take_over(
    there: &Memory,
    name: &str,
    user: VhostUser,
    state: &VhostState,
    drivers: &[Driver],
) -> VhostDevices {
    let events = drivers.iter().map(|driver| driver.queue.events().unwrap()).collect();
    let devices = devices(there);
    devices.add(VhostDevice::load(name, user, state, events).unwrap()).unwrap();
    devices.start().unwrap();
    devices
}

/// The logs of a guest whose device runs.
pub fn logged(builder: multifd_engine::SourceBuilder, here: &Memory, devices: &VhostDevices) -> Source {
    let driver = RegionLog::of_guest_memory(here).unwrap();
    builder.dirty_log(driver).dirty_log(devices.log()).build().unwrap()
}
