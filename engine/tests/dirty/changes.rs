//! Memory that is emptied, unplugged, plugged and resized while it moves, under every log.
#![expect(unsafe_code, reason = "protection has no safe wrapper")]

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

use kvm_bindings::kvm_userspace_memory_region;
use multifd_engine::codecs::Zstd;
use multifd_engine::vm_memory::bitmap::AtomicBitmap;
use multifd_engine::vm_memory::{GuestAddress, GuestRegionMmap};
use multifd_engine::wire::Configuration;
use multifd_engine::{
    Arrived, Destination, DeviceState, DirtyMarker, Error, ErrorKind, HostMemory, PAGE, Precopy, RamBlock,
    RamChanges, RegionLog, SoftwareLog, Source, SourceBuilder, UserfaultLog,
};

use crate::kvm::{Guest, LEN};
use crate::memory::{advise, anonymous, block, memfd, store};

const PAGES: usize = 256;
const READ_WRITE: i32 = libc::PROT_READ | libc::PROT_WRITE;

/// What a page must be at the destination.
type Expected<'a> = &'a dyn Fn(usize) -> bool;

fn protect(memory: &HostMemory, pages: &Range<usize>, protection: i32) {
    let slice = memory.slice(pages.start * PAGE, pages.len() * PAGE).unwrap();
    // SAFETY: the range is mapped; what is protected is not touched by these tests.
    let done = unsafe { libc::mprotect(slice.ptr_guard_mut().as_ptr().cast(), slice.len(), protection) };
    assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
}

fn fill(ram: &[RamBlock], pages: Range<usize>, seed: usize) {
    for page in pages {
        let content: Vec<u8> =
            (0..PAGE).map(|at| u8::try_from((page * 31 + at + seed) % 255 + 1).unwrap()).collect();
        store(ram, 0, page * PAGE, &content);
    }
}

/// Moves `ram` while `meanwhile` happens, between rounds.
fn moved(
    ram: &[RamBlock],
    set: impl FnOnce(SourceBuilder) -> SourceBuilder,
    meanwhile: impl FnOnce(&mut Precopy),
) -> Result<Vec<RamBlock>, Error> {
    let there = [block(ram[0].name().as_str(), anonymous(ram[0].pages()))];
    let destination =
        Destination::builder(there.to_vec()).listen(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap();
    let to = destination.endpoint();
    let receiving =
        std::thread::Builder::new().spawn(move || destination.receive().and_then(Arrived::accept)).unwrap();
    let source = set(Source::builder(ram.to_vec(), Configuration::new("test-10.0")));
    let mut precopy = source.build()?.connect(&to)?;
    let result = precopy.round().map(drop).and_then(|()| {
        meanwhile(&mut precopy);
        precopy.stop_copy()?.commit(&DeviceState::none())
    });
    let received = receiving.join().unwrap();
    result.map(|_| received.unwrap())?;
    Ok(there.to_vec())
}

/// Pages that differ; of those that are not there, the destination has zeros.
fn differing(ram: &[RamBlock], there: &[RamBlock], is_there: Expected<'_>) -> Vec<usize> {
    let differs = |page: &usize| {
        let (mut here, mut arrived) = ([0; PAGE], [0; PAGE]);
        assert!(!is_there(*page) || ram[0].read_page(*page, &mut here));
        assert!(there[0].read_page(*page, &mut arrived));
        here != arrived
    };
    (0..ram[0].pages()).filter(differs).collect()
}

/// What a balloon, virtio-mem and the guest do between two rounds. `give_back`: MADV_DONTNEED or
/// MADV_REMOVE.
fn change(ram: &[RamBlock], changes: &RamChanges, give_back: i32, wrote: impl Fn(usize)) {
    let (memory, name) = (ram[0].memory(), ram[0].name());
    // A balloon, and a guest that uses one of the pages again.
    advise(memory, 8 * PAGE, 8 * PAGE, give_back);
    changes.emptied(name, 8..16).unwrap();
    fill(ram, 9..10, 5);
    wrote(9);
    // Unplugged, and plugged again in part.
    changes.unplug(name, 16..32).unwrap();
    advise(memory, 16 * PAGE, 16 * PAGE, give_back);
    protect(memory, &(16..32), libc::PROT_NONE);
    protect(memory, &(24..32), READ_WRITE);
    changes.plug(name, 24..32).unwrap();
    fill(ram, 30..31, 9);
    wrote(30);
    // Protected with what it holds, as a VMM that takes it for lost.
    changes.unplug(name, 100..120).unwrap();
    protect(memory, &(100..120), libc::PROT_NONE);
}

fn is_there(page: usize) -> bool {
    !(16..24).contains(&page) && !(100..120).contains(&page)
}

fn check(
    what: &str,
    memory: HostMemory,
    give_back: i32,
    log: impl FnOnce(&[RamBlock], SourceBuilder) -> (SourceBuilder, Option<DirtyMarker>),
    set: impl FnOnce(SourceBuilder) -> SourceBuilder,
) {
    let ram = [block("ram", memory)];
    fill(&ram, 0..PAGES, 1);
    let changes = RamChanges::new(&ram);
    changes.unplug(ram[0].name(), 200..210).unwrap();
    protect(ram[0].memory(), &(200..210), libc::PROT_NONE);
    let marker = std::cell::OnceCell::new();
    let there = moved(
        &ram,
        |builder| {
            let (builder, mark) = log(&ram, set(builder.ram_changes(&changes)));
            marker.set(mark).unwrap();
            builder
        },
        |precopy| {
            let wrote = |page: usize| {
                marker
                    .get()
                    .into_iter()
                    .flatten()
                    .for_each(|marker| marker.mark(0, (page * PAGE) as u64, PAGE as u64));
            };
            change(&ram, &changes, give_back, wrote);
            precopy.round().unwrap();
            advise(ram[0].memory(), 40 * PAGE, PAGE, give_back);
            changes.emptied(ram[0].name(), 40..41).unwrap();
        },
    );
    let there = there.unwrap_or_else(|error| panic!("{what}: {}", error.chain()));
    let is_there = |page| is_there(page) && !(200..210).contains(&page);
    assert_eq!(differing(&ram, &there, &is_there), [0; 0], "{what}");
}

fn kinds() -> [(&'static str, HostMemory, i32); 2] {
    [
        ("anonymous", anonymous(PAGES), libc::MADV_DONTNEED),
        ("memfd", memfd(PAGES * PAGE, 0).unwrap(), libc::MADV_REMOVE),
    ]
}

type Set = fn(SourceBuilder) -> SourceBuilder;

const WAYS: [Set; 3] = [
    |builder| builder,
    |builder| builder.channels(2),
    |builder| builder.channels(2).codec(std::sync::Arc::new(Zstd::level(1).unwrap())),
];

#[test]
fn what_is_taken_back_or_unplugged_arrives_as_zero_under_a_software_log() {
    for set in WAYS {
        for (what, memory, give_back) in kinds() {
            let log = |ram: &[RamBlock], builder: SourceBuilder| {
                let log = SoftwareLog::new(ram);
                let marker = log.marker();
                (builder.dirty_log(log), Some(marker))
            };
            check(what, memory, give_back, log, set);
        }
    }
}

#[test]
fn what_is_taken_back_or_unplugged_arrives_as_zero_under_a_userfaultfd() {
    if UserfaultLog::new().is_err() {
        return crate::skip::skipped("no userfaultfd here");
    }
    for set in WAYS {
        for (what, memory, give_back) in kinds() {
            let log = |_: &[RamBlock], builder: SourceBuilder| {
                (builder.dirty_log(UserfaultLog::new().unwrap()), None)
            };
            check(what, memory, give_back, log, set);
        }
    }
}

#[test]
fn what_is_taken_back_or_unplugged_arrives_as_zero_under_a_log_of_regions() {
    for set in WAYS {
        let region =
            GuestRegionMmap::<AtomicBitmap>::from_range(GuestAddress(0), PAGES * PAGE, None).unwrap();
        let memory = HostMemory::from_region(region.get_mmap()).unwrap();
        let log = |ram: &[RamBlock], builder: SourceBuilder| {
            let regions = RegionLog::new().region(ram[0].name().clone(), region.get_mmap());
            // For the writes of this test, which go past vm-memory.
            let software = SoftwareLog::new(ram);
            let marker = software.marker();
            (builder.dirty_log(regions).dirty_log(software), Some(marker))
        };
        check("regions", memory, libc::MADV_DONTNEED, log, set);
    }
}

/// The balloon takes pages that the vCPU has written and writes again; the slots' memory is a
/// memfd.
#[test]
fn pages_that_a_balloon_takes_from_a_kvm_guest_arrive_as_zero() {
    let upper = LEN / 2 / PAGE..LEN / PAGE;
    let balloon = |guest: &Guest, changes: &RamChanges, precopy: &mut Precopy| {
        for lap in 0..4 {
            guest.lap(0);
            let first = upper.start + lap * 64;
            advise(guest.ram[0].memory(), first * PAGE, 64 * PAGE, libc::MADV_REMOVE);
            changes.emptied(guest.ram[0].name(), first..first + 64).unwrap();
            guest.lap(1);
            precopy.round().unwrap();
        }
        guest.lap(0);
    };
    let Some(guest) = Guest::new(None) else { return };
    guest.lap(0);
    let changes = RamChanges::new(&guest.ram);
    let set = |builder: SourceBuilder| builder.dirty_log(guest.log()).ram_changes(&changes);
    let there = moved(&guest.ram, set, |precopy| balloon(&guest, &changes, precopy)).unwrap();
    assert_eq!(differing(&guest.ram, &there, &|_| true), [0; 0]);

    let Some(guest) = Guest::new(Some(4096)) else { return };
    guest.lap(0);
    let changes = RamChanges::new(&guest.ram);
    let set = |builder: SourceBuilder| builder.dirty_log(guest.ring_log()).ram_changes(&changes);
    let there = moved(&guest.ram, set, |precopy| balloon(&guest, &changes, precopy)).unwrap();
    assert_eq!(differing(&guest.ram, &there, &|_| true), [0; 0]);
}

/// Firecracker's order: the slot goes first, then its memory is protected.
#[test]
fn memory_that_is_unplugged_from_a_kvm_guest_arrives_as_zero() {
    const HALF: u64 = (LEN / 2) as u64;
    let halves = |guest: &crate::kvm_guest::KvmGuest| {
        vec![guest.add_slot(0, 0..HALF, 0).unwrap(), guest.add_slot(1, HALF..2 * HALF, 0).unwrap()]
    };
    let upper = LEN / 2 / PAGE..LEN / PAGE;
    let Some(guest) = Guest::with_memory(None, halves) else { return };
    let (log, changes) = (guest.log(), RamChanges::new(&guest.ram));
    let slots = log.slots();
    let set = |builder: SourceBuilder| builder.channels(2).dirty_log(log).ram_changes(&changes);
    let there = moved(&guest.ram, set, |precopy| {
        guest.lap(0);
        assert!(slots.removing(1));
        let gone = kvm_userspace_memory_region { slot: 1, ..Default::default() };
        // SAFETY: takes memory away from a guest whose vCPUs do not run any more.
        unsafe { guest.guest.vm.set_user_memory_region(gone) }.unwrap();
        changes.unplug(guest.ram[0].name(), upper.clone()).unwrap();
        protect(guest.ram[0].memory(), &upper, libc::PROT_NONE);
        precopy.round().unwrap();
    });
    assert_eq!(differing(&guest.ram, &there.unwrap(), &|page| !upper.contains(&page)), [0; 0]);
}

/// The memory holds data and is protected while workers read: a load after `unplug` has returned
/// would end this process.
#[test]
fn no_worker_reads_what_was_unplugged() {
    for set in WAYS {
        let ram = [block("ram", anonymous(PAGES))];
        fill(&ram, 0..PAGES, 3);
        let changes = RamChanges::new(&ram);
        let log = SoftwareLog::new(&ram);
        let marker = log.marker();
        let set = |builder: SourceBuilder| set(builder.dirty_log(log)).ram_changes(&changes);
        let there = moved(&ram, set, |precopy| {
            let end = AtomicBool::new(false);
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    while !end.load(Ordering::Relaxed) {
                        for part in [0..PAGES / 2, PAGES / 2..PAGES] {
                            changes.unplug(ram[0].name(), part.clone()).unwrap();
                            protect(ram[0].memory(), &part, libc::PROT_NONE);
                            protect(ram[0].memory(), &part, READ_WRITE);
                            changes.plug(ram[0].name(), part).unwrap();
                        }
                    }
                });
                let rounds = (0..100).try_for_each(|_| {
                    marker.mark(0, 0, (PAGES * PAGE) as u64);
                    precopy.round().map(drop)
                });
                end.store(true, Ordering::Relaxed);
                rounds.unwrap();
            });
        });
        assert_eq!(differing(&ram, &there.unwrap(), &|_| true), [0; 0]);
    }
}

#[test]
fn a_block_that_is_resized_ends_the_migration_with_both_sizes() {
    for (bytes, last) in [(PAGES * PAGE / 2, false), (2 * PAGES * PAGE, false), (PAGES * PAGE / 2, true)] {
        let ram = [block("pc.ram", anonymous(PAGES))];
        fill(&ram, 0..PAGES, 3);
        let changes = RamChanges::new(&ram);
        let mut seen = None;
        let set = |builder: SourceBuilder| builder.dirty_log(SoftwareLog::new(&ram)).ram_changes(&changes);
        let result = moved(&ram, set, |precopy| {
            changes.resized(ram[0].name(), bytes as u64).unwrap();
            if bytes < PAGES * PAGE {
                protect(ram[0].memory(), &(PAGES / 2..PAGES), libc::PROT_NONE);
            }
            if !last {
                seen = precopy.round().err();
            }
        });
        let error = seen.or(result.err()).unwrap();
        assert_eq!(error.kind(), ErrorKind::GuestMemory, "{}", error.chain());
        assert!(error.source_may_resume());
        let text = format!("RAM block pc.ram was resized from {} to {bytes} bytes", PAGES * PAGE);
        assert!(error.to_string().contains(&text), "{error}");
    }
}
