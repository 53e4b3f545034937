//! Chipset of pc-i440fx.

use super::acpi::{Apm, MemoryHotplug, PciSlotEvents, SmBus};
use super::pci::PciDevice;
use crate::{Table, Timer, layout};

layout! {
    /// ISA bridge of pc-i440fx.
    pub struct Piix3 = "PIIX3", version 3, minimum 2 {
        pci as "dev": PciDevice;
        pci_irq_levels as "pci_irq_levels_vmstate": [i32; 4] => since 3;
    }
    subsections {
        rcr: Piix3Reset;
    }
}

layout! {
    /// Power management of pc-i440fx.
    pub struct Piix4Pm = "piix4_pm", version 3 {
        pci as "parent_obj": PciDevice;
        pm1_evt_sts as "ar.pm1.evt.sts": u16;
        pm1_evt_en as "ar.pm1.evt.en": u16;
        pm1_cnt_cnt as "ar.pm1.cnt.cnt": u16;
        apm: Apm;
        smb: SmBus;
        pm_timer as "ar.tmr.timer": Timer;
        pm_timer_overflow as "ar.tmr.overflow_time": i64;
        gpe as "ar.gpe": Gpe;
        hotplug_select as "acpi_pci_hotplug.hotplug_select": u32;
        acpi_pcihp_pci_status as "acpi_pci_hotplug.acpi_pcihp_pci_status": Table<PciSlotEvents, 256>;
        acpi_index as "acpi_pci_hotplug.acpi_index": u32;
    }
    subsections {
        memhp: Piix4Memory;
    }
}

layout! {
    /// General purpose events.
    pub struct Gpe = "gpe", version 1 {
        sts: u16;
        en: u16;
    }
}

layout! {
    /// Memory hotplug.
    pub struct Piix4Memory = "piix4_pm/memhp", version 1 {
        acpi_memory_hotplug: MemoryHotplug;
    }
}

layout! {
    /// The reset control register, while a reset is on.
    pub struct Piix3Reset = "PIIX3/rcr", version 1 {
        rcr: u8;
    }
}
