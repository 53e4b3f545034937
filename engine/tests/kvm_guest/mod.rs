//! A guest for KVM that fits a page: no firmware, no operating system, no interrupts. Each of its
//! vCPUs counts.
//!
//! ```text
//!   0x1000  page tables: the first GiB, mapped to itself by 2 MiB pages, for user mode
//!   0x4000  the program
//!   0x5000  one counter a vCPU
//!   half    data: 512 counters in each page, of which a vCPU owns one
//! ```
//!
//! The program adds one to the vCPU's counter in a random page of the data, half of the time a page
//! of the hot first 64th, then one to its counter at 0x5000; every `lap` times it leaves by an OUT.
//! So at each exit the counters in the data add up to the counter at 0x5000.
//!
//! It runs in user mode (CPL 3), where no hypervisor has to emulate it: on a host that is a guest
//! itself this is hundreds of times faster. It never faults, so it needs no interrupt table.
#![expect(unsafe_code, reason = "memory is given to a VM by address")]

use std::error::Error;
use std::ops::Range;
use std::sync::Arc;

use kvm_bindings::{
    KVM_EXIT_DIRTY_RING_FULL, KVM_MAX_CPUID_ENTRIES, kvm_regs, kvm_segment, kvm_sregs,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use multifd_engine::vm_memory::{Bytes, GuestAddress};
use multifd_engine::{KvmSlot, PAGE, RamBlock};

type Result<T, E = Box<dyn Error + Send + Sync>> = std::result::Result<T, E>;

const PAGE_TABLES: u64 = 0x1000;
const PROGRAM: u64 = 0x4000;
const COUNTERS: u64 = 0x5000;

/// rbx: state of a random generator. r8: the vCPU's counter in the first page of data. r9, r10:
/// masks of all pages and of the hot ones. r12: its counter. rcx, r13: additions left and in a lap.
/// r15: turns of the pause.
const CODE: &[u8] = &[
    0x48, 0x89, 0xd8, //             again: mov rax, rbx      xorshift
    0x48, 0xc1, 0xe0, 0x0d, //              shl rax, 13
    0x48, 0x31, 0xc3, //                    xor rbx, rax
    0x48, 0x89, 0xd8, //                    mov rax, rbx
    0x48, 0xc1, 0xe8, 0x07, //              shr rax, 7
    0x48, 0x31, 0xc3, //                    xor rbx, rax
    0x48, 0x89, 0xd8, //                    mov rax, rbx
    0x48, 0xc1, 0xe0, 0x11, //              shl rax, 17
    0x48, 0x31, 0xc3, //                    xor rbx, rax
    0x48, 0x89, 0xd8, //                    mov rax, rbx
    0x4c, 0x21, 0xc8, //                    and rax, r9
    0x48, 0x0f, 0xba, 0xe3, 0x32, //        bt rbx, 50
    0x72, 0x03, //                          jc anywhere
    0x4c, 0x21, 0xd0, //                    and rax, r10
    0x48, 0xc1, 0xe0, 0x0c, //    anywhere: shl rax, 12
    0x4c, 0x01, 0xc0, //                    add rax, r8
    0x48, 0xff, 0x00, //                    inc qword ptr [rax]
    0x49, 0xff, 0x04, 0x24, //              inc qword ptr [r12]
    0x4c, 0x89, 0xfa, //                    mov rdx, r15
    0x48, 0xff, 0xca, //             pause: dec rdx
    0x75, 0xfb, //                          jnz pause
    0x48, 0xff, 0xc9, //                    dec rcx
    0x75, 0xb7, //                          jnz again
    0x4c, 0x89, 0xe9, //                    mov rcx, r13
    0xe6, 0x10, //                          out 0x10, al
    0xeb, 0xb0, //                          jmp again
];

/// How the guest spends its time.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pace {
    /// Additions between two exits.
    pub(crate) lap: u64,
    /// Turns of an empty loop after each addition, at least 1.
    pub(crate) pause: u64,
}

/// A VM and its memory.
pub(crate) struct KvmGuest {
    pub(crate) vm: Arc<VmFd>,
    kvm: Kvm,
    ram: RamBlock,
}

/// Why a vCPU left its guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Exit {
    /// A lap is done.
    Lap,
    /// Its dirty ring is full.
    RingFull,
    /// A signal came.
    Interrupted,
}

impl KvmGuest {
    /// A VM without memory or vCPUs. `ram`: its length a power of two from 1 MiB to 1 GiB.
    pub(crate) fn new(ram: &RamBlock) -> Result<Self> {
        let kvm = Kvm::new()?;
        let vm = kvm.create_vm()?;
        // Some Intel CPUs need three pages out of the guest's sight.
        vm.set_tss_address(0xfffb_d000)?;
        Ok(Self { vm: Arc::new(vm), kvm, ram: ram.clone() })
    }

    /// Shows the guest all its memory, in slot 0.
    pub(crate) fn add_memory(&self) -> Result<KvmSlot> {
        self.add_slot(0, 0..self.ram.used_len(), 0)
    }

    /// Shows the guest a part of its memory, where it belongs. Returns the slot as a dirty log
    /// wants it.
    pub(crate) fn add_slot(&self, slot: u32, part: Range<u64>, flags: u32) -> Result<KvmSlot> {
        let memory_size = part.end - part.start;
        let memory = self.ram.memory().slice(address(part.start)?, address(memory_size)?);
        let memory = memory.ok_or("not in memory")?;
        let region = kvm_userspace_memory_region {
            slot,
            flags,
            guest_phys_addr: part.start,
            memory_size,
            userspace_addr: memory.ptr_guard_mut().as_ptr() as u64,
        };
        // SAFETY: the memory is mapped for as long as `ram` lives; guests only run through vCPUs
        // that are used before this guest is dropped.
        unsafe { self.vm.set_user_memory_region(region) }?;
        Ok(KvmSlot::new(slot, GuestAddress(part.start), &self.ram).part(part).flags(flags))
    }

    /// Writes the program and its page tables into the memory: not at a destination, where they
    /// arrive.
    pub(crate) fn load(&self) -> Result<()> {
        let memory = self.ram.memory();
        let all = memory.slice(0, memory.len()).ok_or("no memory")?;
        // Present, writable, user; accessed and dirty as if used already.
        all.write_obj((PAGE_TABLES + 0x1000) | 0x27, address(PAGE_TABLES)?)?;
        all.write_obj((PAGE_TABLES + 0x2000) | 0x27, address(PAGE_TABLES + 0x1000)?)?;
        for entry in 0..512_u64 {
            all.write_obj(entry << 21 | 0xe7, address(PAGE_TABLES + 0x2000 + entry * 8)?)?;
        }
        Ok(all.write_slice(CODE, address(PROGRAM)?)?)
    }

    /// A vCPU at the program's start. `number` < 512, another for each.
    pub(crate) fn add_vcpu(&self, number: u64, pace: Pace) -> Result<VcpuFd> {
        let vcpu = self.vm.create_vcpu(number)?;
        vcpu.set_cpuid2(&self.kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?)?;
        let mut sregs = vcpu.get_sregs()?;
        user_mode(&mut sregs);
        vcpu.set_sregs(&sregs)?;
        let pages = self.data_pages();
        vcpu.set_regs(&kvm_regs {
            rip: PROGRAM,
            rflags: 0x3002, // OUT is allowed
            rbx: (number + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15),
            rcx: pace.lap,
            r8: self.data() + number * 8,
            r9: pages - 1,
            r10: (pages / 64).max(1) - 1,
            r12: COUNTERS + number * 8,
            r13: pace.lap,
            r15: pace.pause,
            ..kvm_regs::default()
        })?;
        Ok(vcpu)
    }

    /// What vCPU `number` has counted.
    pub(crate) fn counted(&self, number: u64) -> Result<u64> {
        self.read(COUNTERS + number * 8)
    }

    /// The sum of its counters in the data.
    pub(crate) fn sum(&self, number: u64) -> Result<u64> {
        (0..self.data_pages()).map(|page| self.read(self.data() + page * PAGE as u64 + number * 8)).sum()
    }

    fn data(&self) -> u64 {
        self.ram.used_len() / 2
    }

    fn data_pages(&self) -> u64 {
        self.data() / PAGE as u64
    }

    fn read(&self, at: u64) -> Result<u64> {
        let slice = self.ram.memory().slice(address(at)?, 8).ok_or("not in memory")?;
        Ok(slice.read_obj(0)?)
    }
}

/// Runs a vCPU until something happens.
pub(crate) fn run(vcpu: &mut VcpuFd) -> Result<Exit> {
    match vcpu.run() {
        Ok(VcpuExit::IoOut(0x10, _)) => Ok(Exit::Lap),
        Ok(VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL)) => Ok(Exit::RingFull),
        Ok(exit) => Err(format!("the guest left by {exit:?}").into()),
        Err(error) if [libc::EINTR, libc::EAGAIN].contains(&error.errno()) => Ok(Exit::Interrupted),
        Err(error) => Err(error.into()),
    }
}

fn user_mode(sregs: &mut kvm_sregs) {
    let data = kvm_segment {
        limit: u32::MAX,
        selector: 0x2b,
        type_: 3,
        present: 1,
        dpl: 3,
        db: 1,
        s: 1,
        g: 1,
        ..kvm_segment::default()
    };
    sregs.cs = kvm_segment { selector: 0x33, type_: 11, db: 0, l: 1, ..data };
    (sregs.ds, sregs.es, sregs.ss) = (data, data, data);
    sregs.cr0 = 0x8000_0033; // paging, protected mode
    sregs.cr3 = PAGE_TABLES;
    sregs.cr4 = 0x20; // physical address extension
    sregs.efer = 0x500; // long mode
}

fn address(at: u64) -> Result<usize> {
    Ok(usize::try_from(at)?)
}
