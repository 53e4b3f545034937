//! A back-end of our own, on the crate `vhost-user-backend`: it fills what it is given, and can
//! hold requests back until its ring is stopped, as a slow disk does.

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use multifd_engine::vhost::vhost::vhost_user::Listener;
use multifd_engine::vhost::vhost::vhost_user::message::VhostUserProtocolFeatures;
use multifd_engine::vhost::{VhostDevice, VhostDevices, VhostUser};
use multifd_engine::vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use multifd_tests::Scratch;
use multifd_tests::virtio::{Buffer, Memory, Queue, VERSION_1};
use vhost_user_backend::bitmap::BitmapMmapRegion;
use vhost_user_backend::{VhostUserBackend, VhostUserDaemon, VringRwLock, VringT};
use virtio_queue::{DescriptorChain, QueueT};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier};

use crate::guest::attach;

type Guest = GuestMemoryMmap<BitmapMmapRegion>;
type Space = GuestMemoryAtomic<Guest>;
type Vring = VringRwLock<Space>;

pub const LOG_ALL: u64 = 1 << 26;
const PROTOCOL_FEATURES: u64 = 1 << 30;

/// What the device does with each request.
pub struct Filler {
    queues: usize,
    pub features: u64,
    pub protocol: VhostUserProtocolFeatures,
    work: Mutex<Work>,
}

#[derive(Default)]
struct Work {
    memory: Option<Space>,
    /// Requests that are not done before their ring is stopped.
    held: Vec<(usize, Vring, Request)>,
}

struct Request {
    head: u16,
    seed: u8,
    hold: bool,
    fill: Vec<(GuestAddress, u32)>,
}

impl Filler {
    pub fn new(queues: usize) -> Self {
        let protocol = VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::LOG_SHMFD
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS;
        Self { queues, features: VERSION_1 | LOG_ALL | PROTOCOL_FEATURES, protocol, work: Mutex::default() }
    }
}

impl Work {
    fn read(&self, chain: DescriptorChain<impl std::ops::Deref<Target = Guest> + Clone>) -> Request {
        let memory = self.memory.as_ref().unwrap().memory();
        let mut request = Request { head: chain.head_index(), seed: 0, hold: false, fill: Vec::new() };
        for descriptor in chain {
            if descriptor.is_write_only() {
                request.fill.push((descriptor.addr(), descriptor.len()));
            } else {
                let [seed, hold] = memory.read_obj(descriptor.addr()).unwrap();
                (request.seed, request.hold) = (seed, hold == 1);
            }
        }
        request
    }

    fn finish(&self, vring: &Vring, request: &Request) {
        let memory = self.memory.as_ref().unwrap().memory();
        for (at, len) in &request.fill {
            memory.write_slice(&vec![request.seed; *len as usize], *at).unwrap();
        }
        vring.add_used(request.head, request.fill.iter().map(|(_, len)| len).sum()).unwrap();
        // There may be no listener any more.
        _ = vring.signal_used_queue();
    }
}

impl VhostUserBackend for Filler {
    type Bitmap = BitmapMmapRegion;
    type Vring = Vring;

    fn num_queues(&self) -> usize {
        self.queues
    }

    fn max_queue_size(&self) -> usize {
        128
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        self.protocol
    }

    fn set_event_idx(&self, _: bool) {}

    fn update_memory(&self, memory: Space) -> io::Result<()> {
        self.work.lock().unwrap().memory = Some(memory);
        Ok(())
    }

    /// A thread for each ring.
    fn queues_per_thread(&self) -> Vec<u64> {
        (0..self.queues).map(|queue| 1 << queue).collect()
    }

    fn exit_event(&self, _: usize) -> Option<(EventConsumer, EventNotifier)> {
        new_event_consumer_and_notifier(EventFlag::empty()).ok()
    }

    fn handle_event(&self, event: u16, _: EventSet, vrings: &[Vring], thread: usize) -> io::Result<()> {
        let Some(vring) = vrings.get(usize::from(event)) else { return Ok(()) };
        let mut work = self.work.lock().unwrap();
        loop {
            let memory = work.memory.as_ref().unwrap().memory();
            // Not ready, since it was stopped: there is nothing.
            let chain = vring.get_mut().get_queue_mut().pop_descriptor_chain(memory);
            let Some(chain) = chain else { return Ok(()) };
            let request = work.read(chain);
            match request.hold {
                true => work.held.push((thread, vring.clone(), request)),
                false => work.finish(vring, &request),
            }
        }
    }

    fn stop_vring(&self, queue: u32) -> io::Result<()> {
        // The lock: a request that is being done on the ring's own thread is done first.
        let mut work = self.work.lock().unwrap();
        let held = std::mem::take(&mut work.held);
        let (mine, others) = held.into_iter().partition(|(ring, ..)| *ring == queue as usize);
        work.held = others;
        let mine: Vec<(usize, Vring, Request)> = mine;
        mine.iter().for_each(|(_, vring, request)| work.finish(vring, request));
        Ok(())
    }
}

/// A running back-end; ends with this value.
pub struct Own {
    filler: Arc<Filler>,
    _daemon: VhostUserDaemon<Arc<Filler>>,
    _scratch: Scratch,
}

impl Own {
    pub fn start(filler: Filler) -> (Self, UnixStream) {
        let scratch = Scratch::new().unwrap();
        let path = scratch.path("own.sock");
        let mut listener = Listener::new(&path, true).unwrap();
        let socket = UnixStream::connect(&path).unwrap();
        let memory = GuestMemoryAtomic::new(Guest::new());
        let filler = Arc::new(filler);
        let mut daemon = VhostUserDaemon::new("own".to_owned(), Arc::clone(&filler), memory).unwrap();
        daemon.start(&mut listener).unwrap();
        (Self { filler, _daemon: daemon, _scratch: scratch }, socket)
    }
}

impl Own {
    /// Waits until the back-end has taken a request that it holds back.
    pub fn wait_for_held(&self, within: Duration) {
        let deadline = Instant::now() + within;
        while self.filler.work.lock().unwrap().held.is_empty() {
            assert!(Instant::now() < deadline, "no request is held after {within:?}");
            std::thread::yield_now();
        }
    }
}

/// The driver of one ring: each slot is a page for the order, and pages to be filled.
pub struct Driver {
    pub queue: Queue,
    memory: Memory,
    area: GuestAddress,
    slots: Vec<Option<Order>>,
    pub done: usize,
}

/// An order in flight.
#[derive(Clone, Copy)]
struct Order {
    head: u16,
    seed: u8,
    hold: bool,
    at: GuestAddress,
    len: usize,
}

impl Driver {
    pub const SLOTS: usize = 32;

    /// Its ring is in the three pages from `at` on, the orders in the next.
    pub fn new(memory: &Memory, at: GuestAddress) -> Self {
        let queue = Queue::new(memory, at, 128).unwrap();
        let (area, slots) = (GuestAddress(at.0 + 0x3000), vec![None; Self::SLOTS]);
        Self { queue, memory: memory.clone(), area, slots, done: 0 }
    }

    /// The same driver, in memory to which it was moved.
    pub fn moved_to(mut self, memory: &Memory) -> Self {
        (self.queue, self.memory) = (self.queue.moved_to(memory), memory.clone());
        self
    }

    /// As `order`, with a part of the memory from `area` on that no other order in flight has.
    pub fn order_apart(&mut self, seed: u8, hold: bool, area: GuestAddress, len: usize) -> bool {
        let slot = self.slots.iter().position(Option::is_none).unwrap_or(0);
        self.order(seed, hold, GuestAddress(area.0 + 0x4000 * slot as u64), len)
    }

    /// Orders `len` bytes from `at` to be filled with `seed`. False: no slot is free.
    pub fn order(&mut self, seed: u8, hold: bool, at: GuestAddress, len: usize) -> bool {
        let Some(slot) = self.slots.iter().position(Option::is_none) else { return false };
        let order = GuestAddress(self.area.0 + 16 * slot as u64);
        self.memory.write_obj([seed, u8::from(hold)], order).unwrap();
        let fill = Buffer { at, len: len as u32, device_writes: true };
        let head = self.queue.add(&[Buffer { at: order, len: 16, device_writes: false }, fill]).unwrap();
        self.slots[slot] = Some(Order { head, seed, hold, at, len });
        self.queue.kick().unwrap();
        true
    }

    /// Checks what is done.
    pub fn take_done(&mut self) {
        while let Some((head, _)) = self.queue.used().unwrap() {
            let slot =
                self.slots.iter_mut().find(|slot| slot.is_some_and(|order| order.head == head)).unwrap();
            let Order { seed, at, len, .. } = slot.take().unwrap();
            let mut filled = vec![0; len];
            self.memory.read_slice(&mut filled, at).unwrap();
            assert!(filled.iter().all(|byte| *byte == seed), "filled with something else");
            self.done += 1;
        }
    }

    /// Waits until everything is done that is not held back.
    pub fn finish(&mut self, within: Duration) {
        let deadline = Instant::now() + within;
        self.take_done();
        while self.slots.iter().flatten().any(|order| !order.hold) {
            assert!(Instant::now() < deadline, "{} orders are not done after {within:?}", self.in_flight());
            std::thread::yield_now();
            self.take_done();
        }
    }

    pub fn in_flight(&self) -> usize {
        usize::from(self.queue.in_flight())
    }
}

/// Has everything done, also what is held back: that is done when its ring stops, once it was
/// taken.
pub fn drain(devices: &VhostDevices, drivers: &mut [Driver], within: Duration) {
    let deadline = Instant::now() + within;
    loop {
        devices.stop().unwrap();
        drivers.iter_mut().for_each(Driver::take_done);
        if drivers.iter().all(|driver| driver.in_flight() == 0) {
            return;
        }
        assert!(Instant::now() < deadline, "orders are not done after {within:?}");
        devices.start().unwrap();
        drivers.iter_mut().for_each(|driver| driver.finish(within));
    }
}

/// A device of our own back-end with the rings of `drivers`.
pub fn device(name: &str, user: VhostUser, drivers: &[Driver]) -> VhostDevice<VhostUser> {
    drivers.iter().fold(VhostDevice::new(name, user, VERSION_1), |device, driver| {
        device.ring(driver.queue.ring(), driver.queue.events().unwrap())
    })
}

/// A back-end for `drivers`, and its device.
pub fn own(name: &str, filler: Filler, drivers: &[Driver]) -> (Own, VhostDevice<VhostUser>) {
    let wanted = filler.protocol;
    let (own, socket) = Own::start(filler);
    let user = attach(socket, wanted).user;
    (own, device(name, user, drivers))
}
