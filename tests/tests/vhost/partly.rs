//! Devices that start, stop, or follow only in part.

use multifd_engine::DirtyLog;
use multifd_engine::vhost::vhost::vhost_user::message::FrontendReq;
use multifd_engine::vhost::{VhostDevices, VhostRegion};
use multifd_engine::vm_memory::GuestAddress;
use multifd_tests::virtio::Memory;

use crate::backend::{Driver, Filler, device, own};
use crate::faults::SHORT;
use crate::guest::{Attached, HIGH, attach, bitmaps, blocks, devices, memory, wanted};
use crate::script::{self, Answer, Journal};

/// A device of two rings, stopped, whose back-end does as `script` says. The journal begins after
/// the negotiation.
fn two_rings(script: impl FnMut(u32) -> Answer + Send + 'static) -> (Memory, VhostDevices, Journal) {
    let memory = memory();
    let (socket, journal) = script::start(script);
    let Attached { user, .. } = attach(socket, wanted());
    let drivers = [0, 0x4000].map(|at| Driver::new(&memory, GuestAddress(at)));
    let devices = devices(&memory);
    devices.add(device("odd", user.timeout(SHORT), &drivers)).unwrap();
    journal.lock().unwrap().clear();
    (memory, devices, journal)
}

/// What the back-end was told, of `requests`, and their first numbers: the ring. It is forgotten.
fn told(journal: &Journal, requests: &[FrontendReq]) -> Vec<(u32, u8)> {
    let all = std::mem::take(&mut *journal.lock().unwrap());
    let mine = |(request, body): &(u32, Vec<u8>)| {
        let known = requests.iter().any(|mine| u32::from(*mine) == *request);
        known.then(|| (*request, body[0]))
    };
    all.iter().filter_map(mine).collect()
}

/// A script that refuses the second request `special`, in its own way.
fn second(special: FrontendReq, refusal: impl Fn() -> Answer + Send) -> impl FnMut(u32) -> Answer + Send {
    let mut count = 0;
    move |request| {
        count += u32::from(request == u32::from(special));
        if request == u32::from(special) && count == 2 { refusal() } else { Answer::Usual }
    }
}

const ENABLE: FrontendReq = FrontendReq::SET_VRING_ENABLE;
const STOP: FrontendReq = FrontendReq::GET_VRING_BASE;

#[test]
fn a_device_that_starts_only_in_part_is_stopped_again() {
    let (memory, devices, journal) = two_rings(second(ENABLE, || Answer::Body(1_u64.to_ne_bytes().to_vec())));
    let ram = blocks(&memory);
    let mut log = devices.log();
    log.start(&ram).unwrap();
    let error = devices.start().unwrap_err().chain();
    assert_eq!(
        error,
        "vhost device odd: starting its rings: vhost-user: socket error: the back-end refuses SET_VRING_ENABLE: status 1"
    );
    let (on, off) = (u32::from(ENABLE), u32::from(STOP));
    assert_eq!(told(&journal, &[ENABLE, STOP]), [(on, 0), (on, 1), (off, 1), (off, 0)]);
    let refused = log.last_sync(&bitmaps(&ram)).unwrap_err();
    assert_eq!(refused.to_string(), format!("what vhost devices write is not known since {error}"));
    log.stop();
    devices.state("odd").unwrap();
    devices.start().unwrap();
    assert_eq!(told(&journal, &[ENABLE, STOP]), [(on, 0), (on, 1)]);
}

#[test]
fn the_last_sync_refuses_a_device_that_runs_in_part() {
    let mut refuses = second(ENABLE, || Answer::Body(1_u64.to_ne_bytes().to_vec()));
    let (memory, devices, _) = two_rings(move |request| match request == u32::from(STOP) {
        true => Answer::Silence,
        false => refuses(request),
    });
    let ram = blocks(&memory);
    let error = devices.start().unwrap_err().chain();
    assert!(error.ends_with("refuses SET_VRING_ENABLE: status 1"), "the first error, not: {error}");
    let error = devices.state("odd").unwrap_err();
    assert_eq!(error.to_string(), "vhost device odd: it still runs: its state is known when it is stopped");
    let mut log = devices.log();
    assert!(log.start(&ram).is_err());
    let error = log.last_sync(&bitmaps(&ram)).unwrap_err();
    assert_eq!(error.to_string(), "vhost device odd still runs: it must be stopped before the last sync");
    log.stop();
}

/// Bases that were never told are not asked for: the back-end's would take their place.
#[test]
fn a_device_whose_rings_were_not_told_is_left_alone() {
    let refusal = || Answer::Body(1_u64.to_ne_bytes().to_vec());
    let (_, devices, journal) = two_rings(second(FrontendReq::SET_VRING_BASE, refusal));
    devices.start().unwrap_err();
    assert_eq!(told(&journal, &[ENABLE, STOP]), []);
    devices.state("odd").unwrap();
    devices.start().unwrap();
}

#[test]
fn the_rings_of_a_device_that_stops_only_in_part_go_on() {
    // Of 8 bytes there are none.
    let (_, devices, journal) = two_rings(second(STOP, || Answer::Body(Vec::new())));
    devices.start().unwrap();
    let all = [ENABLE, FrontendReq::SET_VRING_NUM, FrontendReq::SET_VRING_BASE, FrontendReq::SET_VRING_ADDR];
    assert_eq!(told(&journal, &all).len(), 8);
    let error = devices.stop().unwrap_err().to_string();
    assert_eq!(error, "vhost device odd: stopping ring 1");
    devices.start().unwrap();
    let first = [8, 10, 9, 18].map(|request| (request, 0));
    assert_eq!(told(&journal, &all), first, "the ring that was stopped, and no other");
    devices.start().unwrap();
    assert_eq!(told(&journal, &all), []);
    devices.stop().unwrap();
    assert_eq!(told(&journal, &[STOP]), [0, 1].map(|ring| (u32::from(STOP), ring)));
    devices.state("odd").unwrap();
}

#[test]
fn memory_does_not_change_without_a_log_for_it() {
    let (memory, devices, journal) = two_rings(second(FrontendReq::SET_LOG_BASE, || Answer::HangUp));
    devices.start().unwrap();
    let ram = blocks(&memory);
    let mut log = devices.log();
    log.start(&ram).unwrap();
    told(&journal, &[]);
    let error = devices.change_regions(vec![VhostRegion::new(HIGH, &ram[1])]).unwrap_err().chain();
    assert_eq!(told(&journal, &[STOP, FrontendReq::SET_MEM_TABLE]), []);
    let lost = log.sync(&bitmaps(&ram)).unwrap_err();
    assert_eq!(lost.to_string(), format!("what vhost devices write is not known since {error}"));
    log.stop();
    // The low memory, where the rings of this one are, is still known.
    let (_own, next) = own("next", Filler::new(1), &[Driver::new(&memory, GuestAddress(0x8000))]);
    devices.add(next).unwrap();
    devices.start().unwrap();
}
