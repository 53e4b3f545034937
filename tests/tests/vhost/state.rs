//! What of a device goes with the guest: saved, loaded, refused.

use multifd_engine::vhost::vhost::vhost_user::message::{
    FrontendReq, VhostUserInflight, VhostUserProtocolFeatures,
};
use multifd_engine::vhost::{Inflight, Ring, RingEvents, VhostDevice, VhostState};
use multifd_engine::vm_memory::GuestAddress;
use multifd_tests::virtio::VERSION_1;

use crate::backend::{Driver, Filler, Own, device};
use crate::guest::{attach, devices, memory, wanted};
use crate::script::{self, Answer};

fn events(drivers: &[Driver]) -> Vec<RingEvents> {
    drivers.iter().map(|driver| driver.queue.events().unwrap()).collect()
}

#[test]
fn a_state_that_does_not_fit_is_refused_with_both_values() {
    let memory = memory();
    let drivers: Vec<_> = (0..4).map(|ring| Driver::new(&memory, GuestAddress(ring * 0x4000))).collect();
    let rings = drivers.iter().map(|driver| Some(driver.queue.ring())).collect();
    let state = VhostState {
        features: VERSION_1 | 1 << 5,
        protocol_features: 0x2003,
        rings,
        inflight: None,
        back_end: None,
    };
    let refused = |state: &VhostState, queues: usize, here: usize| {
        let (_own, socket) = Own::start(Filler::new(queues));
        let user = attach(socket, wanted()).user;
        VhostDevice::load("nic", user, state, events(&drivers[..here]))
            .map(drop)
            .map_err(|error| error.to_string())
    };
    let error = |state: &VhostState, queues, here| refused(state, queues, here).unwrap_err();
    assert_eq!(
        error(&state, 4, 4),
        "vhost device nic: the state needs features 0x100000020, its back-end here has 0x144000000: not 0x20"
    );
    let state = VhostState { features: VERSION_1, ..state };
    assert_eq!(error(&state, 4, 2), "vhost device nic: the state has 4 rings, the device here has 2");
    assert_eq!(error(&state, 2, 4), "vhost device nic: the state has 4 rings, its back-end here serves 2");
    refused(&state, 4, 4).unwrap();
    let state = VhostState { protocol_features: 0x1003, ..state };
    assert_eq!(
        error(&state, 4, 4),
        "vhost device nic: the state needs protocol features 0x1001, its back-end here has 0x800b: not 0x1000"
    );
}

/// A back-end may take the size of the ring for 0 entries, or for 65536.
#[test]
fn a_ring_of_a_size_that_none_can_have_is_refused_when_the_device_is_added() {
    for size in [0, 3, 100, 32769] {
        let memory = memory();
        let drivers = [Driver::new(&memory, GuestAddress(0))];
        let (_own, socket) = Own::start(Filler::new(2));
        let user = attach(socket, wanted()).user;
        let odd = Ring { size, ..drivers[0].queue.ring() };
        let added = device("nic", user, &drivers).ring(odd, drivers[0].queue.events().unwrap());
        let error = devices(&memory).add(added).unwrap_err().chain();
        let text =
            format!("vhost device nic: adding its ring 1: size of a vhost ring: {size}, expected 1..=32768");
        assert!(error.starts_with(&text), "{error}");
    }
}

#[test]
fn the_in_flight_region_goes_along() {
    let memory = memory();
    let drivers = [Driver::new(&memory, GuestAddress(0))];
    let wanted = wanted() | VhostUserProtocolFeatures::INFLIGHT_SHMFD;
    let (socket, journal) = script::start(|_| Answer::Usual);
    let mut file = tempfile::tempfile().unwrap();
    std::io::Write::write_all(&mut file, &[0xee; 300]).unwrap();
    let region = VhostUserInflight::new(200, 100, 1, 128);
    let inflight = Inflight::new(file, &region);
    let here = devices(&memory);
    here.add(device("disk", attach(socket, wanted).user, &drivers).inflight(inflight)).unwrap();
    here.start().unwrap();
    here.stop().unwrap();
    let told = |journal: &script::Journal| {
        let all = journal.lock().unwrap();
        all.iter().find(|(request, _)| *request == u32::from(FrontendReq::SET_INFLIGHT_FD)).unwrap().1.clone()
    };
    assert_eq!(told(&journal)[..20], inflight_body(200, 100));
    let state = here.state("disk").unwrap();
    assert_eq!(state.inflight.as_ref().unwrap().bytes, [0xee; 200]);
    let state = VhostState::parse(&state.encode()).unwrap();

    let (socket, journal) = script::start(|_| Answer::Usual);
    let there = devices(&memory);
    there
        .add(VhostDevice::load("disk", attach(socket, wanted).user, &state, events(&drivers)).unwrap())
        .unwrap();
    there.start().unwrap();
    assert_eq!(told(&journal)[..20], inflight_body(200, 0));
    there.stop().unwrap();
    assert_eq!(there.state("disk").unwrap(), state);
}

fn inflight_body(len: u64, offset: u64) -> Vec<u8> {
    let mut body = [len.to_ne_bytes(), offset.to_ne_bytes()].concat();
    body.extend(1_u16.to_ne_bytes());
    body.extend(128_u16.to_ne_bytes());
    body
}
