//! virtio devices against their own rules and against guest RAM.

use multifd_vmstate::examine::{GuestRam, UnknownRam, examine};
use multifd_vmstate::virtio::{
    Balloon, Blk, BlkRequest, Broken, Console, Core, DeviceId, Features, Features64, Kind, Net, NetRss,
    PackedRings, PciExtra, PciModernState, Queue, Rings, Rng, Scsi, Status, Transport, VirtioDevice,
    VirtioMmio, VirtioPci, Vsock,
};
use multifd_vmstate::{Section, load, save};

use crate::corpus;

/// RAM of 16 MiB in which rings stand where `at` says.
struct SmallRam(Vec<(u64, u16)>);

impl GuestRam for SmallRam {
    fn holds(&self, address: u64, len: u64) -> Option<bool> {
        Some(address.checked_add(len).is_some_and(|end| end <= 16 << 20))
    }

    fn read_u16(&self, address: u64) -> Option<u16> {
        Some(self.0.iter().find(|(at, _)| *at == address).map_or(0, |(_, value)| *value))
    }
}

/// A network device as a modern driver has set it up, with what `spoil` does to it.
fn running(spoil: impl FnOnce(&mut VirtioDevice<VirtioPci, Net>)) -> VirtioDevice<VirtioPci, Net> {
    let mut device = from_corpus();
    let core = &mut device.core;
    core.status = Status(15);
    core.features_low = 1 << 5 | 1 << 15;
    core.features = Some(Features64(Features::VERSION_1 | 1 << 5 | 1 << 15));
    let mut rings = Rings::default();
    for (index, queue) in core.queues.iter_mut().enumerate() {
        let at = 0x10_0000 + 0x1_0000 * index as u64;
        queue.descriptors = at;
        rings.rings[index].avail = at + 0x1000;
        rings.rings[index].used = at + 0x2000;
    }
    core.rings = Some(rings);
    spoil(&mut device);
    device
}

fn from_corpus() -> VirtioDevice<VirtioPci, Net> {
    let recorded = corpus::all().into_iter().find(|recorded| recorded.kind() == "virtio-net").unwrap();
    let mut device = VirtioDevice::<VirtioPci, Net>::default();
    load(&mut device, recorded.version, &recorded.payload).unwrap();
    device
}

fn findings(mut device: VirtioDevice<VirtioPci, Net>, ram: &dyn GuestRam) -> Vec<String> {
    let bytes = save(&mut device).unwrap().bytes;
    let section = Section { name: "0000:00:03.0/virtio-net", instance: 0, version: 11, payload: &bytes };
    let examined = examine(section, ram).unwrap().unwrap();
    examined.findings.iter().map(ToString::to_string).collect()
}

#[test]
fn a_device_that_runs_is_told_by_names() {
    let mut device = running(|_| {});
    let bytes = save(&mut device).unwrap().bytes;
    let section = Section { name: "0000:00:03.0/virtio-net", instance: 0, version: 11, payload: &bytes };
    let examined = examine(section, &SmallRam(Vec::new())).unwrap().unwrap();
    assert_eq!(examined.findings, []);
    let notes: Vec<_> = examined.notes.iter().map(ToString::to_string).collect();
    assert_eq!(notes[0], "status: ACKNOWLEDGE DRIVER FEATURES_OK DRIVER_OK");
    assert_eq!(notes[1], "features: MAC MRG_RXBUF VERSION_1");
    assert_eq!(notes[2], "queue[0]: 256 entries at 0x100000, avail 0x101000, used 0x102000");
}

#[test]
fn what_is_inconsistent_is_named() {
    let none = || SmallRam(Vec::new());
    let check = |spoil: fn(&mut VirtioDevice<VirtioPci, Net>)| findings(running(spoil), &none());
    assert_eq!(check(|_| {}), [""; 0]);
    assert_eq!(
        check(|device| device.core.queues[1].descriptors = 0xff_fff0),
        ["queue[1].descriptors: 0xfffff0, of which not all 4096 bytes are RAM"]
    );
    assert_eq!(
        check(|device| device.core.queues[0].size = 100),
        ["queue[0].size: 100, which is no power of two"]
    );
    assert_eq!(
        check(|device| device.core.rings.as_mut().unwrap().rings[0].used = 0x10_2002),
        ["queue[0].used: 0x102002, which is no multiple of 4"]
    );
    assert_eq!(check(|device| device.transport.queue_vectors[2] = 9), ["queue[2].vector: 9, of 4 vectors"]);
    assert_eq!(
        check(|device| device.core.status.0 &= !Status::FEATURES_OK),
        ["status: ACKNOWLEDGE DRIVER DRIVER_OK, a modern driver that has not chosen its features"]
    );
    assert_eq!(
        check(|device| device.core.features.as_mut().unwrap().0 |= 1 << 50),
        ["features: 0x4000000000000 are not known"]
    );
    assert_eq!(
        check(|device| device.core.broken = Some(Broken(true))),
        ["broken: the device has stopped because of an error of its driver"]
    );
    let extra = |device: &mut VirtioDevice<VirtioPci, Net>| {
        let mut modern = PciModernState::default();
        modern.vqs[0].enabled = true;
        modern.vqs[0].desc = [0x77_0000, 0];
        device.transport.extra = Some(PciExtra { modern: Some(modern) });
    };
    assert_eq!(check(extra), ["queue[0].descriptors: 0x100000, but the driver has set 0x770000"]);
}

/// The index sanity check: neither may more requests wait than a ring has entries, nor be in
/// flight.
#[test]
fn ring_indices_are_checked_against_ram() {
    let at = |avail, used| SmallRam(vec![(0x10_1002, avail), (0x10_2002, used)]);
    let with = |last_avail: u16, ram: &SmallRam| {
        let device = running(|device| device.core.queues[0].last_avail = last_avail);
        findings(device, ram)
    };
    assert_eq!(with(10, &at(266, 10)), [""; 0], "a full ring");
    assert_eq!(with(65_530, &at(200, 65_400)), [""; 0], "indices wrap");
    assert_eq!(
        with(10, &at(267, 10)),
        ["queue[0].last_avail_idx: 10, but the driver is at 267: 257 requests in 256 entries"]
    );
    assert_eq!(
        with(300, &at(300, 20)),
        ["queue[0].last_avail_idx: 300, but 20 are done: 280 requests in 256 entries"]
    );
    assert_eq!(findings(running(|device| device.core.queues[0].last_avail = 9), &UnknownRam), [""; 0]);
}

#[test]
fn loads_are_refused_with_the_field_and_its_value() {
    let bytes = |device: &mut VirtioDevice<VirtioPci, Net>| save(device).unwrap().bytes;
    let refused = |bytes: &[u8]| {
        let mut here = VirtioDevice::<VirtioPci, Net>::default();
        let before = here.clone();
        let error = load(&mut here, 11, bytes).unwrap_err().to_string();
        assert!(here == before, "nothing is half loaded");
        error
    };
    let mut differ = running(|device| device.core.features_low = 3);
    assert_eq!(
        refused(&bytes(&mut differ)),
        "virtio-net: post_load: features 0x100008020 in virtio/64bit_features, but 0x3 are their low 32 bits"
    );
    let mut unset = running(|_| {});
    unset.core.queues[0].descriptors = 0;
    unset.core.queues[0].last_avail = 5;
    let error = save(&mut unset).unwrap_err().to_string();
    assert_eq!(error, "virtio-net: queue[0].last_avail_idx: 5, expected last_avail_idx 0 without a ring");
    let mut macs = running(|device| device.kind.filter = vec![Default::default(); 65]);
    let error = save(&mut macs).unwrap_err().to_string();
    assert_eq!(error, "virtio-net: net.mac_table.in_use: 65, expected mac_table.in_use up to 64");
    let mut pairs = running(|device| device.kind = Net::with_pairs(4));
    pairs.kind.multiqueue.as_mut().unwrap().current_queue_pairs = 2;
    pairs.kind.multiqueue.as_mut().unwrap().tx_waiting = vec![0];
    let bytes = bytes(&mut pairs);
    let mut here = VirtioDevice { kind: Net::with_pairs(4), ..VirtioDevice::<VirtioPci, Net>::default() };
    let error = load(&mut here, 11, &bytes).unwrap_err().to_string();
    assert_eq!(error, "virtio-net: post_load: 2 pairs of queues in use, without the feature VIRTIO_NET_F_MQ");
}

/// The device's part comes before the subsections; what is in it may depend on the low features.
#[test]
fn the_order_is_transport_core_device_subsections() {
    let mut device = running(|device| {
        device.core.features_low |= 1 << 2;
        device.core.features.as_mut().unwrap().0 |= 1 << 2;
        device.kind.guest_offloads = Some(0x1234_5678_9abc_def0);
        device.kind.rss = Some(NetRss { enabled: true, indirections: vec![0; 4], ..NetRss::default() });
    });
    let bytes = save(&mut device).unwrap().bytes;
    let place = |part: &[u8]| bytes.windows(part.len()).position(|window| window == part).unwrap();
    let order = [
        place(&[0xf4, 0x1a]),
        place(&[15, 0, 0, 0, 0, 0, 0x80, 0x24]),
        place(&device.kind.mac.0),
        place(&0x1234_5678_9abc_def0_u64.to_be_bytes()),
        place(b"virtio-net-device/rss"),
        place(b"virtio/64bit_features"),
        place(b"virtio/virtqueues"),
        place(b"virtio/extra_state"),
    ];
    assert!(order.is_sorted(), "{order:?}");
    let mut here = VirtioDevice::<VirtioPci, Net>::default();
    load(&mut here, 11, &bytes).unwrap();
    assert!(here == device);
}

fn comes_back<T: Transport, K: Kind>(kind: K) {
    let queue = Queue {
        size: 128,
        align: if T::ALIGNS_RINGS { 4096 } else { 0 },
        descriptors: 0x1000,
        last_avail: 3,
    };
    let core = Core {
        status: Status(7),
        isr: 1,
        queue_sel: 2,
        features_low: 1 << 29,
        config: vec![1, 2, 3],
        queues: vec![queue; 2],
        packed: Some(PackedRings::default()),
        ..Core::default()
    };
    let mut device = VirtioDevice { transport: T::default(), core, kind: kind.clone() };
    let saved = save(&mut device).unwrap();
    let mut here = VirtioDevice { transport: T::default(), core: Core::default(), kind };
    load(&mut here, K::DESCRIPTION.version, &saved.bytes).unwrap();
    assert!(here == device, "{:?}", K::ID);
    let described = saved.describe("device", 0).payload_len();
    assert_eq!(described, Some(saved.bytes.len() as u64), "{:?}", K::ID);
}

#[test]
fn every_kind_comes_back_on_every_transport() {
    fn on<T: Transport>() {
        comes_back::<T, _>(Net::default());
        comes_back::<T, _>(Blk::default());
        comes_back::<T, _>(Blk {
            requests: vec![BlkRequest { queue: 1, descriptors: 3, ..BlkRequest::default() }; 2],
            packed: true,
        });
        comes_back::<T, _>(Console::default());
        comes_back::<T, _>(Balloon::default());
        comes_back::<T, _>(Rng);
        comes_back::<T, _>(Scsi);
        comes_back::<T, _>(Vsock);
    }
    on::<VirtioPci>();
    on::<VirtioMmio>();
    assert_eq!(
        Features { device: DeviceId::BLOCK, bits: 1 << 9 | 1 << 63 }.to_string(),
        "FLUSH 0x8000000000000000"
    );
    assert_eq!(Status(0).to_string(), "reset");
}

#[test]
fn a_request_of_a_queue_that_is_not_there_is_refused() {
    let queue = Queue { size: 128, descriptors: 0x1000, ..Queue::default() };
    let core = Core { queues: vec![queue; 2], ..Core::default() };
    let requests = vec![BlkRequest { queue: 2, ..BlkRequest::default() }];
    let kind = Blk { requests, packed: false };
    let mut device = VirtioDevice { transport: VirtioPci::default(), core, kind };
    let error = save(&mut device).unwrap_err().to_string();
    assert_eq!(error, "virtio-blk: a request of queue 2, expected one of 2 queues");
}
