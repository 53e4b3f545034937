//! Logs that are told of writes.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use multifd_engine::conformance::{check_dirty_log, scribble};
use multifd_engine::vm_memory::bitmap::AtomicBitmap;
use multifd_engine::vm_memory::{Bytes, GuestAddress, GuestRegionMmap, MemoryRegionAddress};
use multifd_engine::{HostMemory, PAGE, RegionLog, SoftwareLog};

use crate::memory::{anonymous, block, store};

const RUNS: usize = 40;

#[test]
fn no_marked_write_is_lost() {
    let ram = [block("a", anonymous(3000)), block("b", anonymous(1001))];
    let mut log = SoftwareLog::new(&ram);
    let marker = log.marker();
    let writer = |seed| {
        let (ram, marker) = (&ram, &marker);
        move |running: &AtomicBool| {
            scribble(ram, seed, running, |block, offset, bytes| {
                store(ram, block, offset, bytes);
                marker.mark(block, offset as u64, bytes.len() as u64);
            });
        }
    };
    check_dirty_log(&mut log, &ram, RUNS, &[&writer(1), &writer(2), &writer(3)]);
}

#[test]
fn no_write_through_vm_memory_is_lost() {
    let region = |pages: usize| {
        GuestRegionMmap::<AtomicBitmap>::from_range(GuestAddress(0), pages * PAGE, None).unwrap()
    };
    let regions = [region(3000), region(1001)];
    let names = ["a", "b"];
    let ram: Vec<_> = names
        .iter()
        .zip(&regions)
        .map(|(name, region)| block(name, HostMemory::from_region(region.get_mmap()).unwrap()))
        .collect();
    let mut log = RegionLog::new();
    for (block, region) in ram.iter().zip(&regions) {
        log = log.region(block.name().clone(), region.get_mmap());
    }
    let writer = |seed| {
        let (ram, regions) = (&ram, &regions);
        move |running: &AtomicBool| {
            scribble(ram, seed, running, |block, offset, bytes| {
                regions[block].write_slice(bytes, MemoryRegionAddress(offset as u64)).unwrap();
            });
        }
    };
    check_dirty_log(&mut log, &ram, RUNS, &[&writer(1), &writer(2), &writer(3)]);
    assert!(Arc::strong_count(&regions[0].get_mmap()) >= 2, "the log keeps the regions");
}
