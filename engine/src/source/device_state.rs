//! The devices' part of a stream, ready to be sent.

use multifd_wire::{Invalid, TailScanner};

/// Device sections, the end of the stream, and the vmdescription if there is one, as a source wrote them.
#[derive(Clone, Debug)]
pub struct DeviceState {
    bytes: Vec<u8>,
    /// Bytes before the EOF byte.
    sections_len: usize,
}

impl DeviceState {
    /// Takes the tail of a recorded stream: from the first FULL section to the end.
    ///
    /// # Errors
    /// Bytes that do not end as a stream does.
    pub fn from_tail(bytes: Vec<u8>) -> Result<Self, Invalid> {
        let mut scanner = TailScanner::new();
        let end = scanner.push(&bytes)?;
        let sections_len = match end {
            Some(end) if end.total == bytes.len() => end.devices_len,
            None if scanner.ends_without_description() => bytes.len() - 1,
            Some(end) => {
                return Err(Invalid::new(
                    "device state",
                    format_args!("{} bytes", bytes.len()),
                    format_args!("{} up to its end", end.total),
                ));
            }
            None => {
                return Err(Invalid::new(
                    "device state",
                    format_args!("{} bytes without an end", bytes.len()),
                    "EOF and a vmdescription",
                ));
            }
        };
        Ok(Self { bytes, sections_len })
    }

    /// The FULL sections.
    pub(crate) fn sections(&self) -> &[u8] {
        self.bytes.get(..self.sections_len).unwrap_or_default()
    }

    /// EOF, and what follows it.
    pub(crate) fn end(&self) -> &[u8] {
        self.bytes.get(self.sections_len..).unwrap_or_default()
    }
}
