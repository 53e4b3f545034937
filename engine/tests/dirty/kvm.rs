//! KVM's logs, under vCPUs that do not stop for them.
#![expect(unsafe_code, reason = "the slots given to a log must be true")]

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use kvm_bindings::{
    KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_INITIALLY_SET,
    KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, KVM_MEM_LOG_DIRTY_PAGES, kvm_enable_cap,
};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use multifd_engine::conformance::check_dirty_log;
use multifd_engine::{DirtyLog, KvmDirtyLog, KvmDirtyRing, KvmDirtyRings, KvmSlot, PAGE, RamBlock};

use crate::kvm_guest::{Exit, KvmGuest, Pace, run};
use crate::memory::{anonymous, bitmaps, block, memfd, pages};
use crate::skip::skipped;

pub(crate) const LEN: usize = 16 << 20;
const RUNS: usize = 40;
const COUNTER_PAGE: usize = 5;
/// Slow enough that a page is seldom written twice between two syncs.
const PACE: Pace = Pace { lap: 8, pause: 3000 };

pub(crate) struct Guest {
    pub(crate) guest: KvmGuest,
    pub(crate) ram: [RamBlock; 1],
    vcpus: Vec<Mutex<VcpuFd>>,
    rings: Option<KvmDirtyRings>,
    slots: Vec<KvmSlot>,
}

impl Guest {
    pub(crate) fn new(ring: Option<u32>) -> Option<Self> {
        Self::with_memory(ring, |guest| vec![guest.add_memory().unwrap()])
    }

    /// Says `skipped` and gives none where there is no KVM; with a number of entries, or no dirty
    /// rings.
    pub(crate) fn with_memory(
        ring: Option<u32>,
        add_memory: impl FnOnce(&KvmGuest) -> Vec<KvmSlot>,
    ) -> Option<Self> {
        let kvm = match Kvm::new() {
            Ok(kvm) => kvm,
            Err(error) => {
                skipped(&format!("/dev/kvm: {error}"));
                return None;
            }
        };
        if ring.is_some() && kvm.check_extension_raw(KVM_CAP_DIRTY_LOG_RING_ACQ_REL.into()) <= 0 {
            skipped("this KVM has no dirty rings");
            return None;
        }
        let ram = [block("pc.ram", memfd(LEN, 0).unwrap())];
        let guest = KvmGuest::new(&ram[0]).unwrap();
        let rings = ring.map(|entries| KvmDirtyRings::enable(Arc::clone(&guest.vm), entries).unwrap());
        let slots = add_memory(&guest);
        guest.load().unwrap();
        let vcpus: Vec<_> = (0..2).map(|number| guest.add_vcpu(number, PACE).unwrap()).collect();
        for vcpu in &vcpus {
            rings.iter().for_each(|rings| rings.add_vcpu(vcpu).unwrap());
        }
        Some(Self { guest, ram, vcpus: vcpus.into_iter().map(Mutex::new).collect(), rings, slots })
    }

    pub(crate) fn log(&self) -> KvmDirtyLog {
        // SAFETY: the guest's slots as they are.
        unsafe { KvmDirtyLog::new(Arc::clone(&self.guest.vm), self.slots.clone()) }
    }

    pub(crate) fn ring_log(&self) -> KvmDirtyRing {
        // SAFETY: the guest's slots as they are.
        unsafe { self.rings.as_ref().unwrap().log(self.slots.clone()) }
    }

    fn run(&self, vcpu: usize, running: &AtomicBool) {
        let mut vcpu = self.vcpus[vcpu].lock().unwrap();
        loop {
            match run(&mut vcpu).unwrap() {
                Exit::RingFull => self.rings.as_ref().unwrap().collect().unwrap(),
                Exit::Interrupted => {}
                Exit::Lap if running.load(Ordering::Relaxed) => {}
                Exit::Lap => break,
            }
        }
    }

    pub(crate) fn lap(&self, vcpu: usize) {
        self.run(vcpu, &AtomicBool::new(false));
    }

    fn check(&self, log: &mut dyn DirtyLog) {
        check_dirty_log(
            log,
            &self.ram,
            RUNS,
            &[&|running| self.run(0, running), &|running| {
                self.run(1, running);
            }],
        );
        for vcpu in 0..2 {
            assert!(self.guest.counted(vcpu).unwrap() > 0);
            assert_eq!(self.guest.counted(vcpu).unwrap(), self.guest.sum(vcpu).unwrap());
        }
    }
}

/// As a VMM does that uses the dirty log for itself.
fn all_dirty_at_first(vm: &VmFd) {
    let flags = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET;
    let cap = kvm_enable_cap {
        cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
        args: [flags.into(), 0, 0, 0],
        ..Default::default()
    };
    vm.enable_cap(&cap).unwrap();
}

#[test]
fn no_write_of_a_vcpu_is_lost_by_the_bitmap() {
    let Some(guest) = Guest::new(None) else { return };
    guest.check(&mut guest.log());
}

#[test]
fn no_write_of_a_vcpu_is_lost_where_kvm_clears_by_itself() {
    let Some(guest) = Guest::new(None) else { return };
    guest.check(&mut guest.log().without_manual_protect());
}

/// Two slots that meet in the middle of a word of the block's bitmap, and log already, with
/// everything dirty.
fn two_slots(guest: &KvmGuest) -> Vec<KvmSlot> {
    all_dirty_at_first(&guest.vm);
    let cut = (LEN / 2 + 3 * PAGE) as u64;
    let slot = |id, part| guest.add_slot(id, part, KVM_MEM_LOG_DIRTY_PAGES).unwrap();
    vec![slot(5, cut..LEN as u64), slot(2, 0..cut)]
}

#[test]
fn no_write_of_a_vcpu_is_lost_with_slots_that_log_already() {
    let Some(guest) = Guest::with_memory(None, two_slots) else { return };
    guest.check(&mut guest.log());
}

#[test]
fn no_write_of_a_vcpu_is_lost_by_the_ring() {
    // The smallest ring there is, so that it runs full.
    let Some(guest) = Guest::new(Some(1024)) else { return };
    let mut log = guest.ring_log();
    guest.check(&mut log);
}

/// The pages that a lap of vCPU 0 changes.
fn changed_by_a_lap(guest: &Guest) -> Vec<usize> {
    let page = |page| {
        let mut bytes = [0; PAGE];
        assert!(guest.ram[0].read_page(page, &mut bytes));
        bytes
    };
    let before: Vec<_> = (0..LEN / PAGE).map(page).collect();
    guest.lap(0);
    (0..LEN / PAGE).filter(|number| before[*number] != page(*number)).collect()
}

fn reports_exactly_what_changed(guest: &Guest, log: &mut dyn DirtyLog) {
    // Not the only block that migrates.
    let ram = [block("other", anonymous(1)), guest.ram[0].clone()];
    let mut bitmaps = bitmaps(&ram);
    for _ in 0..2 {
        guest.lap(0);
        log.start(&ram).unwrap();
        for _ in 0..20 {
            let changed = changed_by_a_lap(guest);
            log.sync(&bitmaps).unwrap();
            let reported = pages(&mut bitmaps[1]);
            assert!(changed.len() > 2 && changed.contains(&COUNTER_PAGE));
            assert_eq!(reported, changed);
        }
        log.sync(&bitmaps).unwrap();
        assert_eq!(pages(&mut bitmaps[1]), [0; 0]);
        log.stop();
    }
}

#[test]
fn the_bitmap_reports_exactly_what_changed() {
    let Some(guest) = Guest::new(None) else { return };
    reports_exactly_what_changed(&guest, &mut guest.log());
    reports_exactly_what_changed(&guest, &mut guest.log().without_manual_protect());
    reports_exactly_what_changed(&guest, &mut guest.log());
}

#[test]
fn slots_report_to_their_part_of_their_block() {
    let Some(guest) = Guest::with_memory(None, two_slots) else { return };
    reports_exactly_what_changed(&guest, &mut guest.log());
    let Some(guest) = Guest::with_memory(Some(4096), two_slots) else { return };
    reports_exactly_what_changed(&guest, &mut guest.ring_log());
}

#[test]
fn the_ring_reports_exactly_what_changed() {
    let Some(guest) = Guest::new(Some(4096)) else { return };
    let mut log = guest.ring_log();
    reports_exactly_what_changed(&guest, &mut log);
}

#[test]
fn a_full_ring_keeps_its_pages_until_the_sync() {
    let Some(guest) = Guest::new(Some(1024)) else { return };
    let rings = guest.rings.as_ref().unwrap();
    let mut log = guest.ring_log();
    let mut bitmaps = bitmaps(&guest.ram);
    let mut vcpu = guest.vcpus[0].lock().unwrap();
    log.start(&guest.ram).unwrap();
    let mut full = 0;
    for _ in 0..5000 {
        if run(&mut vcpu).unwrap() == Exit::RingFull {
            full += 1;
            rings.collect().unwrap();
        }
    }
    assert!(full > 0);
    log.sync(&bitmaps).unwrap();
    let reported = pages(&mut bitmaps[0]);
    let data = LEN / 2 / PAGE;
    assert!(reported.iter().filter(|page| **page >= data).count() > 1024, "{} pages", reported.len());

    let mut other = guest.ring_log();
    let error = other.start(&guest.ram).unwrap_err();
    assert_eq!(error.to_string(), "the VM's dirty rings serve another migration");
    other.stop();
    run(&mut vcpu).unwrap();
    log.sync(&bitmaps).unwrap();
    assert!(pages(&mut bitmaps[0]).contains(&COUNTER_PAGE), "the first goes on");
    log.stop();
    other.start(&guest.ram).unwrap();
    other.stop();
}

#[test]
fn a_slot_that_is_no_part_of_its_block_is_refused() {
    let Some(guest) = Guest::new(None) else { return };
    for (start, end) in [(1, 4097), (4096, 4096), (8192, 4096), (0, (LEN + PAGE) as u64)] {
        let text = format!(
            "KVM slot 0x0 of RAM block pc.ram: bytes {start}..{end} of 16777216, expected whole pages of it"
        );
        // SAFETY: refused before KVM is told.
        let mut log = unsafe {
            KvmDirtyLog::new(Arc::clone(&guest.guest.vm), vec![guest.slots[0].clone().part(start..end)])
        };
        assert_eq!(log.start(&guest.ram).unwrap_err().to_string(), text);
        log.stop();
    }
}

/// A length that is not the slot's would have KVM write past the log's buffer.
#[test]
fn a_slot_of_another_length_is_refused_by_kvm() {
    let Some(guest) = Guest::new(None) else { return };
    // SAFETY: not true, but refused.
    let mut log = unsafe {
        KvmDirtyLog::new(Arc::clone(&guest.guest.vm), vec![guest.slots[0].clone().part(0..0x1000)])
    };
    let error = log.start(&guest.ram).unwrap_err();
    assert_eq!(error.to_string(), "switching the dirty log of KVM slot 0x0 of RAM block pc.ram on");
    log.stop();
}

#[test]
fn a_vm_with_rings_says_why_it_has_no_bitmap() {
    let Some(guest) = Guest::new(Some(4096)) else { return };
    let error = guest.log().start(&guest.ram).unwrap_err();
    assert_eq!(error.to_string(), "fetching the dirty log of KVM slot 0x0 of RAM block pc.ram");
    let error = KvmDirtyRings::enable(Arc::clone(&guest.guest.vm), 3000).unwrap_err();
    assert_eq!(error.to_string(), "dirty rings of 3000 entries, expected a power of two up to 65536");
    let error = KvmDirtyRings::enable(Arc::clone(&guest.guest.vm), 4096).unwrap_err();
    assert_eq!(error.to_string(), "enabling dirty rings of 4096 entries", "the VM has vCPUs");
}
