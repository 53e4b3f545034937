//! vCPUs, each on a thread of its own, that can be stopped between two laps.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};

use kvm_bindings::{kvm_regs, kvm_sregs};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};

use crate::Result;
use crate::guest::{self, Exit};

/// What of a vCPU moves: the program of this guest uses no more. A real VMM has a longer list.
#[derive(Serialize, Deserialize)]
pub(crate) struct VcpuState {
    regs: kvm_regs,
    sregs: kvm_sregs,
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
