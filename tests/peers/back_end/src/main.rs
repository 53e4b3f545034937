//! A vhost-user back-end that fills what its orders name. Its standard input is the socket that it
//! listens on; it serves one connection, and ends with it.
//!
//! An order is a chain: one descriptor that the driver has written (its first byte is what to fill
//! with, its second is ignored), and others to be filled. `MULTIFD_QUEUES`: the number of queues, a
//! thread each.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::sync::{Arc, Mutex};

use vhost::vhost_user::Listener;
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost_user_backend::{VhostUserBackend, VhostUserDaemon, VringRwLock, VringT};
use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier};

type Space = GuestMemoryAtomic<GuestMemoryMmap>;
type Vring = VringRwLock<Space>;

const VERSION_1: u64 = 1 << 32;
const PROTOCOL_FEATURES: u64 = 1 << 30;

struct Filler {
    queues: usize,
    memory: Mutex<Option<Space>>,
}

impl VhostUserBackend for Filler {
    type Bitmap = ();
    type Vring = Vring;

    fn num_queues(&self) -> usize {
        self.queues
    }

    fn max_queue_size(&self) -> usize {
        128
    }

    fn features(&self) -> u64 {
        VERSION_1 | PROTOCOL_FEATURES
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::PAGEFAULT
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
    }

    fn set_event_idx(&self, _: bool) {}

    fn update_memory(&self, memory: Space) -> io::Result<()> {
        *self.memory.lock().unwrap() = Some(memory);
        Ok(())
    }

    fn queues_per_thread(&self) -> Vec<u64> {
        (0..self.queues).map(|queue| 1 << queue).collect()
    }

    fn exit_event(&self, _: usize) -> Option<(EventConsumer, EventNotifier)> {
        new_event_consumer_and_notifier(EventFlag::empty()).ok()
    }

    fn handle_event(&self, event: u16, _: EventSet, vrings: &[Vring], _: usize) -> io::Result<()> {
        let Some(vring) = vrings.get(usize::from(event)) else { return Ok(()) };
        let memory = self.memory.lock().unwrap().as_ref().unwrap().memory();
        loop {
            let chain = vring.get_mut().get_queue_mut().pop_descriptor_chain(memory.clone());
            let Some(chain) = chain else { return Ok(()) };
            let (head, mut seed, mut filled) = (chain.head_index(), 0, 0);
            for descriptor in chain {
                if descriptor.is_write_only() {
                    memory.write_slice(&vec![seed; descriptor.len() as usize], descriptor.addr()).unwrap();
                    filled += descriptor.len();
                } else {
                    seed = memory.read_obj(descriptor.addr()).unwrap();
                }
            }
            vring.add_used(head, filled).unwrap();
            // There may be no listener any more.
            _ = vring.signal_used_queue();
        }
    }
}

fn main() {
    let queues = std::env::var("MULTIFD_QUEUES").ok().and_then(|queues| queues.parse().ok()).unwrap_or(1);
    let socket = UnixListener::from(io::stdin().as_fd().try_clone_to_owned().unwrap());
    let mut listener = Listener::from(socket);
    let filler = Arc::new(Filler { queues, memory: Mutex::default() });
    let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
    let mut daemon = VhostUserDaemon::new("back-end".to_owned(), filler, memory).unwrap();
    daemon.start(&mut listener).unwrap();
    if let Err(error) = daemon.wait() {
        eprintln!("{error}");
    }
    // A thread that waits for a page would keep the process: no page comes any more.
    std::process::exit(0);
}
