//! Interrupt controllers.

use crate::{Unused, layout};

layout! {
    /// A local APIC.
    pub struct Apic = "apic", version 3 {
        apicbase: u32;
        id: u8;
        arb_id: u8;
        tpr: u8;
        spurious_vec: u32;
        log_dest: u8;
        dest_mode: u8;
        isr: [u32; 8];
        tmr: [u32; 8];
        irr: [u32; 8];
        lvt: [u32; 6];
        esr: u32;
        icr: [u32; 2];
        divide_conf: u32;
        count_shift: i32;
        initial_count: u32;
        initial_count_load_time: i64;
        next_time: i64;
        timer_expiry: i64;
    }
    subsections {
        sipi: ApicSipi;
    }
}

layout! {
    /// An I/O APIC.
    pub struct IoApic = "ioapic", version 3, minimum 1 {
        id: u8;
        ioregsel: u8;
        unused: Unused<8> => since 2;
        irr: u32 => since 2;
        ioredtbl: [u64; 24];
    }
}

layout! {
    /// One of the two 8259 interrupt controllers.
    pub struct Pic = "i8259", version 1 {
        last_irr: u8;
        irr: u8;
        imr: u8;
        isr: u8;
        priority_add: u8;
        irq_base: u8;
        read_reg_select: u8;
        poll: u8;
        special_mask: u8;
        init_state: u8;
        auto_eoi: u8;
        rotate_on_auto_eoi: u8;
        special_fully_nested_mode: u8;
        init4: u8;
        single_mode: u8;
        elcr: u8;
    }
    subsections {
        ltim: PicLevelTriggered;
    }
}

layout! {
    /// A vCPU that waits for its start-up interrupt.
    pub struct ApicSipi = "apic_sipi", version 1 {
        vector as "sipi_vector": i32;
        waits as "wait_for_sipi": i32;
    }
}

layout! {
    /// All lines are level triggered.
    pub struct PicLevelTriggered = "i8259/ltim", version 1 {
        ltim: u8;
    }
}
