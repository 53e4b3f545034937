//! What every virtio device has.

use super::subsections::{
    Broken, DeviceEndian, Disabled, Features64, PackedRings, RingSizes, Rings, Started,
};
use super::{MAX_QUEUES, Status, Transport};
use crate::{Description, Error, Fields, Hook, Subsections};

/// Largest configuration space of a virtio device, and more than any has.
const MAX_CONFIG: u32 = 4096;
/// Largest ring: of both split and packed ones.
const MAX_RING: u32 = 1 << 15;

const QUEUE: Description = Description::new("virtqueue", 1);

/// What every virtio device has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Core {
    /// How far the driver has come.
    pub status: Status,
    /// Causes of an interrupt that the driver has not read.
    pub isr: u8,
    /// The queue that the registers of a legacy transport are about.
    pub queue_sel: u16,
    /// The low 32 of the features that the driver has accepted.
    pub features_low: u32,
    /// Configuration space, in the device's byte order; zeros until a driver has read it.
    pub config: Vec<u8>,
    /// The queues, up to the first that does not exist.
    pub queues: Vec<Queue>,
    /// Byte order of the device, if it is not the target's.
    pub endian: Option<DeviceEndian>,
    /// All features that the driver has accepted, of a device that offers some above the low 32.
    pub features: Option<Features64>,
    /// Where the rings of a modern driver are.
    pub rings: Option<Rings>,
    /// Sizes of the rings as the device has them at first, if a driver has changed one.
    pub ring_sizes: Option<RingSizes>,
    /// The device has stopped because of an error of its driver.
    pub broken: Option<Broken>,
    /// The device has been started, whatever its status says.
    pub started: Option<Started>,
    /// Packed rings.
    pub packed: Option<PackedRings>,
    /// The device is off.
    pub disabled: Option<Disabled>,
}

/// A queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Queue {
    /// Entries of the ring.
    pub size: u32,
    /// Alignment of the ring's parts, where the driver chooses it.
    pub align: u32,
    /// Where the descriptors are in guest memory; 0: the driver has not said.
    pub descriptors: u64,
    /// Index of the next request that the device will take.
    pub last_avail: u16,
}

impl Core {
    pub(super) fn fields<T: Transport>(
        &mut self,
        transport: &mut T,
        fields: &mut Fields<'_>,
    ) -> Result<(), Error> {
        fields.field("status", &mut self.status.0)?;
        fields.field("isr", &mut self.isr)?;
        fields.field("queue_sel", &mut self.queue_sel)?;
        fields.validate("queue_sel below 1024", self.queue_sel, usize::from(self.queue_sel) < MAX_QUEUES)?;
        fields.field("features_low", &mut self.features_low)?;
        let mut len = length(fields, self.config.len())?;
        fields.field("config_len", &mut len)?;
        fields.validate("config_len up to 4096", len, len <= MAX_CONFIG)?;
        fields.buffer("config", &mut self.config, len)?;
        let mut count = length(fields, self.queues.len())?;
        fields.field("num_queues", &mut count)?;
        fields.validate("num_queues up to 1024", count, count as usize <= MAX_QUEUES)?;
        if fields.is_load() {
            self.queues.resize(count as usize, Queue::default());
        }
        fields.each("queue", &QUEUE, &mut self.queues, |index, queue, fields| {
            fields.field("size", &mut queue.size)?;
            fields.validate(
                "a ring of 1 to 32768 entries",
                queue.size,
                (1..=MAX_RING).contains(&queue.size),
            )?;
            if T::ALIGNS_RINGS {
                fields.field("align", &mut queue.align)?;
            }
            fields.field("descriptors", &mut queue.descriptors)?;
            fields.field("last_avail_idx", &mut queue.last_avail)?;
            let unused = queue.descriptors == 0 && queue.last_avail != 0;
            fields.validate("last_avail_idx 0 without a ring", queue.last_avail, !unused)?;
            transport.queue(index, fields)
        })
    }

    pub(super) fn subsections<T: Transport>(
        &mut self,
        transport: &mut T,
        subsections: &mut Subsections<'_, '_>,
    ) -> Result<(), Error> {
        subsections.optional(&mut self.endian)?;
        subsections.optional(&mut self.features)?;
        subsections.optional(&mut self.rings)?;
        subsections.optional(&mut self.ring_sizes)?;
        subsections.optional(&mut self.broken)?;
        let needed = transport.has_extra_state();
        subsections.subsection("virtio/extra_state", 1, needed, |fields| transport.extra_state(fields))?;
        subsections.optional(&mut self.started)?;
        subsections.optional(&mut self.packed)?;
        subsections.optional(&mut self.disabled)
    }

    pub(super) fn forget_subsections(&mut self) {
        let Self { status, isr, queue_sel, features_low, config, queues, .. } = std::mem::take(self);
        *self = Self { status, isr, queue_sel, features_low, config, queues, ..Self::default() };
    }

    /// All features that the driver has accepted.
    pub fn accepted(&self) -> u64 {
        self.features.as_ref().map_or(u64::from(self.features_low), |features| features.0)
    }

    /// Whether the driver has accepted feature `bit`, of which
    /// [`Kind::device`](super::Kind::device) may only ask for the low 32.
    pub fn has_feature(&self, bit: u32) -> bool {
        self.accepted().checked_shr(bit).is_some_and(|features| features & 1 != 0)
    }

    /// What the subsections say together with the fields, once all is loaded.
    pub(super) fn sanitise(&self) -> Hook {
        if let Some(features) = &self.features
            && features.0 & u64::from(u32::MAX) != u64::from(self.features_low)
        {
            return Err(format!(
                "features {:#x} in virtio/64bit_features, but {:#x} are their low 32 bits",
                features.0, self.features_low
            ));
        }
        Ok(())
    }
}

fn length(fields: &Fields<'_>, len: usize) -> Result<u32, Error> {
    u32::try_from(len).map_err(|_| fields.wrong(format_args!("{len} elements"), "at most 4294967295"))
}
