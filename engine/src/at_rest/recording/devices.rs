//! What a stream holds beside RAM.

use std::sync::Arc;

use multifd_wire::{DeviceDescription, Invalid, SectionHead, Structure, VmDescription, split_tail};

use crate::at_rest::checkpoint::Checkpoint;
use crate::error::{Error, Phase, Result};
use crate::os::memory::most_kept;

/// The sections of a stream, RAM's apart, and what is said of them.
#[derive(Clone, Debug, Default)]
pub struct Devices {
    /// In the order of the stream.
    pub sections: Vec<RecordedSection>,
    /// What the device sections consist of, unless the source did not say.
    pub description: Option<Arc<VmDescription>>,
    /// Bytes behind the end of the stream, which mean nothing.
    pub trailing_bytes: u64,
}

/// One section.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct RecordedSection {
    /// Whose it is.
    pub head: SectionHead,
    /// What is in it.
    pub content: SectionContent,
}

/// The payload of a section.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum SectionContent {
    /// A device: the payload, in one piece.
    Device(Vec<u8>),
    /// A live section, such as `dirty-bitmap`: bytes of all its pieces, which are not kept.
    Live(u64),
}

impl Devices {
    /// What is known of the layout of a section.
    pub fn description_of(&self, section: &RecordedSection) -> Option<&DeviceDescription> {
        describing(self.description.as_deref()?, &section.head)
    }

    /// A device's payload with its layout, ready to be taken apart. `None` if the source did not
    /// describe it.
    pub fn structure<'a>(&'a self, section: &'a RecordedSection) -> Option<Structure<'a>> {
        match &section.content {
            SectionContent::Device(payload) => {
                Some(Structure::of_device(self.description_of(section)?, payload))
            }
            SectionContent::Live(_) => None,
        }
    }

    /// The devices' part of a stream that is in memory: sections, and the bytes from EOF on.
    fn from_tail(early: &[u8], sections: &[u8], end: &[u8]) -> Result<Self, Invalid> {
        // EOF, the type byte, the length.
        let description = end.get(6..).map(VmDescription::parse).transpose()?.map(Arc::new);
        let mut all = Vec::new();
        for bytes in [early, sections] {
            for section in split_tail(bytes, description.as_deref())? {
                let payload = bytes.get(section.payload.clone()).ok_or_else(|| {
                    Invalid::new(
                        "payload of a device section",
                        format_args!("bytes {:?}", section.payload),
                        format_args!("inside of {} bytes", bytes.len()),
                    )
                })?;
                let content = SectionContent::Device(payload.to_vec());
                all.push(RecordedSection { head: section.head, content });
            }
        }
        Ok(Self { sections: all, description, trailing_bytes: 0 })
    }
}

impl RecordedSection {
    /// Bytes of the payload.
    pub fn payload_len(&self) -> u64 {
        match &self.content {
            SectionContent::Device(payload) => payload.len() as u64,
            SectionContent::Live(len) => *len,
        }
    }
}

impl Checkpoint {
    /// The sections of the devices' state.
    ///
    /// # Errors
    /// `InvalidStream` if they are no sections.
    pub fn devices(&self) -> Result<Devices> {
        let state = self.device_state();
        Devices::from_tail(&self.early_sections().concat(), state.sections(), state.end())
            .map_err(|error| Error::invalid(Phase::Device, error))
    }
}

pub(super) fn describing<'d>(
    description: &'d VmDescription,
    head: &SectionHead,
) -> Option<&'d DeviceDescription> {
    let same =
        |device: &&DeviceDescription| device.name == head.idstr && device.instance_id == head.instance_id;
    description.devices.iter().find(same)
}

/// Adds to what is kept of all devices together, up to half of the machine's memory: a file
/// may have holes.
pub(super) fn keep(payload: &mut Vec<u8>, kept: &mut usize, bytes: &[u8]) -> Result<()> {
    *kept = kept.saturating_add(bytes.len());
    let most = most_kept();
    if *kept > most {
        let detail = format!("more than {most} bytes of device state");
        return Err(Error::incompatible(Phase::Device, detail));
    }
    payload.extend_from_slice(bytes);
    Ok(())
}
