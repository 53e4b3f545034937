//! The firmware configuration device.

use crate::layout;

layout! {
    /// The firmware configuration device.
    pub struct FwCfg = "fw_cfg", version 2, minimum 1 {
        cur_entry: u16;
        cur_offset_1 as "cur_offset[1]": u32;
    }
    subsections {
        dma: FwCfgDma;
        acpi_mr: FwCfgAcpi;
    }
}

layout! {
    /// Its DMA interface.
    pub struct FwCfgDma = "fw_cfg/dma", version 0 {
        dma_addr: u64;
    }
}

layout! {
    /// Sizes of the ACPI tables that it gives, as the guest has seen them.
    pub struct FwCfgAcpi = "fw_cfg/acpi_mr", version 1 {
        table_mr_size: u64;
        linker_mr_size: u64;
        rsdp_mr_size: u64;
    }
}
