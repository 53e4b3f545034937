//! The programmable interval timer, and the speaker on it.

use crate::layout;

layout! {
    /// Three counters of an 8254.
    pub struct Pit = "i8254", version 3, minimum 2 {
        irq_disabled as "channels[0].irq_disabled": u32 => since 3;
        channels: [PitChannel; 3];
        next_transition_time as "channels[0].next_transition_time": i64;
    }
}

layout! {
    /// One counter.
    pub struct PitChannel = "pit channel", version 2 {
        count: i32;
        latched_count: u16;
        count_latched: u8;
        status_latched: u8;
        status: u8;
        read_state: u8;
        write_state: u8;
        write_latch: u8;
        rw_mode: u8;
        mode: u8;
        bcd: u8;
        gate: u8;
        count_load_time: i64;
        next_transition_time: i64;
    }
}

layout! {
    /// The speaker that counter 2 drives.
    pub struct Speaker = "pcspk", version 1 {
        data_on: u8;
        dummy_refresh_clock: u8;
    }
}
