//! The floppy disk controller.

use crate::{Same, Table, Timer, layout};

layout! {
    /// The floppy disk controller on ISA.
    pub struct FloppyController = "fdc", version 2 {
        state: FloppyState;
    }
}

layout! {
    /// What controllers of all kinds have.
    pub struct FloppyState = "fdc", version 2 {
        sra: u8;
        srb: u8;
        dor as "dor_vmstate": u8;
        tdr: u8;
        dsr: u8;
        msr: u8;
        status0: u8;
        status1: u8;
        status2: u8;
        fifo: Table<u8, 512>;
        data_pos: u32;
        data_len: u32;
        data_state: u8;
        data_dir: u8;
        eot: u8;
        timer0: u8;
        timer1: u8;
        precomp_trk: u8;
        config: u8;
        lock: u8;
        pwrd: u8;
        num_floppies: Same<u8>;
        drives: [FloppyDrive; 2];
    }
    subsections {
        reset_sensei: FloppySense;
        result_timer: FloppyResult;
        phase: FloppyPhase;
    }
}

layout! {
    /// A drive.
    pub struct FloppyDrive = "fdrive", version 1 {
        head: u8;
        track: u8;
        sect: u8;
    }
    subsections {
        media_changed: FloppyChanged;
        media_rate: FloppyRate;
        perpendicular: FloppyPerpendicular;
    }
}

layout! {
    /// Drives that have not been asked since the reset.
    pub struct FloppySense = "fdc/reset_sensei", version 1 {
        reset_sensei: i32;
    }
}

layout! {
    /// A result that is on its way.
    pub struct FloppyResult = "fdc/result_timer", version 1 {
        result_timer: Timer;
    }
}

layout! {
    /// The phase, where it cannot be told from the registers.
    pub struct FloppyPhase = "fdc/phase", version 1 {
        phase: u8;
    }
}

layout! {
    /// The medium was changed.
    pub struct FloppyChanged = "fdrive/media_changed", version 1 {
        media_changed: u8;
    }
}

layout! {
    /// Data rate of the medium.
    pub struct FloppyRate = "fdrive/media_rate", version 1 {
        media_rate: u8;
    }
}

layout! {
    /// Perpendicular mode.
    pub struct FloppyPerpendicular = "fdrive/perpendicular", version 1 {
        perpendicular: u8;
    }
}
