//! Back-ends that refuse, are silent, or go: clear errors in time, and a guest that is whole.

use std::time::Duration;

use multifd_engine::vhost::vhost::vhost_user::message::{FrontendReq, VhostUserProtocolFeatures};
use multifd_engine::vhost::{Announcement, EventFd, VhostDevice, VhostDevices, VhostRegion, VhostUser};
use multifd_engine::vm_memory::GuestAddress;
use multifd_engine::{DirtyLog, ErrorKind, RamBlock};
use multifd_tests::virtio::{Memory, VERSION_1};

use crate::backend::{Driver, Filler, Own, device, own};
use crate::guest::{Attached, HIGH, MAC, attach, blocks, devices, memory, source, wanted};
use crate::script::{self, Answer, Journal};

pub const SHORT: Duration = Duration::from_millis(300);

/// A running device whose back-end does as `script` says about requests `special`.
fn scripted(
    memory: &Memory,
    special: FrontendReq,
    mut answer: impl FnMut() -> Answer + Send + 'static,
) -> (VhostDevices, Driver, Journal) {
    let special = u32::from(special);
    let script = move |request| if request == special { answer() } else { Answer::Usual };
    let (socket, journal) = script::start(script);
    let Attached { user, .. } = attach(socket, wanted());
    let drivers = [Driver::new(memory, GuestAddress(0))];
    let devices = devices(memory);
    devices.add(device("odd", user.timeout(SHORT), &drivers).running()).unwrap();
    let [driver] = drivers;
    (devices, driver, journal)
}

/// What a migration of these devices says when it begins.
fn start_error(devices: &VhostDevices, memory: &Memory) -> String {
    let uri = "tcp:127.0.0.1:1".parse().unwrap();
    let error = source(blocks(memory)).dirty_log(devices.log()).build().unwrap().connect(&uri).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::GuestMemory, "not the dead address: nothing was sent");
    assert!(error.source_may_resume());
    let prefix = "setup: dirty log vhost could not be started: ";
    error.chain().strip_prefix(prefix).unwrap().to_owned()
}

#[test]
fn a_reply_that_never_comes_is_an_error_in_time() {
    for (request, doing) in [
        (FrontendReq::SET_LOG_BASE, "sharing a log of 131328 bytes"),
        (FrontendReq::SET_FEATURES, "setting features 0x144000000"),
        (FrontendReq::SET_VRING_ADDR, "setting the addresses of ring 0"),
        (FrontendReq::GET_FEATURES, "asking for its features"),
    ] {
        let memory = memory();
        // The first GET_FEATURES is the negotiation's.
        let mut asked = request != FrontendReq::GET_FEATURES;
        let answer =
            move || if std::mem::replace(&mut asked, true) { Answer::Silence } else { Answer::Usual };
        let (devices, ..) = scripted(&memory, request, answer);
        assert_eq!(
            start_error(&devices, &memory),
            format!(
                "vhost device odd: {doing}: vhost-user: socket error: no reply to {request:?} within 300ms"
            )
        );
        let error = devices.stop().unwrap_err().chain();
        assert!(error.ends_with("the connection broke before"), "{error}");
    }
}

#[test]
fn a_ring_that_does_not_stop_is_an_error_in_time() {
    let memory = memory();
    let (devices, ..) = scripted(&memory, FrontendReq::GET_VRING_BASE, || Answer::Silence);
    let error = devices.stop().unwrap_err();
    assert_eq!(
        error.chain(),
        "vhost device odd: stopping ring 0: vhost-user: socket error: no reply to GET_VRING_BASE within 300ms"
    );
}

#[test]
fn a_log_that_is_refused_is_an_error() {
    let memory = memory();
    let (devices, ..) = scripted(&memory, FrontendReq::SET_LOG_BASE, || Answer::HangUp);
    assert_eq!(
        start_error(&devices, &memory),
        "vhost device odd: sharing a log of 131328 bytes: vhost-user: socket error: SET_LOG_BASE: the back-end closed \
         the connection"
    );
}

#[test]
fn an_eventfd_for_the_log_is_told_and_may_be_refused() {
    let memory = memory();
    let refuse = || Answer::Body(1_u64.to_ne_bytes().to_vec());
    let (devices, ..) = scripted(&memory, FrontendReq::SET_LOG_FD, refuse);
    devices.log_event(EventFd::new(0).unwrap());
    assert_eq!(
        start_error(&devices, &memory),
        "vhost device odd: setting the log's eventfd: vhost-user: socket error: the back-end refuses SET_LOG_FD: status 1"
    );
    // It was refused, no more: the device goes on, without the eventfd.
    devices.stop().unwrap();
}

/// The three kinds of back-ends' replies to SET_LOG_BASE.
#[test]
fn the_log_is_shared_whatever_the_length_of_the_reply() {
    for len in [0, 8, 16] {
        let memory = memory();
        let ram = blocks(&memory);
        let answer = move || Answer::Body(vec![0; len]);
        let (devices, _, journal) = scripted(&memory, FrontendReq::SET_LOG_BASE, answer);
        let mut log = devices.log();
        log.start(&ram).unwrap();
        log.stop();
        let told = journal.lock().unwrap();
        let features = |request: &&(u32, Vec<u8>)| request.0 == u32::from(FrontendReq::SET_FEATURES);
        let log_all: Vec<_> = told.iter().filter(features).map(|(_, body)| body[3] >> 2 & 1).collect();
        assert_eq!(log_all, [1, 0], "the log is on, then off");
        let addresses = |request: &&(u32, Vec<u8>)| request.0 == u32::from(FrontendReq::SET_VRING_ADDR);
        let flags: Vec<_> = told.iter().filter(addresses).map(|(_, body)| body[4]).collect();
        assert_eq!(flags, [1, 0]);
        let (_, first) = told.iter().find(addresses).unwrap();
        assert_eq!(first[32..], 0x2000_u64.to_ne_bytes(), "the guest's address of the used ring");
    }
}

#[test]
fn replies_that_are_none_are_named() {
    let header = |fields: [u32; 3]| fields.map(u32::to_ne_bytes).concat();
    for (bytes, text) in [
        (header([11, 5, 8]), "the reply to SET_LOG_BASE is a message 11 with flags 0x5, expected 6 with 0x5"),
        (header([6, 1, 8]), "the reply to SET_LOG_BASE is a message 6 with flags 0x1, expected 6 with 0x5"),
        (header([6, 5, 1 << 30]), "the reply to SET_LOG_BASE is 1073741824 bytes, expected up to 4096"),
        (header([6, 5, 100]), "no reply to SET_LOG_BASE within 300ms"),
    ] {
        let memory = memory();
        let (devices, ..) = scripted(&memory, FrontendReq::SET_LOG_BASE, move || Answer::Raw(bytes.clone()));
        let error = start_error(&devices, &memory);
        assert!(error.ends_with(text), "{error}");
    }
}

/// The back-end has more memory than the log was made for: it was added without a call.
#[test]
fn a_log_that_is_too_small_is_refused() {
    let memory = memory();
    let drivers = [Driver::new(&memory, GuestAddress(0))];
    let (_own, socket) = Own::start(Filler::new(1));
    let user = attach(socket, wanted()).user;
    let whole = devices(&memory);
    whole.add(device("small", user, &drivers)).unwrap();
    whole.start().unwrap();
    // Only the low region: a log of 256 bytes.
    let (_own, socket) = Own::start(Filler::new(1));
    let Attached { user, front_end } = attach(socket, wanted());
    let regions = VhostRegion::of_guest_memory(&memory).unwrap();
    let elsewhere = VhostUser::new(&front_end, wanted()).unwrap();
    multifd_engine::vhost::VhostFrontEnd::change_memory(&elsewhere, &[], &regions).unwrap();
    let devices = VhostDevices::new(regions[..1].to_vec()).unwrap();
    devices.add(device("small", user, &drivers).running()).unwrap();
    assert_eq!(
        start_error(&devices, &memory),
        "vhost device small: sharing a log of 256 bytes: vhost-user: socket error: SET_LOG_BASE: the back-end closed \
         the connection"
    );
}

#[test]
fn a_back_end_that_cannot_log_blocks_before_anything_is_sent() {
    let memory = memory();
    let mut filler = Filler::new(1);
    filler.features &= !crate::backend::LOG_ALL;
    let drivers = [Driver::new(&memory, GuestAddress(0))];
    let (_own, first) = own("old", filler, &drivers);
    let mut filler = Filler::new(1);
    filler.protocol.remove(VhostUserProtocolFeatures::LOG_SHMFD);
    let (_own, second) = own("half", filler, &drivers);
    let devices = devices(&memory);
    devices.add(first).unwrap();
    devices.add(second).unwrap();
    let old = "vhost device old: cannot migrate: its back-end has no VHOST_F_LOG_ALL among its features 0x140000000";
    let half = "vhost device half: cannot migrate: VHOST_USER_PROTOCOL_F_LOG_SHMFD is not negotiated with its back-end";
    let blockers: Vec<_> = devices.blockers().iter().map(|blocker| blocker.to_string()).collect();
    assert_eq!(blockers, [old, half]);
    assert_eq!(start_error(&devices, &memory), old);
    devices.remove("old").unwrap();
    assert_eq!(start_error(&devices, &memory), half);
}

#[test]
fn memory_that_migrates_not_or_is_not_there_is_named() {
    let memory = memory();
    let ram = blocks(&memory);
    let (devices, ..) = scripted(&memory, FrontendReq::SEND_RARP, || Answer::Usual);
    let mut log = devices.log();
    let error = log.start(&ram[..1]).unwrap_err();
    assert_eq!(error.to_string(), "noting writes to RAM block ram@0x100000000: it does not migrate");
    log.stop();
    // The ring is in low memory, the region is not.
    let only_high = VhostDevices::new(vec![VhostRegion::new(HIGH, &ram[1])]).unwrap();
    let (socket, _) = script::start(|_| Answer::Usual);
    let drivers = [Driver::new(&memory, GuestAddress(0))];
    only_high.add(device("lost", attach(socket, wanted()).user, &drivers)).unwrap();
    let error = only_high.start().unwrap_err();
    assert_eq!(
        error.to_string(),
        "vhost device lost: ring 0: 2048 bytes at 0x0 are not in the guest's memory"
    );
    let anonymous = multifd_engine::HostMemory::anonymous(1 << 20).unwrap();
    let block = RamBlock::new("private".try_into().unwrap(), anonymous);
    let private = VhostDevices::new(vec![VhostRegion::new(GuestAddress(0), &block)]).unwrap();
    let (socket, _) = script::start(|_| Answer::Usual);
    private.add(VhostDevice::new("alone", attach(socket, wanted()).user, VERSION_1)).unwrap();
    let error = private.start().unwrap_err().chain();
    assert_eq!(error, "vhost device alone: sharing the guest's memory: invalid guest memory region");
}

#[test]
fn names_are_unique_and_known() {
    let memory = memory();
    let (devices, ..) = scripted(&memory, FrontendReq::SEND_RARP, || Answer::Usual);
    let (socket, _) = script::start(|_| Answer::Usual);
    let twin = VhostDevice::new("odd", attach(socket, wanted()).user, VERSION_1);
    assert_eq!(
        devices.add(twin).unwrap_err().to_string(),
        "vhost device odd: there is one of this name already"
    );
    assert_eq!(
        devices.remove("even").unwrap_err().to_string(),
        "vhost device even: there is none of this name"
    );
    let error = devices.state("odd").unwrap_err();
    assert_eq!(error.to_string(), "vhost device odd: it still runs: its state is known when it is stopped");
}

#[test]
fn the_guest_the_back_end_or_the_embedder_announces() {
    let memory = memory();
    let (devices, _, journal) = scripted(&memory, FrontendReq::SEND_RARP, || Answer::Usual);
    assert_eq!(devices.announce("odd", MAC).unwrap(), Announcement::ByBackEnd);
    let sent = journal.lock().unwrap().last().cloned().unwrap();
    assert_eq!(sent, (19, [&MAC[..], &[0, 0]].concat()));
    for (name, features, protocol, by) in [
        ("guest", VERSION_1 | 1 << 21, wanted(), Announcement::ByGuest),
        ("neither", VERSION_1, wanted() - VhostUserProtocolFeatures::RARP, Announcement::ByEmbedder),
    ] {
        let (socket, journal) = script::start(|_| Answer::Usual);
        devices.add(VhostDevice::new(name, attach(socket, protocol).user, features)).unwrap();
        assert_eq!(devices.announce(name, MAC).unwrap(), by);
        assert!(journal.lock().unwrap().iter().all(|(request, _)| *request != 19));
    }
}

/// What cannot be stopped may go on writing when its log is no longer read.
#[test]
fn a_device_that_is_removed_and_does_not_stop_fails_the_migration() {
    let memory = memory();
    let ram = blocks(&memory);
    let (devices, ..) = scripted(&memory, FrontendReq::GET_VRING_BASE, || Answer::Silence);
    let mut log = devices.log();
    log.start(&ram).unwrap();
    let error = devices.remove("odd").unwrap_err().chain();
    let reported = crate::guest::bitmaps(&ram);
    let text = format!("what vhost devices write is not known since {error}");
    assert_eq!(log.sync(&reported).unwrap_err().to_string(), text);
    assert_eq!(log.last_sync(&reported).unwrap_err().to_string(), text);
    log.stop();
    log.start(&ram).unwrap();
    log.last_sync(&reported).unwrap();
    log.stop();
}

/// A device that comes while a migration runs is logged like the others; one that cannot be is
/// refused.
#[test]
fn a_device_may_come_and_go_while_the_guest_moves() {
    let memory = memory();
    let ram = blocks(&memory);
    let mut drivers = [Driver::new(&memory, GuestAddress(0))];
    let devices = devices(&memory);
    let mut log = devices.log();
    log.start(&ram).unwrap();
    let mut filler = Filler::new(1);
    filler.features &= !crate::backend::LOG_ALL;
    let (_old, old) = own("old", filler, &drivers);
    assert!(devices.add(old).unwrap_err().to_string().starts_with("vhost device old: cannot migrate"));
    let (_own, late) = own("late", Filler::new(1), &drivers);
    devices.add(late).unwrap();
    devices.start().unwrap();
    assert!(drivers[0].order(3, false, HIGH, 16));
    drivers[0].finish(crate::guest::SOON);
    devices.remove("late").unwrap();
    let reported = crate::guest::bitmaps(&ram);
    log.last_sync(&reported).unwrap();
    let used = crate::guest::place(drivers[0].queue.used_page());
    assert_eq!(crate::guest::set(&reported), [used, (1, 0)]);
    log.stop();
}
