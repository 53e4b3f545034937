//! Power management that chipsets share.

use crate::layout;

layout! {
    /// Advanced power management ports.
    pub struct Apm = "APM State", version 1 {
        apmc: u8;
        apms: u8;
    }
}

layout! {
    /// Selector of memory slots, on a machine that has none.
    pub struct MemoryHotplug = "memory hotplug state", version 1 {
        selector: u32;
    }
}

layout! {
    /// Slots of a bus that were plugged or are to be unplugged.
    pub struct PciSlotEvents = "acpi_pcihp_pci_status", version 1 {
        up: u32;
        down: u32;
    }
}

layout! {
    /// Registers of an SMBus controller.
    pub struct SmBus = "pmsmb", version 1 {
        smb_stat: u8;
        smb_ctl: u8;
        smb_cmd: u8;
        smb_addr: u8;
        smb_data0: u8;
        smb_data1: u8;
        smb_index: u32;
        smb_data: [u8; 32];
        smb_auxctl: u8;
        smb_blkdata: u8;
        i2c_enable: bool;
        op_done: bool;
        in_i2c_block_read: bool;
        start_transaction_on_status_read: bool;
    }
}

layout! {
    /// An I2C bus.
    pub struct I2cBus = "i2c_bus", version 1 {
        saved_address: u8;
    }
}

layout! {
    /// Whether the ACPI tables have been made.
    pub struct AcpiTables = "acpi_build", version 1 {
        patched: u8;
    }
}

layout! {
    /// The generic event device of machines without chipset.
    pub struct AcpiGed = "acpi-ged", version 1 {
        ged_state: AcpiGedEvents;
    }
    subsections {
        memhp: AcpiGedMemory;
    }
}

layout! {
    /// Events that wait.
    pub struct AcpiGedEvents = "acpi-ged-state", version 1 {
        sel: u32;
    }
}

layout! {
    /// Memory hotplug.
    pub struct AcpiGedMemory = "acpi-ged/memhp", version 1 {
        memhp_state: MemoryHotplug;
    }
}
