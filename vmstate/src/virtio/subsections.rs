//! Subsections of the core, which come behind the device's own part.

use crate::{Description, Device, Error, Fields, Table, layout};

/// Most queues of a virtio device. Subsections about rings have as many entries, whatever the
/// device.
pub const MAX_QUEUES: usize = 1024;

/// Little and big endian, in `virtio/device_endian`.
const ENDIANS: std::ops::RangeInclusive<u8> = 1..=2;

macro_rules! numbers {
    ($($(#[$meta:meta])* $Name:ident($type:ty) = $name:literal $field:literal $(where $rule:literal $holds:expr)?;)*) => {$(
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct $Name(pub $type);

        impl Device for $Name {
            const DESCRIPTION: Description = Description::new($name, 1);

            fn fields(&mut self, fields: &mut Fields<'_>) -> Result<(), Error> {
                fields.field($field, &mut self.0)?;
                $(
                    let holds: fn($type) -> bool = $holds;
                    fields.validate($rule, self.0, holds(self.0))?;
                )?
                Ok(())
            }
        }
    )*};
}

numbers! {
    /// Byte order of the device: 1 little, 2 big endian.
    DeviceEndian(u8) = "virtio/device_endian" "device_endian"
        where "1 or 2, an endianness" |endian| ENDIANS.contains(&endian);
    /// All features that the driver has accepted.
    Features64(u64) = "virtio/64bit_features" "guest_features";
    /// Whether the device has stopped because of an error of its driver.
    Broken(bool) = "virtio/broken" "broken";
    /// Whether the device has been started.
    Started(bool) = "virtio/started" "started";
    /// Whether the device is off.
    Disabled(bool) = "virtio/disabled" "disabled";
}

layout! {
    /// Where the parts of a split ring are that the driver writes, and the device.
    pub struct RingAddresses = "virtqueue_state", version 1 {
        avail: u64;
        used: u64;
    }
}

layout! {
    /// Where the rings of a modern driver are.
    pub struct Rings = "virtio/virtqueues", version 1 {
        rings as "vq": Table<RingAddresses, 1024>;
    }
}

layout! {
    /// Size of a ring as the device has it at first.
    pub struct RingSize = "ringsize_state", version 1 {
        size as "vring.num_default": u32;
    }
}

layout! {
    /// Sizes of the rings as the device has them at first.
    pub struct RingSizes = "virtio/ringsize", version 1 {
        sizes as "vq": Table<RingSize, 1024>;
    }
}

layout! {
    /// Where a packed ring stands.
    pub struct PackedRing = "packed_virtqueue_state", version 1 {
        last_avail_idx: u16;
        last_avail_wrap_counter: bool;
        used_idx: u16;
        used_wrap_counter: bool;
        inuse: u32;
    }
}

layout! {
    /// Where packed rings stand.
    pub struct PackedRings = "virtio/packed_virtqueues", version 1 {
        rings as "vq": Table<PackedRing, 1024>;
    }
}
