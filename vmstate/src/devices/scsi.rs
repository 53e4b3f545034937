//! SCSI disks.

use crate::{Error, Fields, Table, Value, layout};

layout! {
    /// A disk on a SCSI bus.
    pub struct ScsiDisk = "scsi-disk", version 1 {
        qdev: ScsiDevice;
        media_changed: bool;
        media_event: bool;
        eject_request: bool;
        tray_open: bool;
        tray_locked: bool;
    }
}

layout! {
    /// What all devices on a SCSI bus have.
    pub struct ScsiDevice = "SCSIDevice", version 1 {
        unit_attention_key as "unit_attention.key": u8;
        unit_attention_asc as "unit_attention.asc": u8;
        unit_attention_ascq as "unit_attention.ascq": u8;
        sense_is_ua: bool;
        sense: Table<u8, 96>;
        sense_len: u32;
        requests: ScsiRequests;
    }
}

/// Requests in flight. There are none in a saved guest: they were completed before.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ScsiRequests;

impl Value for ScsiRequests {
    const KIND: &'static str = "scsi-requests";

    fn pass(&mut self, fields: &mut Fields<'_>) -> Result<(), Error> {
        let mut more = [0];
        fields.bytes(&mut more)?;
        match more {
            [0] => Ok(()),
            [other] => Err(fields.wrong(format_args!("{other:#04x}, a request in flight"), "0, the end")),
        }
    }
}
