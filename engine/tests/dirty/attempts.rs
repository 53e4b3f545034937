//! Attempts that fail, and what the next one, or the VMM itself, finds in the logs.
#![expect(unsafe_code, reason = "the slots given to a log must be true")]

use std::sync::Arc;
use std::thread::JoinHandle;

use kvm_bindings::KVM_MEM_LOG_DIRTY_PAGES;
use multifd_engine::vm_memory::bitmap::AtomicBitmap;
use multifd_engine::vm_memory::{Bytes, GuestAddress, GuestRegionMmap, MemoryRegionAddress};
use multifd_engine::wire::Configuration;
use multifd_engine::{
    Arrived, Destination, DeviceState, DirtyLog, Endpoint, HostMemory, KvmDirtyLog, PAGE, Precopy, RamBlock,
    RegionLog, Report, SoftwareLog, Source,
};

use crate::kvm::{Guest, LEN};
use crate::memory::{anonymous, block, store};

/// How an attempt ends before the guest has moved.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Ending {
    Dropped,
    Cancelled,
    /// The destination ends.
    Failed,
    /// The destination does not accept what has arrived.
    Refused,
}

const ENDINGS: [Ending; 4] = [Ending::Dropped, Ending::Cancelled, Ending::Failed, Ending::Refused];

struct There {
    to: Endpoint,
    receiving: JoinHandle<Result<Report, String>>,
}

fn listen(there: &[RamBlock], end: impl FnOnce(Arrived) -> Result<Report, String> + Send + 'static) -> There {
    let destination =
        Destination::builder(there.to_vec()).listen(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap();
    let to = destination.endpoint();
    let receive = move || destination.receive().map_err(|error| error.chain()).and_then(end);
    let receiving = std::thread::Builder::new().spawn(receive);
    There { to, receiving: receiving.unwrap() }
}

fn connect(ram: &[RamBlock], log: impl DirtyLog + 'static, to: &Endpoint) -> Precopy {
    let source = Source::builder(ram.to_vec(), Configuration::new("test-10.0")).dirty_log(log);
    source.channels(2).build().unwrap().connect(to).unwrap()
}

fn empty_copies(ram: &[RamBlock]) -> Vec<RamBlock> {
    ram.iter().map(|like| block(like.name().as_str(), anonymous(like.pages()))).collect()
}

/// Begins to move `ram`, lets `write` write between rounds, and fails.
fn fail(ending: Ending, ram: &[RamBlock], log: impl DirtyLog + 'static, write: impl Fn()) {
    let there = listen(&empty_copies(ram), |arrived| {
        drop(arrived);
        Err("refused".into())
    });
    let mut precopy = connect(ram, log, &there.to);
    precopy.round().unwrap();
    write();
    precopy.round().unwrap();
    match ending {
        Ending::Dropped => drop(precopy),
        Ending::Cancelled => {
            precopy.control().cancel();
            precopy.round().unwrap_err();
        }
        Ending::Failed => {
            // As a peer that goes away.
            precopy.canceller().close_channels();
            let failed = precopy.round().map(drop).and_then(|()| precopy.round().map(drop));
            failed.unwrap_err();
        }
        Ending::Refused => {
            let refused = precopy.stop_copy().and_then(|last| last.commit(&DeviceState::none()));
            assert!(refused.unwrap_err().source_may_resume());
        }
    }
    there.receiving.join().unwrap().unwrap_err();
}

/// Moves `ram`, lets `write` write between rounds; gives the pages that differ.
fn pages_lost(ram: &[RamBlock], log: impl DirtyLog + 'static, write: impl Fn()) -> Vec<usize> {
    let copies = empty_copies(ram);
    let there = listen(&copies, |arrived| arrived.accept().map_err(|error| error.chain()));
    let mut precopy = connect(ram, log, &there.to);
    precopy.round().unwrap();
    write();
    precopy.stop_copy().unwrap().commit(&DeviceState::none()).unwrap();
    there.receiving.join().unwrap().unwrap();
    let (mut here, mut arrived) = ([0; PAGE], [0; PAGE]);
    let differs = |page: &usize| {
        assert!(ram[0].read_page(*page, &mut here) && copies[0].read_page(*page, &mut arrived));
        here != arrived
    };
    (0..ram[0].pages()).filter(differs).collect()
}

/// A device's thread gets its marker when the VMM starts, and keeps it.
#[test]
fn a_marker_from_before_a_failed_attempt_is_heard_in_the_next() {
    for ending in ENDINGS {
        let ram = [block("ram", anonymous(64))];
        let log = SoftwareLog::new(&ram);
        let device = log.marker();
        let write = |page: usize| {
            store(&ram, 0, page * PAGE, &[7]);
            device.mark(0, (page * PAGE) as u64, 1);
        };
        fail(ending, &ram, log.clone(), || write(3));
        assert_eq!(pages_lost(&ram, log.clone(), || write(7)), [0; 0], "{ending:?}");
        assert_eq!(pages_lost(&ram, device.log(), || write(9)), [0; 0], "{ending:?}");
    }
}

/// A VMM makes diff snapshots from the bitmap that the migration reads.
#[test]
fn bits_of_a_region_are_there_again_after_a_failed_attempt() {
    for ending in ENDINGS {
        let region = GuestRegionMmap::<AtomicBitmap>::from_range(GuestAddress(0), 64 * PAGE, None).unwrap();
        let ram = [block("ram", HostMemory::from_region(region.get_mmap()).unwrap())];
        let log = RegionLog::new().region(ram[0].name().clone(), region.get_mmap());
        let write =
            |page: usize| region.write_slice(&[7], MemoryRegionAddress((page * PAGE) as u64)).unwrap();
        write(5);
        fail(ending, &ram, log.clone(), || write(9));
        let mapping = region.get_mmap();
        let dirty: Vec<_> = (0..64).filter(|page| mapping.bitmap().is_bit_set(*page)).collect();
        assert_eq!(dirty, [5, 9], "{ending:?}");
        assert_eq!(pages_lost(&ram, log, || write(11)), [0; 0], "{ending:?}");
    }
}

#[test]
fn pages_that_a_failed_attempt_took_from_kvm_are_offered_to_the_vmm() {
    for (manual, ending) in [(true, Ending::Dropped), (false, Ending::Dropped), (false, Ending::Failed)] {
        // The VMM has the slot logged for its own snapshots.
        let logged = |guest: &crate::kvm_guest::KvmGuest| {
            vec![guest.add_slot(0, 0..LEN as u64, KVM_MEM_LOG_DIRTY_PAGES).unwrap()]
        };
        let Some(guest) = Guest::with_memory(None, logged) else { return };
        let log = if manual { guest.log() } else { guest.log().without_manual_protect() };
        let slots = log.slots();
        assert_eq!(slots.taken(0), None);
        let before = content(&guest.ram[0]);
        guest.lap(0);
        fail(ending, &guest.ram, log.clone(), || guest.lap(1));
        let mut bits = slots.taken(0).unwrap();
        assert_eq!(slots.taken(0), None, "once");
        guest.lap(0);
        // What the VMM fetches now, and what it was given, are what has changed since its snapshot.
        let fetched = guest.guest.vm.get_dirty_log(0, LEN).unwrap();
        bits.iter_mut().zip(fetched).for_each(|(bits, fetched)| *bits |= fetched);
        let after = content(&guest.ram[0]);
        let changed: Vec<_> = (0..LEN / PAGE).filter(|page| before[*page] != after[*page]).collect();
        assert!(!changed.is_empty());
        for page in changed {
            assert!(
                bits[page / 64] >> (page % 64) & 1 == 1,
                "{manual} {ending:?}: page {page} is in no bitmap"
            );
        }
        assert_eq!(pages_lost(&guest.ram, log, || guest.lap(1)), [0; 0], "{manual} {ending:?}");
    }
}

fn content(block: &RamBlock) -> Vec<Vec<u8>> {
    let page = |page| {
        let mut content = vec![0; PAGE];
        assert!(block.read_page(page, &mut content));
        content
    };
    (0..block.pages()).map(page).collect()
}

/// Threads that plug memory keep their handle.
#[test]
fn slots_told_between_two_attempts_are_known_to_the_next() {
    const HALF: u64 = (LEN / 2) as u64;
    let lower = |guest: &crate::kvm_guest::KvmGuest| vec![guest.add_slot(0, 0..HALF, 0).unwrap()];
    let Some(guest) = Guest::with_memory(None, lower) else { return };
    let log: KvmDirtyLog = guest.log().hotplug(&guest.ram[0]);
    let slots = log.slots();
    fail(Ending::Dropped, &guest.ram, log.clone(), || ());
    let slot = guest.guest.add_slot(1, HALF..2 * HALF, 0).unwrap();
    // SAFETY: the slot as it was made.
    unsafe { slots.added(slot) }.unwrap();
    assert_eq!(pages_lost(&guest.ram, log, || guest.lap(0)), [0; 0]);

    let Some(guest) = Guest::with_memory(Some(4096), lower) else { return };
    let log = guest.ring_log().hotplug(&guest.ram[0]);
    let slots = log.slots();
    fail(Ending::Cancelled, &guest.ram, log.clone(), || ());
    let slot = guest.guest.add_slot(1, HALF..2 * HALF, 0).unwrap();
    // SAFETY: the slot as it was made.
    unsafe { slots.added(slot) }.unwrap();
    assert_eq!(pages_lost(&guest.ram, log, || guest.lap(0)), [0; 0]);
}

#[test]
fn one_log_does_not_serve_two_migrations_at_a_time() {
    let Some(guest) = Guest::new(None) else { return };
    let log = guest.log();
    let (mut first, mut second) = (log.clone(), log);
    first.start(&guest.ram).unwrap();
    assert_eq!(second.start(&guest.ram).unwrap_err().to_string(), "the log serves another migration");
    second.stop();
    guest.lap(0);
    let bitmaps = crate::memory::bitmaps(&guest.ram);
    first.sync(&bitmaps).unwrap();
    assert!(Arc::clone(&bitmaps[0]).count() > 0, "the log is still on");
    first.stop();
    second.start(&guest.ram).unwrap();
    second.stop();
}
