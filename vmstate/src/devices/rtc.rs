//! The real-time clock.

use crate::{Buffer, Timer, Unused, layout};

layout! {
    /// A real-time clock with its CMOS memory.
    pub struct Rtc = "mc146818rtc", version 3, minimum 1 {
        cmos as "cmos_data": Buffer<128>;
        cmos_index: u8;
        unused_0 as "unused[0]": Unused<28>;
        periodic_timer: Timer;
        next_periodic_time: i64;
        unused_1 as "unused[1]": Unused<24>;
        irq_coalesced: u32 => since 2;
        period: u32 => since 2;
        base_rtc: u64 => since 3;
        last_update: u64 => since 3;
        offset: i64 => since 3;
        update_timer: Timer => since 3;
        next_alarm_time: u64 => since 3;
    }
    subsections {
        reinject: RtcReinject;
    }
}

layout! {
    /// Ticks that are made up for.
    pub struct RtcReinject = "mc146818rtc/irq_reinject_on_ack_count", version 1 {
        count as "irq_reinject_on_ack_count": u16;
    }
}
