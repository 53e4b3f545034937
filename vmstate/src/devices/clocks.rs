//! Clocks of the whole guest.

use crate::{Unused, layout};

layout! {
    /// Clock of the guest: what its time stands at while it is not running.
    pub struct GuestClock = "timer", version 2, minimum 1 {
        cpu_ticks_offset: i64;
        unused: Unused<8>;
        cpu_clock_offset: i64 => since 2;
    }
}

layout! {
    /// The paravirtual clock of KVM.
    pub struct KvmClock = "kvmclock", version 1 {
        clock: u64;
    }
    subsections {
        clock_is_reliable: KvmClockReliable;
    }
}

layout! {
    /// Whether the clock can be taken as it is.
    pub struct KvmClockReliable = "kvmclock/clock_is_reliable", version 1 {
        clock_is_reliable: bool;
    }
}
