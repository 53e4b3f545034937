//! Writes of vCPUs that KVM notes: a bitmap a memory slot, or a ring a vCPU.

mod log;
mod ring;
mod slot;
mod slots;
mod sys;

pub use log::KvmDirtyLog;
pub use ring::{KvmDirtyRing, KvmDirtyRings};
pub use slot::KvmSlot;
pub use slots::KvmSlots;
