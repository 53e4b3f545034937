//! virtio-pci: configuration space, MSI-X, and the registers of a modern driver.

use super::subsections::MAX_QUEUES;
use super::{RingRegisters, Transport};
use crate::devices::{MsixVector, PciDevice};
use crate::{Description, Device, Error, Fields, Subsections, Table, Unused, layout};

/// No interrupt vector was chosen.
pub const NO_VECTOR: u16 = 0xffff;

/// virtio-pci.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VirtioPci {
    /// What every PCI device has.
    pub pci: PciDevice,
    /// The MSI-X table, if the device has one.
    pub vectors: Vec<MsixVector>,
    /// Vectors whose interrupt waits, a bit each.
    pub pending: Vec<u8>,
    /// The vector for changes of the configuration.
    pub config_vector: u16,
    /// The vector of each queue.
    pub queue_vectors: Vec<u16>,
    /// `virtio/extra_state` of a device that can be modern.
    pub extra: Option<PciExtra>,
}

/// What is in `virtio/extra_state`: nothing but a subsection.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PciExtra {
    /// Registers of a modern driver.
    pub modern: Option<PciModernState>,
}

layout! {
    /// Registers of a modern driver.
    pub struct PciModernState = "virtio_pci/modern_state", version 1 {
        dfselect: u32;
        gfselect: u32;
        guest_features: [u32; 2];
        vqs: Table<PciQueue, 1024>;
    }
}

layout! {
    /// A queue as a modern driver has set it up.
    pub struct PciQueue = "virtio_pci/modern_queue_state", version 1 {
        num: u16;
        unused: Unused<1>;
        enabled: bool;
        desc: [u32; 2];
        avail: [u32; 2];
        used: [u32; 2];
    }
}

impl Default for VirtioPci {
    fn default() -> Self {
        Self::of_len(PciDevice::CONVENTIONAL)
    }
}

impl VirtioPci {
    /// A device with a configuration space of so many bytes, 256 or 4096.
    pub fn of_len(len: usize) -> Self {
        Self {
            pci: PciDevice::of_len(len),
            vectors: Vec::new(),
            pending: Vec::new(),
            config_vector: NO_VECTOR,
            queue_vectors: Vec::new(),
            extra: None,
        }
    }

    /// Entries of the MSI-X table, as configuration space says; `None` without MSI-X.
    pub fn msix_entries(&self) -> Option<usize> {
        self.pci.config.msix_entries()
    }
}

impl Transport for VirtioPci {
    const ALIGNS_RINGS: bool = false;

    fn config(&mut self, fields: &mut Fields<'_>) -> Result<(), Error> {
        fields.field("pci", &mut self.pci)?;
        let Some(entries) = self.msix_entries() else {
            if fields.is_load() {
                (self.vectors, self.pending) = (Vec::new(), Vec::new());
                (self.config_vector, self.queue_vectors) = (NO_VECTOR, Vec::new());
            }
            return Ok(());
        };
        fields.counted("msix_table", &mut self.vectors, entries)?;
        fields.buffer("msix_pending", &mut self.pending, entries.div_ceil(8))?;
        fields.field("config_vector", &mut self.config_vector)
    }

    fn queue(&mut self, index: usize, fields: &mut Fields<'_>) -> Result<(), Error> {
        if self.msix_entries().is_none() {
            return Ok(());
        }
        if fields.is_load() && index < MAX_QUEUES {
            self.queue_vectors.truncate(index);
            self.queue_vectors.resize(index + 1, NO_VECTOR);
        }
        match self.queue_vectors.get_mut(index) {
            Some(vector) => fields.field("vector", vector),
            None => Err(fields.wrong("no vector", "one for each queue")),
        }
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

    fn vector(&self, index: usize) -> Option<(u16, usize)> {
        Some((*self.queue_vectors.get(index)?, self.msix_entries()?))
    }

    fn registers(&self, index: usize) -> Option<RingRegisters> {
        let queue = self.extra.as_ref()?.modern.as_ref()?.vqs.get(index)?;
        queue.enabled.then(|| RingRegisters {
            size: queue.num,
            descriptors: joined(queue.desc),
            avail: joined(queue.avail),
            used: joined(queue.used),
        })
    }
}

/// A 64-bit register that is written in two halves.
pub(super) fn joined([low, high]: [u32; 2]) -> u64 {
    u64::from(high) << 32 | u64::from(low)
}

impl Device for PciExtra {
    const DESCRIPTION: Description = Description::new("virtio_pci", 1);

    fn fields(&mut self, _fields: &mut Fields<'_>) -> Result<(), Error> {
        Ok(())
    }

    fn subsections(&mut self, subsections: &mut Subsections<'_, '_>) -> Result<(), Error> {
        subsections.optional(&mut self.modern)
    }
}
