//! The devices' part of a stream, ready to be sent.

use std::fmt;
use std::io::{self, Read};
use std::sync::{Arc, Mutex};

use multifd_wire::{
    BlockName, DescribedSection, Footer, Invalid, Item, ItemType, SectionHead, SectionId, TailScanner,
};

use crate::error::{Error, ErrorKind, Phase, Result};
use crate::guest::PAGE;
use crate::run::stop::lock;

/// Device sections, the end of the stream, and the vmdescription if there is one, as a source wrote
/// them.
#[derive(Clone, Debug)]
pub struct DeviceState {
    /// What comes before the EOF byte.
    sections: Vec<u8>,
    /// Bytes within it that are read when they are sent.
    streamed: Option<Streamed>,
    /// EOF, and what follows it.
    end: Vec<u8>,
    /// Why it cannot be sent.
    wrong: Option<String>,
}

/// Bytes that are not in memory.
#[derive(Clone)]
struct Streamed {
    /// Where they belong among the sections.
    at: usize,
    len: u64,
    /// `None`: they were read.
    from: Arc<Mutex<Option<Box<dyn Read + Send>>>>,
}

/// Number of the first device's section, behind RAM's.
const FIRST_ID: u32 = 2;

/// Bytes of them that are read in one go.
const PIECE: usize = 1 << 20;

impl DeviceState {
    /// No devices: for RAM alone, or a VMM that moves its device state on another way.
    pub fn none() -> Self {
        Self::from_sections(Vec::new(), "")
    }

    /// One section with bytes that only the embedder understands: a VMM's own device state. A QEMU
    /// does not load it.
    ///
    /// `name`: 1..=255 bytes; [`StopCopy::commit`](crate::StopCopy::commit) refuses another before
    /// anything of it is sent. At the destination,
    /// [`Arrived::opaque_state`](crate::Arrived::opaque_state) gives it back.
    pub fn opaque(name: &str, version: u32, state: &[u8]) -> Self {
        let mut this = Self::section(name, version, state.len() as u64);
        let at = this.streamed.take().map_or(0, |streamed| streamed.at);
        this.sections.splice(at..at, state.iter().copied());
        this
    }

    /// Sections with descriptions of their fields, as the crate `multifd-vmstate` makes them of a
    /// VMM's devices. They are numbered anew. A QEMU loads those of devices that it has.
    ///
    /// At the destination, [`Arrived::sections`](crate::Arrived::sections) gives them back.
    pub fn described(sections: &[DescribedSection]) -> Self {
        let mut bytes = Vec::new();
        let mut descriptions = Vec::new();
        for (id, section) in (FIRST_ID..).zip(sections) {
            let head = SectionHead { id: SectionId(id), ..section.head.clone() };
            let described = serde_json::to_string(&section.description);
            let wrong = match (head.idstr.len(), described) {
                (1..=BlockName::MAX_LEN, Ok(text)) => {
                    descriptions.push(text);
                    DescribedSection { head, ..section.clone() }.encode(&mut bytes);
                    continue;
                }
                (_, Err(error)) => format!("the description of {}: {error}", head.idstr),
                (len, Ok(_)) => {
                    format!("a device's name has {len} bytes, expected 1..={}", BlockName::MAX_LEN)
                }
            };
            return Self { wrong: Some(wrong), ..Self::none() };
        }
        Self::from_sections(bytes, &descriptions.join(","))
    }

    /// The same as [`DeviceState::opaque`] of `len` bytes that are read when they are sent, 1 MiB
    /// at a time: state that this end need not have in memory as a whole. They are read once, so
    /// that another attempt needs another value. What the reader takes its time for counts as
    /// downtime, and the destination waits for the next bytes for its timeout. A reader that ends
    /// early or fails ends the migration, and the guest runs on.
    pub fn opaque_from(name: &str, version: u32, len: u64, state: impl Read + Send + 'static) -> Self {
        let mut this = Self::section(name, version, len);
        if let Some(streamed) = &mut this.streamed {
            streamed.from = Arc::new(Mutex::new(Some(Box::new(state))));
        }
        this
    }

    /// A section around `len` bytes, which are still to come.
    fn section(name: &str, version: u32, len: u64) -> Self {
        if !(1..=BlockName::MAX_LEN).contains(&name.len()) {
            let (len, most) = (name.len(), BlockName::MAX_LEN);
            let wrong = format!("the device state's name has {len} bytes, expected 1..={most}");
            return Self { wrong: Some(wrong), ..Self::none() };
        }
        let mut bytes = Vec::new();
        let id = SectionId(FIRST_ID);
        let head = SectionHead { id, idstr: name.to_owned(), instance_id: 0, version_id: version };
        Item::SectionFull(head).encode(&mut bytes);
        let at = bytes.len();
        Footer(id).encode(&mut bytes);
        let device = serde_json::json!({
            "name": name, "instance_id": 0, "size": len,
            "fields": [{ "name": "data", "size": len, "type": "buffer" }],
        });
        let streamed = Streamed { at, len, from: Arc::default() };
        Self { streamed: Some(streamed), ..Self::from_sections(bytes, &device.to_string()) }
    }

    /// `description`: the JSON of the devices, if there are any.
    fn from_sections(sections: Vec<u8>, description: &str) -> Self {
        let mut end = Vec::new();
        let json = format!(r#"{{"page_size": {PAGE}, "devices": [{description}]}}"#);
        Item::Eof.encode(&mut end);
        end.push(ItemType::VmDescription.byte());
        end.extend_from_slice(&u32::try_from(json.len()).unwrap_or(u32::MAX).to_be_bytes());
        end.extend_from_slice(json.as_bytes());
        Self { sections, streamed: None, end, wrong: None }
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
        Ok(Self { sections: bytes, streamed: None, end, wrong: None })
    }

    /// Refuses what would not be understood.
    pub(crate) fn check(&self) -> Result<()> {
        let wrong = self.wrong.as_ref();
        wrong.map_or(Ok(()), |wrong| Err(Error::new(ErrorKind::ApiMisuse, Phase::Device, wrong.clone())))
    }

    /// Gives the FULL sections to `put`, piece by piece.
    ///
    /// # Errors
    /// What `put` says, or a reader that does not have what was announced.
    pub(crate) fn send(&self, mut put: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
        let Some(streamed) = &self.streamed else { return put(&self.sections) };
        let parts = self.sections.split_at_checked(streamed.at);
        let (before, behind) = parts
            .ok_or_else(|| Error::bug(Phase::Device, "a place for bytes behind the devices' sections"))?;
        put(before)?;
        streamed.send(&mut put)?;
        put(behind)
    }

    /// The FULL sections of a recorded stream.
    #[cfg(feature = "at-rest")]
    pub(crate) fn sections(&self) -> Result<&[u8]> {
        if self.streamed.is_some() {
            return Err(Error::bug(Phase::Device, "device state that is not in memory"));
        }
        Ok(&self.sections)
    }

    /// EOF, and what follows it.
    pub(crate) fn end(&self) -> &[u8] {
        &self.end
    }
}

impl Streamed {
    fn send(&self, put: &mut impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
        let taken = lock(&self.from).take();
        let mut from = taken.ok_or_else(|| {
            let detail = "device state whose reader was used up by another attempt";
            Error::new(ErrorKind::ApiMisuse, Phase::Device, detail)
        })?;
        let failed = |left: u64, cause| {
            let (len, sent) = (self.len, self.len - left);
            let detail = format!("reading device state after {sent} of {len} bytes");
            Error::new(ErrorKind::Storage, Phase::Device, detail).because(cause)
        };
        let mut piece = vec![0; PIECE];
        let mut left = self.len;
        while left > 0 {
            let room = usize::try_from(left).unwrap_or(PIECE).min(PIECE);
            let (part, _) = piece.split_at_mut(room);
            match from.read(part) {
                Ok(0) => return Err(failed(left, io::ErrorKind::UnexpectedEof.into())),
                Ok(read) => {
                    let (bytes, _) = part.split_at_checked(read).ok_or_else(|| {
                        let cause = io::Error::other("the reader claims more than it was asked for");
                        failed(left, cause)
                    })?;
                    put(bytes)?;
                    left -= read as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(failed(left, error)),
            }
        }
        Ok(())
    }
}

impl fmt::Debug for Streamed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Streamed").field("at", &self.at).field("len", &self.len).finish_non_exhaustive()
    }
}
