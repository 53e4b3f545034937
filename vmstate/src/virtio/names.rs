//! Names of what a driver and a device say to each other.

use std::fmt;

/// How far the driver has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Status(pub u8);

/// What a device is to a driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceId(pub u16);

/// Features of a device, by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Features {
    /// The device.
    pub device: DeviceId,
    /// The features, a bit each.
    pub bits: u64,
}

impl Status {
    /// The driver is set up.
    pub const DRIVER_OK: u8 = 4;
    /// The features are chosen; only a modern driver says so.
    pub const FEATURES_OK: u8 = 8;
    /// The device must be reset.
    pub const NEEDS_RESET: u8 = 64;
    /// The driver has given up.
    pub const FAILED: u8 = 128;

    /// Whether all of these bits are set.
    pub const fn has(self, bits: u8) -> bool {
        self.0 & bits == bits
    }
}

const STATUS: [(u8, &str); 6] = [
    (1, "ACKNOWLEDGE"),
    (2, "DRIVER"),
    (Status::FEATURES_OK, "FEATURES_OK"),
    (Status::DRIVER_OK, "DRIVER_OK"),
    (Status::NEEDS_RESET, "NEEDS_RESET"),
    (Status::FAILED, "FAILED"),
];

impl Status {
    /// Bits that no version of the standard has given a meaning.
    pub fn unknown(self) -> u8 {
        STATUS.iter().fold(self.0, |left, (bit, _)| left & !bit)
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0 == 0 {
            return f.write_str("reset");
        }
        let names = STATUS.iter().filter(|(bit, _)| self.has(*bit)).map(|(_, name)| (*name).to_owned());
        let unknown = (self.unknown() != 0).then(|| format!("{:#x}", self.unknown()));
        f.write_str(&names.chain(unknown).collect::<Vec<_>>().join(" "))
    }
}

impl DeviceId {
    /// Network.
    pub const NET: Self = Self(1);
    /// Disk.
    pub const BLOCK: Self = Self(2);
    /// Console.
    pub const CONSOLE: Self = Self(3);
    /// Entropy.
    pub const RNG: Self = Self(4);
    /// Balloon.
    pub const BALLOON: Self = Self(5);
    /// SCSI host.
    pub const SCSI: Self = Self(8);
    /// Sockets.
    pub const VSOCK: Self = Self(19);
}

/// Features of all devices.
const COMMON: &[(u8, &str)] = &[
    (24, "NOTIFY_ON_EMPTY"),
    (27, "ANY_LAYOUT"),
    (28, "RING_INDIRECT_DESC"),
    (29, "RING_EVENT_IDX"),
    (30, "UNUSED_30"),
    (32, "VERSION_1"),
    (33, "ACCESS_PLATFORM"),
    (34, "RING_PACKED"),
    (35, "IN_ORDER"),
    (36, "ORDER_PLATFORM"),
    (37, "SR_IOV"),
    (38, "NOTIFICATION_DATA"),
    (39, "NOTIF_CONFIG_DATA"),
    (40, "RING_RESET"),
    (41, "ADMIN_VQ"),
];
const NET: &[(u8, &str)] = &[
    (0, "CSUM"),
    (1, "GUEST_CSUM"),
    (2, "CTRL_GUEST_OFFLOADS"),
    (3, "MTU"),
    (5, "MAC"),
    (6, "GSO"),
    (7, "GUEST_TSO4"),
    (8, "GUEST_TSO6"),
    (9, "GUEST_ECN"),
    (10, "GUEST_UFO"),
    (11, "HOST_TSO4"),
    (12, "HOST_TSO6"),
    (13, "HOST_ECN"),
    (14, "HOST_UFO"),
    (15, "MRG_RXBUF"),
    (16, "STATUS"),
    (17, "CTRL_VQ"),
    (18, "CTRL_RX"),
    (19, "CTRL_VLAN"),
    (20, "CTRL_RX_EXTRA"),
    (21, "GUEST_ANNOUNCE"),
    (22, "MQ"),
    (23, "CTRL_MAC_ADDR"),
    (52, "VQ_NOTF_COAL"),
    (53, "NOTF_COAL"),
    (54, "GUEST_USO4"),
    (55, "GUEST_USO6"),
    (56, "HOST_USO"),
    (57, "HASH_REPORT"),
    (59, "GUEST_HDRLEN"),
    (60, "RSS"),
    (61, "RSC_EXT"),
    (62, "STANDBY"),
    (63, "SPEED_DUPLEX"),
];
const BLOCK: &[(u8, &str)] = &[
    (0, "BARRIER"),
    (1, "SIZE_MAX"),
    (2, "SEG_MAX"),
    (4, "GEOMETRY"),
    (5, "RO"),
    (6, "BLK_SIZE"),
    (7, "SCSI"),
    (9, "FLUSH"),
    (10, "TOPOLOGY"),
    (11, "CONFIG_WCE"),
    (12, "MQ"),
    (13, "DISCARD"),
    (14, "WRITE_ZEROES"),
    (15, "LIFETIME"),
    (16, "SECURE_ERASE"),
    (17, "ZONED"),
];
const CONSOLE: &[(u8, &str)] = &[(0, "SIZE"), (1, "MULTIPORT"), (2, "EMERG_WRITE")];
const BALLOON: &[(u8, &str)] = &[
    (0, "MUST_TELL_HOST"),
    (1, "STATS_VQ"),
    (2, "DEFLATE_ON_OOM"),
    (3, "FREE_PAGE_HINT"),
    (4, "PAGE_POISON"),
    (5, "PAGE_REPORTING"),
];
const SCSI: &[(u8, &str)] = &[(0, "INOUT"), (1, "HOTPLUG"), (2, "CHANGE"), (3, "T10_PI")];
const VSOCK: &[(u8, &str)] = &[(0, "STREAM"), (1, "SEQPACKET"), (2, "NO_IMPLIED_STREAM")];

impl Features {
    /// VIRTIO_F_VERSION_1.
    pub const VERSION_1: u64 = 1 << 32;
    /// VIRTIO_F_RING_PACKED.
    pub const RING_PACKED: u64 = 1 << 34;

    fn own(self) -> &'static [(u8, &'static str)] {
        match self.device {
            DeviceId::NET => NET,
            DeviceId::BLOCK => BLOCK,
            DeviceId::CONSOLE => CONSOLE,
            DeviceId::BALLOON => BALLOON,
            DeviceId::SCSI => SCSI,
            DeviceId::VSOCK => VSOCK,
            _ => &[],
        }
    }

    fn known(self) -> impl Iterator<Item = (u64, &'static str)> {
        self.own().iter().chain(COMMON).map(|(bit, name)| (1 << bit, *name))
    }

    /// Bits that have no name here.
    pub fn unknown(self) -> u64 {
        self.known().fold(self.bits, |left, (bit, _)| left & !bit)
    }
}

impl fmt::Display for Features {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.bits == 0 {
            return f.write_str("none");
        }
        let names = self.known().filter(|(bit, _)| self.bits & bit != 0).map(|(_, name)| name.to_owned());
        let unknown = (self.unknown() != 0).then(|| format!("{:#x}", self.unknown()));
        f.write_str(&names.chain(unknown).collect::<Vec<_>>().join(" "))
    }
}
