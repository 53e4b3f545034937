//! PCI devices, and the buses they are on.

use crate::{AtMost, Description, Device, Error, Fields, Same, Unused, Value, layout};

/// What every PCI device has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PciDevice {
    /// Version of this layout: the one in the fields, which a section cannot say for a part.
    pub version: AtMost<i32>,
    /// Configuration space: 256 bytes, of an express device 4096.
    pub config: PciConfig,
    /// Levels of INTA to INTD.
    pub interrupts: PciInterrupts,
}

/// Configuration space.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PciConfig(pub Vec<u8>);

/// Levels of INTA to INTD.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PciInterrupts(pub [u32; 4]);

impl PciDevice {
    /// Bytes of a conventional configuration space.
    pub const CONVENTIONAL: usize = 256;
    /// Bytes of an express device's.
    pub const EXPRESS: usize = 4096;

    /// A device with so many bytes of configuration space.
    pub fn of_len(len: usize) -> Self {
        let version = AtMost { value: 2, limit: Some(2) };
        Self { version, config: PciConfig(vec![0; len]), interrupts: PciInterrupts::default() }
    }
}

impl Default for PciDevice {
    fn default() -> Self {
        Self::of_len(Self::CONVENTIONAL)
    }
}

impl Device for PciDevice {
    const DESCRIPTION: Description = Description::new("PCIDevice", 2).minimum(1);

    fn fields(&mut self, fields: &mut Fields<'_>) -> Result<(), Error> {
        fields.field("version_id", &mut self.version)?;
        fields.field("config", &mut self.config)?;
        fields.since(2, "irq_state", &mut self.interrupts)
    }
}

impl Value for PciConfig {
    const KIND: &'static str = "pci config";

    fn pass(&mut self, fields: &mut Fields<'_>) -> Result<(), Error> {
        fields.bytes(&mut self.0)
    }
}

impl Value for PciInterrupts {
    const KIND: &'static str = "pci irq state";

    fn pass(&mut self, fields: &mut Fields<'_>) -> Result<(), Error> {
        for level in &mut self.0 {
            level.pass(fields)?;
            if *level > 1 {
                return Err(fields.wrong(format_args!("{level}"), "a level, 0 or 1"));
            }
        }
        Ok(())
    }
}

/// A PCI bus: how many devices hold each of its interrupt lines.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PciBus {
    /// Interrupt lines.
    pub lines: Same<i32>,
    /// Devices that hold each.
    pub held: Vec<i32>,
}

impl Device for PciBus {
    const DESCRIPTION: Description = Description::new("PCIBUS", 1);

    fn fields(&mut self, fields: &mut Fields<'_>) -> Result<(), Error> {
        fields.field("nirq", &mut self.lines)?;
        fields.validate("nirq in range", self.lines.value, (0..=256).contains(&self.lines.value))?;
        fields.counted("irq_count", &mut self.held, self.lines.value)
    }
}

layout! {
    /// Host bridge of pc-i440fx.
    pub struct I440fx = "I440FX", version 3 {
        pci as "parent_obj": PciDevice;
        unused: Unused<1>;
    }
}

layout! {
    /// Host bridge of q35.
    pub struct Mch = "mch", version 1 {
        pci as "parent_obj": PciDevice;
        unused: Unused<1>;
    }
}

layout! {
    /// The address port of configuration space.
    pub struct PciHost = "PCIHost", version 1 {
        config_reg: u32;
    }
}
