//! The memory of a guest, and how its pages are written and read.
#![allow(clippy::unwrap_used, reason = "test code may panic")]

use std::fs::File;

use multifd_engine::vm_memory::Bytes;
use multifd_engine::{HostMemory, PAGE, RamBlock};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

pub(crate) const BLOCKS: [(&str, usize); 2] = [("pc.ram", 2048), ("vga.vram", 300)];

pub(crate) fn memory(memfd: bool) -> Vec<RamBlock> {
    BLOCKS
        .map(|(name, pages)| {
            let memory = if memfd {
                let file = File::from(memfd_create("ram", MemfdFlags::CLOEXEC).unwrap());
                ftruncate(&file, (pages * PAGE) as u64).unwrap();
                HostMemory::map_file(file, pages * PAGE).unwrap()
            } else {
                HostMemory::anonymous(pages * PAGE).unwrap()
            };
            RamBlock::new(name.try_into().unwrap(), memory)
        })
        .to_vec()
}

/// Blocks of whole huge pages of 2 MiB, of the machine's pool.
#[allow(dead_code, reason = "one of the suites has it")]
pub(crate) fn huge_memory() -> Vec<RamBlock> {
    HUGE_BLOCKS
        .map(|(name, pages)| {
            let file = File::from(memfd_create("ram", MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB).unwrap());
            ftruncate(&file, (pages * PAGE) as u64).unwrap();
            RamBlock::new(name.try_into().unwrap(), HostMemory::map_file(file, pages * PAGE).unwrap())
        })
        .to_vec()
}

/// Eight huge pages, and one.
#[allow(dead_code, reason = "as above")]
pub(crate) const HUGE_BLOCKS: [(&str, usize); 2] = [("pc.ram", 4096), ("vga.vram", 512)];

pub(crate) fn write(block: &RamBlock, page: usize, value: usize) {
    let bytes = ((value << 16 | page) as u64 | 1 << 63).to_le_bytes();
    block.memory().slice(page * PAGE, PAGE).unwrap().write_slice(&bytes.repeat(PAGE / 8), 0).unwrap();
}

/// Loads a page, as a vCPU would: a fault waits for it.
pub(crate) fn load(block: &RamBlock, page: usize) -> [u8; PAGE] {
    let mut bytes = [0; PAGE];
    block.memory().slice(page * PAGE, PAGE).unwrap().read_slice(&mut bytes, 0).unwrap();
    bytes
}
