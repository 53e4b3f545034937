//! A KVM guest with one vCPU, whose upper half of memory is unplugged and plugged while it moves.
#![expect(unsafe_code, reason = "slots are given to KVM and to its log by address")]

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use kvm_bindings::{kvm_regs, kvm_sregs, kvm_userspace_memory_region};
use kvm_ioctls::VcpuFd;
use multifd_engine::{HostMemory, KvmDirtyLog, KvmSlot, KvmSlots, RamBlock, SourceBuilder};

use crate::Result;
use crate::guest::Guest;
use crate::kvm_guest::{Exit, KvmGuest, Pace, run};
use crate::random::Random;

/// A few hundred pages a round.
const PACE: Pace = Pace { lap: 500, pause: 200 };

/// Laps between two changes of the slots.
const LAPS: u64 = 40;

/// The guest, and its vCPU where it is.
pub(crate) struct Vm {
    ram: RamBlock,
    guest: Arc<KvmGuest>,
    /// While it is paused.
    vcpu: Option<VcpuFd>,
    running: Option<JoinHandle<Result<VcpuFd>>>,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    laps: AtomicU64,
    /// Hears of slots that come and go while a log is on.
    slots: Mutex<Option<KvmSlots>>,
}

impl Vm {
    /// `ram` MiB, a power of two.
    pub(crate) fn new(ram: usize) -> Result<Self> {
        let memory = HostMemory::anonymous(ram.next_power_of_two() << 20)?;
        let mut vm = Self::with(RamBlock::new("pc.ram".try_into()?, memory))?;
        vm.guest.load()?;
        vm.run()?;
        Ok(vm)
    }

    fn with(ram: RamBlock) -> Result<Self> {
        let guest = KvmGuest::new(&ram)?;
        guest.add_slot(0, 0..ram.used_len() / 2, 0)?;
        add_upper_half(&guest, &ram)?;
        let vcpu = Some(guest.add_vcpu(0, PACE)?);
        Ok(Self { ram, guest: Arc::new(guest), vcpu, running: None, shared: Arc::default() })
    }
}

fn add_upper_half(guest: &KvmGuest, ram: &RamBlock) -> Result<KvmSlot> {
    guest.add_slot(1, ram.used_len() / 2..ram.used_len(), 0)
}

/// The guest loses the upper half of its memory, and gets it back; what is in it stays.
fn replug(guest: &KvmGuest, ram: &RamBlock, shared: &Shared) -> Result<()> {
    let slots = shared.slots.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(slots) = &*slots {
        slots.removing(1);
    }
    let none = kvm_userspace_memory_region { slot: 1, ..Default::default() };
    // SAFETY: takes memory away from a guest whose vCPU does not run.
    unsafe { guest.vm.set_user_memory_region(none) }?;
    let slot = add_upper_half(guest, ram)?;
    if let Some(slots) = &*slots {
        // SAFETY: the slot as it was made.
        unsafe { slots.added(slot) }?;
    }
    Ok(())
}

impl Guest for Vm {
    fn blocks(&self) -> Vec<RamBlock> {
        vec![self.ram.clone()]
    }

    fn log_into(&mut self, source: SourceBuilder, _: &mut Random) -> Result<SourceBuilder> {
        let half = self.ram.used_len() / 2;
        let slot = |id, part: std::ops::Range<u64>| {
            let at = multifd_engine::vm_memory::GuestAddress(part.start);
            KvmSlot::new(id, at, &self.ram).part(part)
        };
        let slots = vec![slot(0, 0..half), slot(1, half..2 * half)];
        // No slot changes between here and the handle that tells the log.
        let mut told = self.shared.slots.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: the VM has these slots, as `with` and `replug` make them; changes are told.
        let log = unsafe { KvmDirtyLog::new(Arc::clone(&self.guest.vm), slots) }.hotplug(&self.ram);
        *told = Some(log.slots());
        Ok(source.dirty_log(log))
    }

    fn run(&mut self) -> Result<()> {
        let mut vcpu = self.vcpu.take().ok_or("the vCPU runs")?;
        self.shared.stop.store(false, Ordering::Release);
        let (guest, ram, shared) = (Arc::clone(&self.guest), self.ram.clone(), Arc::clone(&self.shared));
        self.running = Some(std::thread::Builder::new().name("vcpu".to_owned()).spawn(move || {
            while !shared.stop.load(Ordering::Acquire) {
                if run(&mut vcpu)? == Exit::Lap
                    && shared.laps.fetch_add(1, Ordering::Relaxed) % LAPS == LAPS - 1
                {
                    replug(&guest, &ram, &shared)?;
                }
            }
            Ok(vcpu)
        })?);
        Ok(())
    }

    fn wait_for_writes(&self) -> Result<()> {
        let before = self.shared.laps.load(Ordering::Relaxed);
        while self.shared.laps.load(Ordering::Relaxed) < before + 2 {
            if self.running.as_ref().is_none_or(JoinHandle::is_finished) {
                return Err("the vCPU has ended".into());
            }
            std::thread::yield_now();
        }
        Ok(())
    }

    fn pause(&mut self) -> Result<()> {
        self.shared.stop.store(true, Ordering::Release);
        if let Some(running) = self.running.take() {
            let mut vcpu = running.join().map_err(|_| "the vCPU's thread panicked")??;
            // It left in the middle of an OUT, which the next entry completes: this makes it a
            // short one.
            vcpu.set_kvm_immediate_exit(1);
            let _interrupted = vcpu.run();
            vcpu.set_kvm_immediate_exit(0);
            self.vcpu = Some(vcpu);
        }
        if self.guest.counted(0)? != self.guest.sum(0)? {
            let (counted, sum) = (self.guest.counted(0)?, self.guest.sum(0)?);
            return Err(format!("the vCPU has counted {counted}, its pages add up to {sum}").into());
        }
        Ok(())
    }

    fn state(&self) -> Result<Vec<u8>> {
        let vcpu = self.vcpu.as_ref().ok_or("the vCPU runs")?;
        Ok(serde_json::to_vec(&(vcpu.get_regs()?, vcpu.get_sregs()?))?)
    }

    fn arrive(self, blocks: &[RamBlock], state: &[u8]) -> Result<Self> {
        let vm = Self::with(blocks.first().ok_or("no RAM")?.clone())?;
        let (regs, sregs): (kvm_regs, kvm_sregs) = serde_json::from_slice(state)?;
        let vcpu = vm.vcpu.as_ref().ok_or("no vCPU")?;
        vcpu.set_sregs(&sregs)?;
        vcpu.set_regs(&regs)?;
        Ok(vm)
    }
}
