//! IDE.

use super::pci::PciDevice;
use crate::layout;

layout! {
    /// The two IDE channels of pc-i440fx.
    pub struct Ide = "ide", version 3, minimum 0 {
        pci as "parent_obj": PciDevice;
        bmdma: [IdeDma; 2];
        bus: [IdeBus; 2];
        bus_0_ifs as "bus[0].ifs": [IdeDrive; 2] => since 3;
        bus_1_ifs as "bus[1].ifs": [IdeDrive; 2] => since 3;
    }
}

layout! {
    /// Bus master of a channel.
    pub struct IdeDma = "ide bmdma", version 3, minimum 0 {
        cmd: u8;
        migration_compat_status: u8;
        addr: u32;
        migration_retry_sector_num: i64;
        migration_retry_nsector: u32;
        migration_retry_unit: u8;
    }
    subsections {
        current: IdeDmaCurrent;
        saved_status: IdeDmaStatus;
    }
}

layout! {
    /// A channel.
    pub struct IdeBus = "ide_bus", version 1 {
        cmd: u8;
        unit: u8;
    }
    subsections {
        error: IdeError;
    }
}

layout! {
    /// A drive, or the place for one.
    pub struct IdeDrive = "ide_drive", version 3, minimum 3 {
        mult_sectors: i32;
        identify_set: i32;
        feature: u8;
        error: u8;
        nsector: u32;
        sector: u8;
        lcyl: u8;
        hcyl: u8;
        hob_feature: u8;
        hob_sector: u8;
        hob_nsector: u8;
        hob_lcyl: u8;
        hob_hcyl: u8;
        select: u8;
        status: u8;
        lba48: u8;
        sense_key: u8;
       asc: u8;
        cdrom_changed: u8;
    }
    subsections {
        tray: IdeTray;
        events: IdeEvents;
    }
}

layout! {
    /// A transfer that goes on.
    pub struct IdeDmaCurrent = "ide bmdma_current", version 1 {
        cur_addr: u32;
        cur_prd_last: u32;
        cur_prd_addr: u32;
        cur_prd_len: u32;
    }
}

layout! {
    /// Status, where it is not the one that older versions can say.
    pub struct IdeDmaStatus = "ide bmdma/status", version 1 {
        status: u8;
    }
}

layout! {
    /// A request that failed, and is tried again once the VM runs.
    pub struct IdeError = "ide_bus/error", version 2, minimum 1 {
        error_status: i32;
        retry_sector_num: i64 => since 2;
        retry_nsector: u32 => since 2;
        retry_unit: u8 => since 2;
    }
}

layout! {
    /// An open or locked tray.
    pub struct IdeTray = "ide_drive/tray_state", version 1 {
        tray_open: bool;
        tray_locked: bool;
    }
}

layout! {
    /// Events of the medium that the guest has not asked for yet.
    pub struct IdeEvents = "ide_drive/atapi/gesn_state", version 1 {
        new_media as "events.new_media": bool;
        eject_request as "events.eject_request": bool;
    }
}
