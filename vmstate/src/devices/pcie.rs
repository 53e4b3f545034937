//! Root ports of PCI Express.

use super::{MsixVector, PciDevice};
use crate::{Description, Device, Error, Fields, Same, layout};

/// Most errors that a port keeps.
const MAX_ERRORS: u16 = 128;

/// A root port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PcieRootPort {
    /// What every PCI device has.
    pub pci: PciDevice,
    /// Errors that the guest has not been told of.
    pub errors: PcieErrorLog,
    /// Its interrupts.
    pub msix: PcieMsix,
}

/// Errors that a port keeps.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PcieErrorLog {
    /// How many it can keep.
    pub max: Same<u16>,
    /// Those that it has.
    pub log: Vec<PcieError>,
}

layout! {
    /// An error.
    pub struct PcieError = "PCIE_AER_ERROR", version 1 {
        status: u32;
        source_id: u16;
        flags: u16;
        header: [u32; 4];
        prefix: [u32; 4];
    }
}

/// An MSI-X table, and the interrupts that wait, a bit each.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PcieMsix {
    /// The table.
    pub vectors: Vec<MsixVector>,
    /// Interrupts that wait.
    pub pending: Vec<u8>,
}

impl Default for PcieRootPort {
    fn default() -> Self {
        let pci = PciDevice::of_len(PciDevice::EXPRESS);
        Self { pci, errors: PcieErrorLog::default(), msix: PcieMsix::default() }
    }
}

impl Device for PcieRootPort {
    const DESCRIPTION: Description = Description::new("pcie-root-port", 1);

    fn fields(&mut self, fields: &mut Fields<'_>) -> Result<(), Error> {
        fields.field("parent_obj.parent_obj.parent_obj", &mut self.pci)?;
        fields.field("parent_obj.parent_obj.parent_obj.exp.aer_log", &mut self.errors)?;
        let Some(entries) = self.pci.config.msix_entries() else { return Ok(()) };
        if fields.is_load() {
            self.msix.vectors.resize(entries, MsixVector::default());
            self.msix.pending.resize(entries.div_ceil(8), 0);
        }
        fields.field("parent_obj.parent_obj.parent_obj.parent_obj", &mut self.msix)
    }
}

impl Device for PcieErrorLog {
    const DESCRIPTION: Description = Description::new("PCIE_AER_ERROR_LOG", 1);

    fn fields(&mut self, fields: &mut Fields<'_>) -> Result<(), Error> {
        let mut len = u16::try_from(self.log.len()).unwrap_or(u16::MAX);
        fields.field("log_num", &mut len)?;
        fields.field("log_max", &mut self.max)?;
        let most = self.max.value.min(MAX_ERRORS);
        fields.validate("log_num up to log_max and 128", len, len <= most)?;
        if len == 0 && fields.is_load() {
            self.log.clear();
        }
        if len == 0 { Ok(()) } else { fields.counted("log", &mut self.log, len) }
    }
}

impl Device for PcieMsix {
    const DESCRIPTION: Description = Description::new("msix", 0);

    fn fields(&mut self, fields: &mut Fields<'_>) -> Result<(), Error> {
        let (vectors, pending) = (self.vectors.len(), self.pending.len());
        fields.counted("msix_table", &mut self.vectors, vectors)?;
        fields.buffer("msix_pending", &mut self.pending, pending)
    }
}
