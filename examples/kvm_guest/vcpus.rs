//! vCPUs, each on a thread of its own, that can be stopped between two laps.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuFd;
use multifd_engine::{DeviceState, SectionHead};
use multifd_vmstate::{Description, Device, Devices, Error, Fields, Section};

use crate::Result;
use crate::guest::{self, Exit};

/// What of a vCPU moves: the program of this guest uses no more. A real VMM has a longer list.
#[derive(Clone, Default)]
pub(crate) struct VcpuState {
    regs: kvm_regs,
    sregs: kvm_sregs,
}

/// Passes fields of the same names.
macro_rules! fields {
    ($fields:ident, $of:expr, $($name:ident)*) => { $($fields.field(stringify!($name), &mut $of.$name)?;)* };
}

impl Device for VcpuState {
    const DESCRIPTION: Description = Description::new("vcpu", 1);

    fn fields(&mut self, f: &mut Fields<'_>) -> std::result::Result<(), Error> {
        fields!(f, self.regs, rax rbx rcx rdx rsi rdi rsp rbp r8 r9 r10 r11 r12 r13 r14 r15 rip rflags);
        let sregs = &mut self.sregs;
        for (name, segment) in [
            ("cs", &mut sregs.cs),
            ("ds", &mut sregs.ds),
            ("es", &mut sregs.es),
            ("fs", &mut sregs.fs),
            ("gs", &mut sregs.gs),
            ("ss", &mut sregs.ss),
            ("tr", &mut sregs.tr),
            ("ldt", &mut sregs.ldt),
        ] {
            let mut part = Segment(*segment);
            f.field(name, &mut part)?;
            *segment = part.0;
        }
        f.field("gdt.base", &mut sregs.gdt.base)?;
        f.field("gdt.limit", &mut sregs.gdt.limit)?;
        f.field("idt.base", &mut sregs.idt.base)?;
        f.field("idt.limit", &mut sregs.idt.limit)?;
        fields!(f, sregs, cr0 cr2 cr3 cr4 cr8 efer apic_base interrupt_bitmap);
        Ok(())
    }
}

/// A segment register.
#[derive(Clone)]
struct Segment(kvm_segment);

impl Device for Segment {
    const DESCRIPTION: Description = Description::new("segment", 1);

    fn fields(&mut self, f: &mut Fields<'_>) -> std::result::Result<(), Error> {
        fields!(f, self.0, base limit selector type_ present dpl db s l g avl unusable);
        Ok(())
    }
}

/// The state of all vCPUs, ready to be sent.
pub(crate) fn save(states: &mut [VcpuState]) -> Result<DeviceState> {
    Ok(DeviceState::described(&devices(states).save()?))
}

/// The state of so many vCPUs, of which each must have come.
pub(crate) fn load(count: usize, sections: &[(SectionHead, &[u8])]) -> Result<Vec<VcpuState>> {
    let mut states = vec![VcpuState::default(); count];
    devices(&mut states).load(sections.iter().map(|(head, payload)| Section::of(head, payload)))?;
    Ok(states)
}

fn devices(states: &mut [VcpuState]) -> Devices<'_> {
    let vcpus = (0..).zip(states);
    vcpus.fold(Devices::new(), |devices, (number, state)| devices.with("vcpu", number, state))
}

impl VcpuState {
    fn save(vcpu: &mut VcpuFd) -> Result<Self> {
        // The vCPU left in the middle of an OUT: KVM completes it on the next entry, which this
        // makes a short one.
        vcpu.set_kvm_immediate_exit(1);
        let entered = guest::run(vcpu);
        vcpu.set_kvm_immediate_exit(0);
        if entered? != Exit::Interrupted {
            return Err(io::Error::other("the vCPU ran on").into());
        }
        Ok(Self { regs: vcpu.get_regs()?, sregs: vcpu.get_sregs()? })
    }

    pub(crate) fn load(&self, vcpu: &VcpuFd) -> Result<()> {
        vcpu.set_sregs(&self.sregs)?;
        Ok(vcpu.set_regs(&self.regs)?)
    }
}

/// vCPUs that run.
pub(crate) struct Vcpus {
    threads: Vec<JoinHandle<Result<VcpuState>>>,
    stop: Arc<AtomicBool>,
    /// Laps of each vCPU.
    laps: Vec<Arc<AtomicU64>>,
}

impl Vcpus {
    pub(crate) fn start(vcpus: Vec<VcpuFd>) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let laps: Vec<_> = vcpus.iter().map(|_| Arc::new(AtomicU64::new(0))).collect();
        let threads = vcpus.into_iter().zip(&laps).map(|(vcpu, laps)| {
            let (stop, laps) = (Arc::clone(&stop), Arc::clone(laps));
            thread::spawn(move || run_laps(vcpu, &stop, &laps))
        });
        Self { threads: threads.collect(), stop, laps }
    }

    /// Returns when no vCPU runs any more, with what each was at.
    pub(crate) fn pause(self) -> Result<Vec<VcpuState>> {
        self.stop.store(true, Ordering::Release);
        self.threads.into_iter().map(|thread| thread.join().map_err(|_| "a vCPU thread panicked")?).collect()
    }

    /// Waits until each vCPU has done that many more laps.
    pub(crate) fn wait_for_laps(&self, more: u64) {
        for laps in &self.laps {
            let enough = laps.load(Ordering::Relaxed) + more;
            while laps.load(Ordering::Relaxed) < enough {
                thread::yield_now();
            }
        }
    }
}

fn run_laps(mut vcpu: VcpuFd, stop: &AtomicBool, laps: &AtomicU64) -> Result<VcpuState> {
    while !stop.load(Ordering::Acquire) {
        if guest::run(&mut vcpu)? == Exit::Lap {
            laps.fetch_add(1, Ordering::Relaxed);
        }
    }
    VcpuState::save(&mut vcpu)
}
