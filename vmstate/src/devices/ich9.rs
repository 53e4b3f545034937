//! Chipset of q35.

use super::acpi::{Apm, MemoryHotplug, PciSlotEvents, SmBus};
use super::pci::PciDevice;
use crate::{Table, Timer, layout};

layout! {
    /// ISA bridge of q35, with its power management.
    pub struct Ich9Lpc = "ICH9LPC", version 1 {
        pci as "d": PciDevice;
        apm: Apm;
        pm: Ich9Pm;
        chip_config: Table<u8, 16384>;
        sci_level: u32;
    }
    subsections {
        rst_cnt: Ich9Reset;
        smi_feat: Ich9Smi;
    }
}

layout! {
    /// Power management.
    pub struct Ich9Pm = "ich9_pm", version 1 {
        pm1_evt_sts as "acpi_regs.pm1.evt.sts": u16;
        pm1_evt_en as "acpi_regs.pm1.evt.en": u16;
        pm1_cnt_cnt as "acpi_regs.pm1.cnt.cnt": u16;
        tmr_timer as "acpi_regs.tmr.timer": Timer;
        tmr_overflow_time as "acpi_regs.tmr.overflow_time": i64;
        gpe_sts as "acpi_regs.gpe.sts": [u8; 16];
        gpe_en as "acpi_regs.gpe.en": [u8; 16];
        smi_en: u32;
        smi_sts: u32;
    }
    subsections {
        memhp: Ich9Memory;
        tco: Ich9Tco;
        pcihp: Ich9PciHotplug;
    }
}

layout! {
    /// Memory hotplug.
    pub struct Ich9Memory = "ich9_pm/memhp", version 1 {
        acpi_memory_hotplug: MemoryHotplug;
    }
}

layout! {
    /// The watchdog, if it is there.
    pub struct Ich9Tco = "ich9_pm/tco", version 1 {
        regs as "tco_regs": Tco;
    }
}

layout! {
    /// Registers of the watchdog.
    pub struct Tco = "tco io device status", version 1 {
        rld as "tco.rld": u16;
        din as "tco.din": u8;
        dout as "tco.dout": u8;
        sts1 as "tco.sts1": u16;
        sts2 as "tco.sts2": u16;
        cnt1 as "tco.cnt1": u16;
        cnt2 as "tco.cnt2": u16;
        msg1 as "tco.msg1": u8;
        msg2 as "tco.msg2": u8;
        wdcnt as "tco.wdcnt": u8;
        tmr as "tco.tmr": u16;
        sw_irq_gen: u8;
        timer as "tco_timer": Timer;
        expire_time: i64;
        timeouts_no: u8;
    }
}

layout! {
    /// Hotplug of PCI devices by ACPI.
    pub struct Ich9PciHotplug = "ich9_pm/pcihp", version 1 {
        hotplug_select as "acpi_pci_hotplug.hotplug_select": u32;
        acpi_pcihp_pci_status as "acpi_pci_hotplug.acpi_pcihp_pci_status": Table<PciSlotEvents, 256>;
        acpi_index as "acpi_pci_hotplug.acpi_index": u32;
    }
}

layout! {
    /// SMBus controller of q35.
    pub struct Ich9Smb = "ich9_smb", version 1 {
        pci as "dev": PciDevice;
        irq_enabled: bool;
        smb: SmBus;
    }
}

layout! {
    /// The reset control register, while a reset is on.
    pub struct Ich9Reset = "ICH9LPC/rst_cnt", version 1 {
        rst_cnt: u8;
    }
}

layout! {
    /// Features of system management interrupts, as the firmware has chosen them.
    pub struct Ich9Smi = "ICH9LPC/smi_feat", version 1 {
        guest_features as "smi_guest_features_le": [u8; 8];
        features_ok as "smi_features_ok": u8;
        negotiated as "smi_negotiated_features": u64;
    }
}
