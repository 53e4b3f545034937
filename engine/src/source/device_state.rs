//! The devices' part of a stream, ready to be sent.

use multifd_wire::{BlockName, Footer, Invalid, Item, ItemType, SectionHead, SectionId, TailScanner};

use crate::error::{Error, ErrorKind, Phase};
use crate::guest::PAGE;

/// Device sections, the end of the stream, and the vmdescription if there is one, as a source wrote them.
#[derive(Clone, Debug)]
pub struct DeviceState {
    /// What comes before the EOF byte.
    sections: Vec<u8>,
    /// EOF, and what follows it.
    end: Vec<u8>,
    /// Why it cannot be sent.
    wrong: Option<String>,
}

impl DeviceState {
    /// No devices: for RAM alone, or a VMM that moves its device state on another way.
    pub fn none() -> Self {
        Self::from_sections(Vec::new(), "")
    }

    /// One section with bytes that only the embedder understands: a VMM's own device state. A QEMU does not load it.
    ///
    /// `name`: 1..=255 bytes; [`StopCopy::commit`](crate::StopCopy::commit) refuses another before
    /// anything of it is sent. At the destination, [`Arrived::opaque_state`](crate::Arrived::opaque_state) gives it back.
    pub fn opaque(name: &str, version: u32, state: &[u8]) -> Self {
        if !(1..=BlockName::MAX_LEN).contains(&name.len()) {
            let (len, most) = (name.len(), BlockName::MAX_LEN);
            let wrong = format!("the device state's name has {len} bytes, expected 1..={most}");
            return Self { wrong: Some(wrong), ..Self::none() };
        }
        let mut bytes = Vec::with_capacity(state.len() + 512);
        let id = SectionId(2);
        let head = SectionHead { id, idstr: name.to_owned(), instance_id: 0, version_id: version };
        Item::SectionFull(head).encode(&mut bytes);
        bytes.extend_from_slice(state);
        Footer(id).encode(&mut bytes);
        let device = serde_json::json!({
            "name": name, "instance_id": 0, "size": state.len(),
            "fields": [{ "name": "data", "size": state.len(), "type": "buffer" }],
        });
        Self::from_sections(bytes, &device.to_string())
    }

    /// `description`: the JSON of the devices, if there are any.
    fn from_sections(sections: Vec<u8>, description: &str) -> Self {
        let mut end = Vec::new();
        let json = format!(r#"{{"page_size": {PAGE}, "devices": [{description}]}}"#);
        Item::Eof.encode(&mut end);
        end.push(ItemType::VmDescription.byte());
        end.extend_from_slice(&u32::try_from(json.len()).unwrap_or(u32::MAX).to_be_bytes());
        end.extend_from_slice(json.as_bytes());
        Self { sections, end, wrong: None }
    }

    /// Takes the tail of a recorded stream: from the first FULL section to the end.
    ///
    /// # Errors
    /// Bytes that do not end as a stream does.
    pub fn from_tail(mut bytes: Vec<u8>) -> Result<Self, Invalid> {
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
        let end = bytes.split_off(sections_len);
        Ok(Self { sections: bytes, end, wrong: None })
    }

    /// Refuses what would not be understood.
    pub(crate) fn check(&self) -> Result<(), Error> {
        let wrong = self.wrong.as_ref();
        wrong.map_or(Ok(()), |wrong| Err(Error::new(ErrorKind::ApiMisuse, Phase::Device, wrong.clone())))
    }

    /// The FULL sections.
    pub(crate) fn sections(&self) -> &[u8] {
        &self.sections
    }

    /// EOF, and what follows it.
    pub(crate) fn end(&self) -> &[u8] {
        &self.end
    }
}
