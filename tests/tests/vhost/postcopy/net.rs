//! DPDK's testpmd takes over a network card while its rings are missing.

use std::time::Instant;

use multifd_engine::SoftwareLog;
use multifd_engine::vhost::VhostDevice;
use multifd_engine::vm_memory::{Bytes, GuestAddress};
use multifd_tests::virtio::{Buffer, Memory, Queue, VERSION_1};

use super::{destination, faulting, fill, postcopy, silent_source, switch};
use crate::guest::{HIGH, SOON, attach, blocks, devices, memory};
use crate::net::{HEADER, RX, TX, frame, testpmd};
use crate::script::{self, Answer};

/// Where packets come in, and where they are sent from.
const INTO: GuestAddress = GuestAddress(HIGH.0 + 0x3000);
const FROM: GuestAddress = GuestAddress(0x30_0000);

/// Packets in flight at the switch, and as many buffers for those that come in.
const IN_FLIGHT: u64 = 8;

/// A network card as its driver sees it.
struct Card {
    memory: Memory,
    receive: Queue,
    send: Queue,
    /// Where each packet that comes in will be, by its head.
    buffers: Vec<(u16, GuestAddress)>,
}

impl Card {
    /// At the source: none of its queues has been seen by any back-end.
    fn new(here: &Memory) -> Self {
        for at in [RX, TX] {
            here.write_slice(&vec![0; 0x3000], at).unwrap();
        }
        let (mut receive, mut send) = (Queue::new(here, RX, 64).unwrap(), Queue::new(here, TX, 64).unwrap());
        let mut buffers = Vec::new();
        for number in 0..IN_FLIGHT {
            let at = GuestAddress(INTO.0 + number * 0x1000);
            buffers.push((receive.add(&[Buffer { at, len: 2048, device_writes: true }]).unwrap(), at));
            let at = GuestAddress(FROM.0 + number * 0x1000);
            let packet = [&[0; HEADER][..], &frame(number as u8)].concat();
            here.write_slice(&packet, at).unwrap();
            send.add(&[Buffer { at, len: packet.len() as u32, device_writes: false }]).unwrap();
        }
        Self { memory: here.clone(), receive, send, buffers }
    }

    fn moved_to(self, there: &Memory) -> Self {
        let (receive, send) = (self.receive.moved_to(there), self.send.moved_to(there));
        Self { memory: there.clone(), receive, send, buffers: self.buffers }
    }

    /// Until each buffer has a packet: testpmd loses some while it starts, which are sent again.
    fn echo(&mut self) {
        let deadline = Instant::now() + SOON;
        let mut turn = 0;
        while !self.buffers.is_empty() || self.send.in_flight() > 0 {
            assert!(Instant::now() < deadline, "{} packets did not come back", self.buffers.len());
            _ = self.send.used().unwrap();
            if let Some((head, len)) = self.receive.used().unwrap() {
                self.take(head, len as usize);
            } else if self.send.in_flight() == 0 && !self.buffers.is_empty() {
                let at = GuestAddress(FROM.0 + turn % IN_FLIGHT * 0x1000);
                let len = (HEADER + frame(0).len()) as u32;
                self.send.add(&[Buffer { at, len, device_writes: false }]).unwrap();
                self.send.kick().unwrap();
                turn += 1;
            }
            std::thread::yield_now();
        }
    }

    /// One of those that were sent has come back.
    fn take(&mut self, head: u16, len: usize) {
        let place = self.buffers.iter().position(|(buffer, _)| *buffer == head).unwrap();
        let (_, at) = self.buffers.swap_remove(place);
        let mut packet = vec![0; len];
        self.memory.read_slice(&mut packet, at).unwrap();
        assert!((0..IN_FLIGHT).any(|number| packet[HEADER..] == frame(number as u8)), "{packet:?}");
    }
}

#[test]
fn testpmd_takes_over_a_card_whose_rings_and_packets_come_on_demand() {
    let Some((_testpmd, _scratch, socket)) = testpmd(1, ",postcopy-support=1") else { return };
    let (here, there) = (memory(), memory());
    fill(&here);
    let card = Card::new(&here);
    // Its state, as it was never started there.
    let (unused, _) = script::start(|_| Answer::Usual);
    let before = devices(&here);
    let device = VhostDevice::new("nic", attach(unused, faulting()).user, VERSION_1);
    let device = device.ring(card.receive.ring(), card.receive.events().unwrap());
    before.add(device.ring(card.send.ring(), card.send.events().unwrap())).unwrap();
    let state = before.state("nic").unwrap().encode();

    let user = attach(socket, faulting()).user;
    let back_ends = postcopy(&there);
    back_ends.add("nic", &user).unwrap();
    let source = silent_source(&here).dirty_log(SoftwareLog::new(&blocks(&here))).build().unwrap();
    let mut moved = switch(source, destination(&there, &back_ends), state).unwrap();
    moved.guest().loaded().unwrap();
    let mut card = card.moved_to(&there);
    let after = devices(&there);
    let events = vec![card.receive.events().unwrap(), card.send.events().unwrap()];
    after.add(VhostDevice::load("nic", user, &moved.state(), events).unwrap()).unwrap();
    after.start().unwrap();
    card.send.kick().unwrap();
    card.echo();
    let report = moved.complete();
    let faults = &report.faults.unwrap().back_ends[0];
    assert!(faults.device == "nic" && faults.faults > 0, "{faults:?}");
    assert!(back_ends.failures().is_empty(), "{:?}", back_ends.failures());
    after.stop().unwrap();
}
