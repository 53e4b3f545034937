//! Task priority for 32-bit guests.

use crate::{Unused, layout};

layout! {
    /// Task priority accesses of 32-bit Windows, patched.
    pub struct KvmVapic = "kvm-tpr-opt", version 1 {
        rom_state: KvmVapicRom;
        state: u32;
        real_tpr_addr: u32;
        rom_state_vaddr: u32;
        vapic_paddr: u32;
        rom_state_paddr: u32;
    }
}

layout! {
    /// What the option ROM says of itself.
    pub struct KvmVapicRom = "kvmvapic-guest-rom", version 1 {
        unused: Unused<8>;
        vaddr: u32;
        fixup_start: u32;
        fixup_end: u32;
        vapic_vaddr: u32;
        vapic_size: u32;
        vcpu_shift: u32;
        real_tpr_addr: u32;
        up: KvmVapicHandlers;
        mp: KvmVapicHandlers;
    }
}

layout! {
    /// Addresses of the routines that take the place of an access.
    pub struct KvmVapicHandlers = "kvmvapic-handlers", version 1 {
        set_tpr: u32;
        set_tpr_eax: u32;
        get_tpr: [u32; 8];
        get_tpr_stack: u32;
    }
}
