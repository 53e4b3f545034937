//! SATA.

use super::ide::{IdeBus, IdeDrive};
use super::pci::PciDevice;
use crate::{Same, layout};

layout! {
    /// SATA controller of q35.
    pub struct Ich9Ahci = "ich9_ahci", version 1, minimum 0 {
        pci as "parent_obj": PciDevice;
        ahci: Ahci;
    }
}

layout! {
    /// A host bus adapter of six ports.
    pub struct Ahci = "ahci", version 1, minimum 0 {
        dev: [AhciPort; 6];
        cap as "control_regs.cap": u32;
        ghc as "control_regs.ghc": u32;
        irqstatus as "control_regs.irqstatus": u32;
        implemented as "control_regs.impl": u32;
        version as "control_regs.version": u32;
        idp_index: u32;
        ports: Same<u32>;
    }
}

layout! {
    /// A port.
    pub struct AhciPort = "ahci port", version 1, minimum 0 {
        port: IdeBus;
        port_ifs_0 as "port.ifs[0]": IdeDrive;
        port_state: u32;
        finished: u32;
        lst_addr as "port_regs.lst_addr": u32;
        lst_addr_hi as "port_regs.lst_addr_hi": u32;
        fis_addr as "port_regs.fis_addr": u32;
        fis_addr_hi as "port_regs.fis_addr_hi": u32;
        irq_stat as "port_regs.irq_stat": u32;
        irq_mask as "port_regs.irq_mask": u32;
        cmd as "port_regs.cmd": u32;
        tfdata as "port_regs.tfdata": u32;
        sig as "port_regs.sig": u32;
        scr_stat as "port_regs.scr_stat": u32;
        scr_ctl as "port_regs.scr_ctl": u32;
        scr_err as "port_regs.scr_err": u32;
        scr_act as "port_regs.scr_act": u32;
        cmd_issue as "port_regs.cmd_issue": u32;
        done_first_drq: bool;
        busy_slot: i32;
        init_d2h_sent: bool;
        ncq_tfs: [AhciQueued; 32];
    }
}

layout! {
    /// A queued command.
    pub struct AhciQueued = "ncq state", version 1, minimum 0 {
        sector_count: u32;
        lba: u64;
        tag: u8;
        cmd: u8;
        slot: u8;
        used: bool;
        halt: bool;
    }
}
