//! Several writers, each with a log of its own, in one bitmap: back-ends, the VMM's own threads,
//! vCPUs.
#![expect(unsafe_code, reason = "the slot given to KVM's log must be true")]

use std::sync::Arc;

use multifd_engine::vhost::VhostDevices;
use multifd_engine::vm_memory::GuestAddress;
use multifd_engine::{DirtyLog, KvmDirtyLog, RegionLog, UserfaultLog};
use multifd_tests::skip::skipped;
use multifd_tests::virtio::Memory;

use crate::backend::{Driver, Filler, Own, drain, own};
use crate::guest::{HIGH, Replica, SOON, blocks, devices, memory};
use crate::kvm_guest::{Exit, KvmGuest, Pace, run};

const ROUNDS: usize = 200;

/// Two back-ends that share a log, and one with its own.
struct Three {
    shared: VhostDevices,
    alone: VhostDevices,
    drivers: Vec<Driver>,
    _own: Vec<Own>,
}

impl Three {
    fn new(memory: &Memory) -> Self {
        let (shared, alone) = (devices(memory), devices(memory));
        let (mut drivers, mut running) = (Vec::new(), Vec::new());
        for (number, group) in [(0, &shared), (1, &shared), (2, &alone)] {
            let driver = [Driver::new(memory, GuestAddress(HIGH.0 + number * 0x4000))];
            let (own, device) = own(&format!("device {number}"), Filler::new(1), &driver);
            group.add(device).unwrap();
            drivers.extend(driver);
            running.push(own);
        }
        shared.start().unwrap();
        alone.start().unwrap();
        Self { shared, alone, drivers, _own: running }
    }

    /// Each has something filled: the devices' parts of low memory and of high memory.
    fn write(&mut self, round: usize) {
        for (number, driver) in self.drivers.iter_mut().enumerate() {
            driver.take_done();
            let base = if round.is_multiple_of(2) { 0x10_0000 } else { HIGH.0 + 0x10_0000 };
            let area = GuestAddress(base + 0x10_0000 * number as u64);
            let hold = round.is_multiple_of(7);
            assert!(driver.order_apart(round as u8, hold, area, 1 + round * 61 % 8192));
            if round.is_multiple_of(10) {
                driver.finish(SOON);
            }
        }
    }

    fn stop(&self) {
        self.shared.stop().unwrap();
        self.alone.stop().unwrap();
    }

    fn start(&self) {
        self.shared.start().unwrap();
        self.alone.start().unwrap();
    }
}

/// Follows all writers for some rounds, and compares whenever they are paused.
fn nothing_is_lost(memory: &Memory, own_log: &mut dyn DirtyLog, mut more: impl FnMut(usize)) {
    let ram = blocks(memory);
    let mut three = Three::new(memory);
    let (mut shared, mut alone) = (three.shared.log(), three.alone.log());
    shared.start(&ram).unwrap();
    alone.start(&ram).unwrap();
    own_log.start(&ram).unwrap();
    let mut replica = Replica::of(&ram);
    for round in 1..=ROUNDS {
        three.write(round);
        more(round);
        let still = round.is_multiple_of(20);
        if still {
            three.stop();
            shared.last_sync(&replica.bitmaps).unwrap();
        }
        replica.follow(&mut [own_log, &mut shared, &mut alone]);
        if still {
            assert_eq!(replica.different(), [], "round {round}");
            three.start();
        }
    }
    let (first, last) = three.drivers.split_at_mut(2);
    drain(&three.shared, first, SOON);
    drain(&three.alone, last, SOON);
    assert!(three.drivers.iter().all(|driver| driver.done == ROUNDS));
    shared.stop();
    alone.stop();
    own_log.stop();
}

#[test]
fn three_back_ends_and_userfaultfd_in_one_bitmap() {
    let mut log = match UserfaultLog::new() {
        Ok(log) => log,
        Err(error) => return skipped(&error.to_string()).unwrap(),
    };
    nothing_is_lost(&memory(), &mut log, |_| {});
}

/// KVM's log and vm-memory's as one: the replica asks them one after the other.
struct Both(KvmDirtyLog, RegionLog);

impl DirtyLog for Both {
    fn name(&self) -> &str {
        "KVM and vm-memory"
    }

    fn start(&mut self, ram: &[multifd_engine::RamBlock]) -> Result<(), multifd_engine::DirtyLogError> {
        self.0.start(ram).and_then(|()| self.1.start(ram))
    }

    fn covers(&self, block: &multifd_engine::RamBlock) -> multifd_engine::Coverage {
        self.1.covers(block)
    }

    fn sync(
        &mut self,
        bitmaps: &[Arc<multifd_engine::DirtyBitmap>],
    ) -> Result<(), multifd_engine::DirtyLogError> {
        self.0.sync(bitmaps).and_then(|()| self.1.sync(bitmaps))
    }

    fn stop(&mut self) {
        self.0.stop();
        self.1.stop();
    }
}

#[test]
fn three_back_ends_and_a_vcpu_in_one_bitmap() {
    if !std::path::Path::new("/dev/kvm").exists() {
        return skipped("there is no /dev/kvm").unwrap();
    }
    let memory = memory();
    let guest = KvmGuest::new(&blocks(&memory)[0]).unwrap();
    let slot = guest.add_memory().unwrap();
    guest.load().unwrap();
    let mut vcpu = guest.add_vcpu(0, Pace { lap: 50, pause: 20 }).unwrap();
    // SAFETY: the VM has this one slot, as `add_memory` made it, for as long as the log lives.
    let kvm = unsafe { KvmDirtyLog::new(Arc::clone(&guest.vm), vec![slot]) };
    let mut log = Both(kvm, RegionLog::of_guest_memory(&memory).unwrap());
    nothing_is_lost(&memory, &mut log, |_| assert_eq!(run(&mut vcpu).unwrap(), Exit::Lap));
    let counted = guest.counted(0).unwrap();
    assert!(counted == ROUNDS as u64 * 50 && guest.sum(0).unwrap() == counted, "the guest counts right");
}
