//! MSI-X, which is in configuration space and in a table.

use super::PciConfig;
use crate::{Error, Fields, Value};

/// Where the list of capabilities begins in configuration space.
const CAPABILITIES: usize = 0x34;
const MSIX: u8 = 0x11;
/// More capabilities than fit: a list that is longer goes round in circles.
const MAX_CAPABILITIES: usize = 48;

impl PciConfig {
    /// Entries of the MSI-X table, as the capability says; `None` without it.
    pub fn msix_entries(&self) -> Option<usize> {
        let byte = |at: usize| self.0.get(at).copied();
        let mut at = usize::from(byte(CAPABILITIES)? & !3);
        for _ in 0..MAX_CAPABILITIES {
            if at == 0 {
                break;
            }
            if byte(at)? == MSIX {
                let control = u16::from_le_bytes([byte(at + 2)?, byte(at + 3)?]);
                return Some(usize::from(control & 0x7ff) + 1);
            }
            at = usize::from(byte(at + 1)? & !3);
        }
        None
    }
}

/// An entry of an MSI-X table, as a driver writes it: little endian.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MsixVector {
    /// Where the message is written.
    pub address: u64,
    /// The message.
    pub data: u32,
    /// Bit 0: masked.
    pub control: u32,
}

impl Value for MsixVector {
    const KIND: &'static str = "msix vector buffer";

    fn pass(&mut self, fields: &mut Fields<'_>) -> Result<(), Error> {
        let (mut address, mut data) = (self.address.to_le_bytes(), self.data.to_le_bytes());
        let mut control = self.control.to_le_bytes();
        fields.bytes(&mut address)?;
        fields.bytes(&mut data)?;
        fields.bytes(&mut control)?;
        self.address = u64::from_le_bytes(address);
        self.data = u32::from_le_bytes(data);
        self.control = u32::from_le_bytes(control);
        Ok(())
    }
}
