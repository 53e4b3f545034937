//! Rings that the guest does not use, and rings that it never set up.

use std::collections::BTreeSet;

use multifd_engine::vhost::vhost::vhost_user::message::FrontendReq;
use multifd_engine::vhost::{RingEvents, VhostDevice, VhostState};
use multifd_engine::vm_memory::GuestAddress;
use multifd_engine::{DirtyLog, RegionLog};
use multifd_tests::virtio::VERSION_1;

use crate::backend::{Driver, Filler, Own, drain};
use crate::guest::{HIGH, Replica, SOON, attach, bitmaps, blocks, devices, memory, set, wanted};
use crate::script::{self, Answer, Journal};

/// The rings that a back-end was told of, and forgets.
fn told(journal: &Journal) -> BTreeSet<u8> {
    use FrontendReq::{
        GET_VRING_BASE, SET_VRING_ADDR, SET_VRING_BASE, SET_VRING_CALL, SET_VRING_ENABLE, SET_VRING_KICK,
        SET_VRING_NUM,
    };
    let about = [
        GET_VRING_BASE,
        SET_VRING_ADDR,
        SET_VRING_BASE,
        SET_VRING_CALL,
        SET_VRING_ENABLE,
        SET_VRING_KICK,
        SET_VRING_NUM,
    ];
    let all = std::mem::take(&mut *journal.lock().unwrap());
    let of_rings =
        all.into_iter().filter(|(request, _)| about.iter().any(|kind| u32::from(*kind) == *request));
    of_rings.map(|(_, body)| body[0]).collect()
}

fn four_rings(request: u32) -> Answer {
    if request == u32::from(FrontendReq::GET_QUEUE_NUM) {
        return Answer::Body(4_u64.to_ne_bytes().to_vec());
    }
    Answer::Usual
}

fn events(drivers: &[Driver]) -> Vec<RingEvents> {
    drivers.iter().map(|driver| driver.queue.events().unwrap()).collect()
}

#[test]
fn a_back_end_hears_of_the_rings_that_the_guest_uses_and_of_no_others() {
    let memory = memory();
    let drivers: Vec<_> = (0..4).map(|ring| Driver::new(&memory, GuestAddress(ring * 0x4000))).collect();
    let (socket, journal) = script::start(four_rings);
    let of = |ring: usize| (drivers[ring].queue.ring(), drivers[ring].queue.events().unwrap());
    let (mut unused, unused_events) = of(2);
    unused.enabled = false;
    let device = VhostDevice::new("nic", attach(socket, wanted()).user, VERSION_1)
        .ring(of(0).0, of(0).1)
        .no_ring()
        .ring(unused, unused_events)
        .ring(of(3).0, of(3).1);
    let here = devices(&memory);
    here.add(device).unwrap();
    here.start().unwrap();
    assert_eq!(told(&journal), BTreeSet::from([0, 3]));

    // The guest asks for more queue pairs, and for fewer.
    here.enable_ring("nic", 2, true).unwrap();
    assert_eq!(told(&journal), BTreeSet::from([2]));
    here.enable_ring("nic", 0, false).unwrap();
    assert_eq!(told(&journal), BTreeSet::from([0]));
    let error = here.enable_ring("nic", 1, true).unwrap_err().to_string();
    assert_eq!(error, "vhost device nic: it has no ring 1");
    here.stop().unwrap();
    assert_eq!(told(&journal), BTreeSet::from([2, 3]));

    let state = VhostState::parse(&here.state("nic").unwrap().encode()).unwrap();
    let enabled: Vec<_> = state.rings.iter().map(|ring| ring.map(|ring| ring.enabled)).collect();
    assert_eq!(enabled, [Some(false), None, Some(true), Some(true)]);
    let (socket, journal) = script::start(four_rings);
    let there = devices(&memory);
    let user = attach(socket, wanted()).user;
    there.add(VhostDevice::load("nic", user, &state, events(&drivers)).unwrap()).unwrap();
    there.start().unwrap();
    assert_eq!(told(&journal), BTreeSet::from([2, 3]));
    there.stop().unwrap();
    assert_eq!(there.state("nic").unwrap(), state);
}

#[test]
fn a_guest_with_some_of_its_rings_goes_on_at_another_back_end_and_enables_more() {
    let memory = memory();
    let mut drivers: Vec<_> = (0..4).map(|ring| Driver::new(&memory, GuestAddress(ring * 0x4000))).collect();
    // As firmware leaves a device: the last ring alone is set up; a driver has set up one more,
    // which it does not use yet.
    let build = |user| {
        let mut unused = drivers[2].queue.ring();
        unused.enabled = false;
        VhostDevice::new("own", user, VERSION_1)
            .no_ring()
            .no_ring()
            .ring(unused, drivers[2].queue.events().unwrap())
            .ring(drivers[3].queue.ring(), drivers[3].queue.events().unwrap())
    };
    let (_own, socket) = Own::start(Filler::new(4));
    let here = devices(&memory);
    here.add(build(attach(socket, wanted()).user)).unwrap();
    here.start().unwrap();
    assert!(drivers[3].order(1, false, HIGH, 100));
    drivers[3].finish(SOON);
    here.stop().unwrap();
    let state = here.state("own").unwrap();
    drop(here);

    let (_other, socket) = Own::start(Filler::new(4));
    let there = devices(&memory);
    let events = events(&drivers);
    there.add(VhostDevice::load("own", attach(socket, wanted()).user, &state, events).unwrap()).unwrap();
    there.start().unwrap();
    assert!(drivers[3].order(2, false, HIGH, 100));
    // It waits in a ring that is not used.
    assert!(drivers[2].order(3, false, GuestAddress(HIGH.0 + 0x8000), 100));
    drivers[3].finish(SOON);
    assert_eq!((drivers[2].in_flight(), drivers[3].done), (1, 2));
    there.enable_ring("own", 2, true).unwrap();
    drivers[2].queue.kick().unwrap();
    drivers[2].finish(SOON);
    drain(&there, &mut drivers[2..], SOON);
}

#[test]
fn what_a_back_end_without_a_log_writes_arrives_when_that_is_asked_for() {
    let memory = memory();
    let ram = blocks(&memory);
    let mut drivers = [Driver::new(&memory, GuestAddress(0))];
    let mut filler = Filler::new(1);
    filler.features = VERSION_1 | 1 << 30;
    let (_own, device) = crate::backend::own("vdpa", filler, &drivers);
    let devices = devices(&memory);
    devices.add(device.without_log()).unwrap();
    devices.start().unwrap();
    assert!(devices.blockers().is_empty());
    let (mut vhost, mut written) = (devices.log(), RegionLog::of_guest_memory(&memory).unwrap());
    vhost.start(&ram).unwrap();
    written.start(&ram).unwrap();
    let mut replica = Replica::of(&ram);
    for round in 0..20_u8 {
        // The ring is reused many times between two syncs: what is in it does not tell what was
        // written.
        for part in 0..40_u64 {
            let at = GuestAddress(HIGH.0 + 0x1_0000 * part + 0x100 * u64::from(round));
            assert!(drivers[0].order(round, false, at, 300));
            drivers[0].finish(SOON);
        }
        devices.stop().unwrap();
        vhost.last_sync(&replica.bitmaps).unwrap();
        replica.follow(&mut [&mut written, &mut vhost]);
        assert_eq!(replica.different(), [], "round {round}");
        // While it is stopped it writes nothing: there is no need to send all again.
        let reported = bitmaps(&ram);
        vhost.last_sync(&reported).unwrap();
        assert_eq!(set(&reported), []);
        devices.start().unwrap();
        let reported = bitmaps(&ram);
        vhost.sync(&reported).unwrap();
        assert_eq!(set(&reported).len(), ram.iter().map(|block| block.pages()).sum::<usize>());
        reported.iter().zip(&replica.bitmaps).for_each(|(from, to)| from.move_to(to));
    }
    devices.stop().unwrap();
    vhost.stop();
}
