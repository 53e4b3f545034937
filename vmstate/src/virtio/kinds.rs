//! Devices with little or nothing of their own.

use super::{Core, DeviceId, Kind};
use crate::{Description, Error, Fields, layout};

/// An entropy source.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rng;

/// A SCSI host. The disks on it have sections of their own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Scsi;

/// Sockets between guest and host. Its connections are broken by a move.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Vsock;

/// A memory balloon.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Balloon {
    /// Its state.
    pub state: BalloonState,
}

layout! {
    /// Size of a balloon, in pages of 4 KiB.
    pub struct BalloonState = "virtio-balloon-device", version 1 {
        num_pages: u32;
        actual: u32;
    }
    subsections {
        hints: BalloonHints;
        poison: BalloonPoison;
    }
}

layout! {
    /// Free pages that the guest reports, once.
    pub struct BalloonHints = "virtio-balloon-device/free-page-report", version 1 {
        free_page_hint_cmd_id: u32;
        free_page_hint_status: u32;
    }
}

layout! {
    /// What the guest fills free pages with.
    pub struct BalloonPoison = "virtio-balloon-device/page-poison", version 1 {
        poison_val: u32;
    }
}

macro_rules! without_state {
    ($($Kind:ident = $name:literal, version $version:literal, $Id:ident;)*) => {$(
        impl Kind for $Kind {
            const DESCRIPTION: Description = Description::new($name, $version);
            const ID: DeviceId = DeviceId::$Id;

            fn device(&mut self, _core: &Core, _fields: &mut Fields<'_>) -> Result<(), Error> {
                Ok(())
            }
        }
    )*};
}

without_state! {
    Rng = "virtio-rng", version 1, RNG;
    Scsi = "virtio-scsi", version 1, SCSI;
    Vsock = "virtio-vhost_vsock", version 0, VSOCK;
}

impl Kind for Balloon {
    const DESCRIPTION: Description = Description::new("virtio-balloon", 1);
    const ID: DeviceId = DeviceId::BALLOON;

    fn device(&mut self, _core: &Core, fields: &mut Fields<'_>) -> Result<(), Error> {
        fields.field("balloon", &mut self.state)
    }
}
