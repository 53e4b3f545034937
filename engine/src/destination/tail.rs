//! The devices' part of the stream: sections without a length, which are kept as they are.

use std::time::{Duration, Instant};

use multifd_wire::{
    DeviceSection, Item, ItemType, SectionHead, TailEnd, TailScanner, VMDESC_NODE_LEN, VmDescription,
    split_tail,
};

use crate::error::{Error, ErrorKind, Phase, Result};
use crate::guest::PAGE;
use crate::run::budget::Share;
use crate::stream::MainReader;

/// A source that sends no vmdescription and waits for our SHUT shows its end only by falling
/// silent. It flushes everything at once, so this much silence after a footer and EOF is taken for
/// the end.
const QUIET: Duration = Duration::from_secs(1);

/// FULL sections, EOF, and the vmdescription if there is one.
#[derive(Debug)]
pub(crate) struct Tail {
    pub(crate) bytes: Vec<u8>,
    pub(crate) described: Option<Described>,
}

/// A tail that ends in a vmdescription.
#[derive(Debug)]
pub(crate) struct Described {
    /// Where the parts of the tail lie.
    pub(crate) end: TailEnd,
    pub(crate) description: VmDescription,
}

impl Tail {
    /// The devices of a post-copy, `sections`, with an end as a pre-copy has it, so that they can
    /// be sent on: QEMU waits for a description. This one describes no device.
    pub(super) fn packaged(sections: Vec<u8>) -> Result<Self> {
        let devices_len = sections.len();
        let mut bytes = sections;
        Item::Eof.encode(&mut bytes);
        let description =
            VmDescription { configuration: None, page_size: Some(PAGE as u64), devices: Vec::new() };
        let cannot = |error: serde_json::Error| Error::bug(Phase::Device, error);
        let text = serde_json::to_vec(&description).map_err(cannot)?;
        let len = u32::try_from(text.len()).map_err(|error| Error::bug(Phase::Device, error))?;
        bytes.push(ItemType::VmDescription.byte());
        bytes.extend(len.to_be_bytes());
        let begin = bytes.len();
        bytes.extend(text);
        let end = TailEnd { devices_len, total: bytes.len(), vmdesc: begin..bytes.len() };
        Ok(Self { bytes, described: Some(Described { end, description }) })
    }

    /// The one section that the tail consists of, if it has this name: its version and payload.
    pub(super) fn opaque(&self, name: &str) -> Option<(u32, &[u8])> {
        let description = self.described.as_ref().map(|described| &described.description);
        let sections = self.sections();
        match &split_tail(sections, description).ok()?[..] {
            [section] if section.head.idstr == name => {
                Some((section.head.version_id, sections.get(section.payload.clone())?))
            }
            _ => None,
        }
    }

    /// The FULL sections one by one: heads and payloads.
    pub(super) fn split(&self) -> Result<Vec<(SectionHead, &[u8])>> {
        let description = self.described.as_ref().map(|described| &described.description);
        let sections = self.sections();
        let split = split_tail(sections, description);
        let split = split.map_err(|invalid| Error::invalid(Phase::Device, invalid))?;
        let payload = |section: DeviceSection| {
            let payload = sections.get(section.payload);
            let payload = payload.ok_or_else(|| Error::bug(Phase::Device, "a payload beyond its section"))?;
            Ok((section.head, payload))
        };
        split.into_iter().map(payload).collect()
    }

    /// The FULL sections.
    pub(super) fn sections(&self) -> &[u8] {
        // Without a description, EOF is the last byte.
        let len = self.described.as_ref().map_or(self.bytes.len().saturating_sub(1), |it| it.end.devices_len);
        // It is never more: checked when the end was found.
        self.bytes.get(..len).unwrap_or_default()
    }
}

/// Reads to the end of the stream, which the vmdescription marks (docs/wire.md §16.3). `begun`: its
/// first sections, if they were read already.
///
/// `most`: bytes that are kept of it. `memory` holds what it takes, also afterwards.
pub(crate) fn read(
    reader: &mut MainReader,
    begun: &[u8],
    timeout: Duration,
    most: usize,
    memory: &mut Share,
) -> Result<Tail> {
    let quiet = QUIET.min(timeout);
    let channel = reader.channel().clone();
    let limit = |duration| {
        channel
            .set_timeout(Some(duration))
            .map_err(|error| Error::io(Phase::Device, "setting up the socket", error))
    };
    limit(quiet)?;
    let result = scan(reader, begun, timeout, TailScanner::with_limit(most), memory);
    limit(timeout)?;
    result.map_err(|error| error.on(reader.name()))
}

fn scan(
    reader: &mut MainReader,
    begun: &[u8],
    timeout: Duration,
    mut scanner: TailScanner,
    memory: &mut Share,
) -> Result<Tail> {
    let refused = |invalid| Error::invalid(Phase::Device, invalid);
    let mut end = scanner.push(begun).map_err(refused)?;
    let mut last_byte = Instant::now();
    loop {
        let (before, fed) = (scanner.bytes().len(), reader.buffered().len());
        if end.is_none() {
            memory.grow_to(before + fed, Phase::Device, "device state")?;
            end = scanner.push(reader.buffered()).map_err(refused)?;
        }
        if let Some(end) = end {
            let mut bytes = scanner.into_bytes();
            let whole = end.devices_len <= end.total && end.total <= bytes.len();
            let json = bytes.get(end.vmdesc.clone()).filter(|_| whole);
            let json = json.ok_or_else(|| Error::bug(Phase::Device, "an end of devices past their bytes"))?;
            // The names in it are in the text, too.
            let parsed = VmDescription::nodes(json) * VMDESC_NODE_LEN + json.len();
            memory.grow_to(bytes.len() + parsed, Phase::Device, "the description of device state")?;
            let description =
                VmDescription::parse(json).map_err(|invalid| Error::invalid(Phase::Device, invalid))?;
            bytes.truncate(end.total);
            // What is behind the tail stays in the buffer.
            let ahead = end.total.checked_sub(before).ok_or_else(|| {
                let detail = format!("{} bytes follow the end of device state", before - end.total);
                Error::new(ErrorKind::InvalidStream, Phase::Device, detail)
            })?;
            reader.consume(ahead);
            return Ok(Tail { bytes, described: Some(Described { end, description }) });
        }
        reader.consume(fed);
        match reader.fill(Phase::Device, "device state") {
            Ok(true) => last_byte = Instant::now(),
            Ok(false) if scanner.ends_without_description() => return Ok(undescribed(scanner)),
            Ok(false) => {
                let detail = format!(
                    "the stream ended within device state, after {} bytes of it",
                    scanner.bytes().len()
                );
                return Err(Error::new(ErrorKind::Transport, Phase::Device, detail));
            }
            Err(error) if error.kind() == ErrorKind::Deadline && scanner.ends_without_description() => {
                return Ok(undescribed(scanner));
            }
            Err(error) if error.kind() == ErrorKind::Deadline && last_byte.elapsed() < timeout => {}
            Err(error) => return Err(error),
        }
    }
}

fn undescribed(scanner: TailScanner) -> Tail {
    Tail { bytes: scanner.into_bytes(), described: None }
}
