//! virtio-mmio: the registers of a legacy driver, and of a modern one.

use super::pci::joined;
use super::{RingRegisters, Transport};
use crate::{Description, Device, Error, Fields, Subsections, Table, layout};

/// virtio-mmio.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VirtioMmio {
    /// Which 32 of the device's features the driver reads.
    pub host_features_sel: u32,
    /// Which 32 of the driver's features it writes.
    pub guest_features_sel: u32,
    /// Base-two logarithm of the page size by which a legacy driver counts.
    pub guest_page_shift: u32,
    /// `virtio/extra_state` of a device that is not legacy.
    pub extra: Option<MmioExtra>,
}

/// What is in `virtio/extra_state`: nothing but a subsection.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MmioExtra {
    /// Registers of a modern driver.
    pub state: Option<MmioState>,
}

layout! {
    /// Registers of a modern driver.
    pub struct MmioState = "virtio_mmio/state", version 1 {
        guest_features: [u32; 2];
        vqs: Table<MmioQueue, 1024>;
    }
}

layout! {
    /// A queue as a modern driver has set it up.
    pub struct MmioQueue = "virtio_mmio/queue_state", version 1 {
        num: u16;
        enabled: bool;
        desc: [u32; 2];
        avail: [u32; 2];
        used: [u32; 2];
    }
}

impl Transport for VirtioMmio {
    const ALIGNS_RINGS: bool = true;

    fn config(&mut self, fields: &mut Fields<'_>) -> Result<(), Error> {
        fields.field("host_features_sel", &mut self.host_features_sel)?;
        fields.field("guest_features_sel", &mut self.guest_features_sel)?;
        fields.field("guest_page_shift", &mut self.guest_page_shift)?;
        let shift = self.guest_page_shift;
        fields.validate("guest_page_shift up to 31", shift, shift < u32::BITS)
    }

    fn queue(&mut self, _index: usize, _fields: &mut Fields<'_>) -> Result<(), Error> {
        Ok(())
    }

    fn forget_extra_state(&mut self) {
        self.extra = None;
    }

    fn has_extra_state(&self) -> bool {
        self.extra.is_some()
    }

    fn extra_state(&mut self, fields: &mut Fields<'_>) -> Result<(), Error> {
        fields.field("extra_state", self.extra.get_or_insert_default())
    }

    fn vector(&self, _index: usize) -> Option<(u16, usize)> {
        None
    }

    fn registers(&self, index: usize) -> Option<RingRegisters> {
        let queue = self.extra.as_ref()?.state.as_ref()?.vqs.get(index)?;
        queue.enabled.then(|| RingRegisters {
            size: queue.num,
            descriptors: joined(queue.desc),
            avail: joined(queue.avail),
            used: joined(queue.used),
        })
    }
}

impl Device for MmioExtra {
    const DESCRIPTION: Description = Description::new("virtio_mmio", 1);

    fn fields(&mut self, _fields: &mut Fields<'_>) -> Result<(), Error> {
        Ok(())
    }

    fn subsections(&mut self, subsections: &mut Subsections<'_, '_>) -> Result<(), Error> {
        subsections.optional(&mut self.state)
    }
}
