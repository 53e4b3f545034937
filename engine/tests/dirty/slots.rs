//! Memory slots that come, go and change while the guest moves.
#![expect(unsafe_code, reason = "the slots given to a log must be true")]

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use multifd_engine::vm_memory::GuestAddress;
use multifd_engine::wire::Configuration;
use multifd_engine::{
    Coverage, Destination, DeviceState, DirtyLog, ErrorKind, KvmSlot, KvmSlots, PAGE, RamBlock, Source,
    SourceBuilder,
};

use crate::kvm::{Guest, LEN};
use crate::kvm_guest::KvmGuest;
use crate::memory::{anonymous, bitmaps, block, memfd, pages};

const HALF: u64 = (LEN / 2) as u64;

/// The lower half of the memory in slot 0: program, page tables, counters. The data, in the upper
/// half, may come in slot 1.
fn lower_half(guest: &KvmGuest) -> Vec<KvmSlot> {
    vec![guest.add_slot(0, 0..HALF, 0).unwrap()]
}

fn both_halves(guest: &KvmGuest) -> Vec<KvmSlot> {
    vec![guest.add_slot(0, 0..HALF, 0).unwrap(), upper_half(guest)]
}

fn upper_half(guest: &KvmGuest) -> KvmSlot {
    guest.add_slot(1, HALF..2 * HALF, 0).unwrap()
}

fn remove(guest: &KvmGuest, slot: u32) {
    let region = kvm_userspace_memory_region { slot, ..Default::default() };
    // SAFETY: takes memory away from a guest whose vCPUs do not run.
    unsafe { guest.vm.set_user_memory_region(region) }.unwrap();
}

/// KVM refuses another length for a slot that is there, and makes one that is not.
fn is_there(guest: &KvmGuest, slot: u32) -> bool {
    let memory = anonymous(1);
    let region = kvm_userspace_memory_region {
        slot,
        flags: 0,
        guest_phys_addr: 1 << 32,
        memory_size: PAGE as u64,
        userspace_addr: memory.slice(0, PAGE).unwrap().ptr_guard().as_ptr() as u64,
    };
    // SAFETY: the guest knows nothing of this address, and the slot is removed before its memory is
    // unmapped.
    let made = unsafe { guest.vm.set_user_memory_region(region) }.is_ok();
    if made {
        remove(guest, slot);
    }
    !made
}

fn source(ram: &[RamBlock]) -> SourceBuilder {
    let machine = "test-10.0".to_owned();
    Source::builder(ram.to_vec(), Configuration::new(machine))
}

/// Moves the guest while `between` happens; gives the pages that differ at the destination.
fn moved(guest: &Guest, log: impl DirtyLog + 'static, between: impl FnOnce()) -> Vec<usize> {
    let there = [block("pc.ram", memfd(LEN, 0).unwrap())];
    let destination =
        Destination::builder(there.to_vec()).listen(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap();
    let to = destination.endpoint();
    let receiving =
        std::thread::Builder::new().spawn(move || destination.receive().unwrap().accept().unwrap());
    let mut precopy = source(&guest.ram).channels(2).dirty_log(log).build().unwrap().connect(&to).unwrap();
    precopy.round().unwrap();
    between();
    precopy.round().unwrap();
    guest.lap(0);
    precopy.stop_copy().unwrap().commit(&DeviceState::none()).unwrap();
    receiving.unwrap().join().unwrap();
    let (mut here, mut arrived) = ([0; PAGE], [0; PAGE]);
    let differs = |page: &usize| {
        assert!(guest.ram[0].read_page(*page, &mut here) && there[0].read_page(*page, &mut arrived));
        here != arrived
    };
    (0..LEN / PAGE).filter(differs).collect()
}

#[test]
fn a_block_that_the_slots_show_in_part_is_refused() {
    let Some(guest) = Guest::with_memory(None, lower_half) else { return };
    let destination =
        Destination::builder(guest.ram.to_vec()).listen(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap();
    let to = destination.endpoint();
    let error = source(&guest.ram).dirty_log(guest.log()).build().unwrap().connect(&to).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::ApiMisuse);
    let text = "RAM block pc.ram: 2048 of 4096 pages are in no dirty log (2048..4096 first)";
    assert!(error.to_string().contains(text), "{error}");
}

#[test]
fn a_slot_that_is_plugged_while_the_guest_moves_arrives() {
    let plug = |guest: &Guest, slots: &KvmSlots| {
        let slot = upper_half(&guest.guest);
        // The guest writes before the log hears of the slot, and after.
        guest.lap(0);
        // SAFETY: the slot as it was made.
        unsafe { slots.added(slot) }.unwrap();
        guest.lap(0);
    };
    let Some(guest) = Guest::with_memory(None, lower_half) else { return };
    let log = guest.log().hotplug(&guest.ram[0]);
    let slots = log.slots();
    assert_eq!(moved(&guest, log, || plug(&guest, &slots)), [0; 0]);

    let Some(guest) = Guest::with_memory(Some(4096), lower_half) else { return };
    let log = guest.ring_log().hotplug(&guest.ram[0]);
    let slots = log.slots();
    assert_eq!(moved(&guest, log, || plug(&guest, &slots)), [0; 0]);
}

#[test]
fn a_slot_that_is_made_anew_with_notice_arrives() {
    let change = |guest: &Guest, slots: &KvmSlots| {
        guest.lap(0);
        assert!(slots.removing(1) && !slots.removing(1));
        remove(&guest.guest, 1);
        // SAFETY: the slot as it is made.
        unsafe { slots.added(upper_half(&guest.guest)) }.unwrap();
        guest.lap(0);
    };
    let Some(guest) = Guest::with_memory(None, both_halves) else { return };
    let log = guest.log();
    let slots = log.slots();
    assert_eq!(moved(&guest, log, || change(&guest, &slots)), [0; 0]);

    let Some(guest) = Guest::with_memory(Some(4096), both_halves) else { return };
    let log = guest.ring_log();
    let slots = log.slots();
    assert_eq!(moved(&guest, log, || change(&guest, &slots)), [0; 0]);
}

fn a_removed_slot_stays_away(guest: &Guest, log: &mut dyn DirtyLog, slots: &KvmSlots) {
    log.start(&guest.ram).unwrap();
    assert!(slots.removing(1));
    remove(&guest.guest, 1);
    let mut bitmaps = bitmaps(&guest.ram);
    log.sync(&bitmaps).unwrap();
    assert_eq!(pages(&mut bitmaps[0]), (LEN / 2 / PAGE..LEN / PAGE).collect::<Vec<_>>());
    log.stop();
    assert!(is_there(&guest.guest, 0) && !is_there(&guest.guest, 1));
}

#[test]
fn switching_the_log_off_makes_no_removed_slot_anew() {
    let Some(guest) = Guest::with_memory(None, both_halves) else { return };
    let mut log = guest.log();
    let slots = log.slots();
    a_removed_slot_stays_away(&guest, &mut log, &slots);

    let Some(guest) = Guest::with_memory(Some(4096), both_halves) else { return };
    let mut log = guest.ring_log();
    let slots = log.slots();
    a_removed_slot_stays_away(&guest, &mut log, &slots);
}

#[test]
fn a_slot_that_is_removed_without_notice_fails_the_migration_and_stays_away() {
    for manual in [true, false] {
        let Some(guest) = Guest::with_memory(None, both_halves) else { return };
        let mut log = if manual { guest.log() } else { guest.log().without_manual_protect() };
        log.start(&guest.ram).unwrap();
        remove(&guest.guest, 1);
        let error = log.sync(&bitmaps(&guest.ram)).unwrap_err();
        let text = "fetching the dirty log of KVM slot 0x1 of RAM block pc.ram: it was removed or made anew, and KvmSlots was \
                    not told";
        assert_eq!(error.to_string(), text);
        log.stop();
        assert!(is_there(&guest.guest, 0) && !is_there(&guest.guest, 1));
    }
}

#[test]
fn a_slot_that_is_removed_without_notice_is_missed_by_the_ring_too() {
    let Some(guest) = Guest::with_memory(Some(4096), both_halves) else { return };
    let mut log = guest.ring_log();
    log.start(&guest.ram).unwrap();
    log.sync(&bitmaps(&guest.ram)).unwrap();
    remove(&guest.guest, 1);
    let error = log.sync(&bitmaps(&guest.ram)).unwrap_err();
    let text = "KVM slot 0x1 of RAM block pc.ram was removed, and KvmSlots was not told";
    assert_eq!(error.to_string(), text);
    log.stop();
    assert!(is_there(&guest.guest, 0) && !is_there(&guest.guest, 1));
}

/// It has another length, and logs on its own: KVM would write past the end of a bitmap of the old
/// length.
#[test]
fn a_slot_that_is_made_anew_without_notice_fails_the_migration_and_stays_as_it_is() {
    let slot = |guest: &KvmGuest, part| guest.add_slot(1, part, KVM_MEM_LOG_DIRTY_PAGES).unwrap();
    let small = HALF..HALF + 64 * PAGE as u64;
    for (before, after, text) in [
        (small.clone(), HALF..2 * HALF, ": it has become longer, and KvmSlots was not told"),
        (HALF..2 * HALF, small, ": has it become shorter?"),
    ] {
        let memory = |guest: &KvmGuest| vec![guest.add_slot(0, 0..HALF, 0).unwrap(), slot(guest, before)];
        let Some(guest) = Guest::with_memory(None, memory) else { return };
        let mut log = guest.log();
        log.start(&guest.ram).unwrap();
        remove(&guest.guest, 1);
        slot(&guest.guest, after);
        let error = log.sync(&bitmaps(&guest.ram)).unwrap_err();
        assert!(error.to_string().ends_with(text), "{error}");
        log.stop();
        assert!(is_there(&guest.guest, 0) && is_there(&guest.guest, 1));
    }
}

#[test]
fn memory_that_does_not_migrate_and_is_plugged_fails_the_migration_and_stays() {
    let Some(guest) = Guest::new(None) else { return };
    let mut log = guest.log();
    let slots = log.slots();
    log.start(&guest.ram).unwrap();
    assert_eq!(log.covers(&guest.ram[0]), Coverage::Pages(std::iter::once(0..LEN / PAGE).collect()));
    let dimm = block("dimm1", anonymous(16));
    // SAFETY: not true, but KVM is not told of it.
    unsafe { slots.added(KvmSlot::new(7, GuestAddress(1 << 32), &dimm)) }.unwrap();
    assert!(slots.removing(7), "it came and went, and is not here for all that");
    let mut bitmaps = bitmaps(&guest.ram);
    let error = log.sync(&bitmaps).unwrap_err();
    assert_eq!(pages(&mut bitmaps[0]), [0; 0]);
    let text =
        "KVM slot 0x7 of RAM block dimm1 was added: noting writes to RAM block dimm1: it does not migrate";
    assert_eq!(error.to_string(), text);
    log.stop();
}
