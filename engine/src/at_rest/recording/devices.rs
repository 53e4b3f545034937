//! What a stream holds beside RAM.

use std::collections::HashMap;
use std::sync::{Arc, OnceLock};

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
    layouts: OnceLock<Layouts>,
}

/// Where in a description each device is: a stream may describe a great many.
#[derive(Clone, Debug, Default)]
pub(super) struct Layouts(HashMap<String, HashMap<u32, usize>>);

impl Layouts {
    pub(super) fn of(description: &VmDescription) -> Self {
        let mut layouts = Self::default();
        for (index, device) in description.devices.iter().enumerate() {
            let instances = layouts.0.entry(device.name.clone()).or_default();
            instances.entry(device.instance_id).or_insert(index);
        }
        layouts
    }

    /// The first that has this name and instance.
    pub(super) fn find<'d>(
        &self,
        description: &'d VmDescription,
        head: &SectionHead,
    ) -> Option<&'d DeviceDescription> {
        description.devices.get(*self.0.get(&head.idstr)?.get(&head.instance_id)?)
    }
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
    pub(super) fn new(
        sections: Vec<RecordedSection>,
        description: Option<Arc<VmDescription>>,
        trailing_bytes: u64,
    ) -> Self {
        Self { sections, description, trailing_bytes, layouts: OnceLock::new() }
    }

    /// What is known of the layout of a section.
    pub fn description_of(&self, section: &RecordedSection) -> Option<&DeviceDescription> {
        let description = self.description.as_deref()?;
        self.layouts.get_or_init(|| Layouts::of(description)).find(description, &section.head)
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
        Ok(Self::new(all, description, 0))
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
        Devices::from_tail(&self.early_sections().concat(), state.sections()?, state.end())
            .map_err(|error| Error::invalid(Phase::Device, error))
    }
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
