//! Device sections before the end of RAM. Spec: docs/wire.md §16.4.

use multifd_wire::{Footer, Item, SectionHead, SectionId, TailScanner};

use super::machine::DeviceEnd;
use crate::error::{Error, ErrorKind, Phase, Result};
use crate::run::budget::Share;
use crate::stream::MainReader;
use crate::stream::sections::{EarlySections, Found, find_footer, goes_on};
use crate::stream::vm_state::VmState;

const WHAT: &str = "a device section before the end of RAM";

/// Reads and keeps them. Whether a section is early shows only behind it: if RAM goes on, it was;
/// if the stream ends, it belongs to the devices' part of a stream without an END of RAM.
#[derive(Debug)]
pub(super) struct EarlyDevices {
    kept: EarlySections,
    /// Sections behind the last live item.
    open: Vec<u8>,
    seen: Vec<SectionId>,
    /// What the source's embedder says of its VM, if that was read and not taken yet.
    vm: Option<VmState>,
    /// Most bytes that are kept.
    limit: usize,
    memory: Share,
}

impl EarlyDevices {
    /// None yet, and no more than so many bytes. `memory` holds what is kept.
    pub(super) fn new(limit: usize, memory: Share) -> Self {
        Self { kept: EarlySections::default(), open: Vec::new(), seen: Vec::new(), vm: None, limit, memory }
    }

    /// Reads one FULL section behind its `head`, its footer included. `ram`: the RAM section, if it
    /// has begun.
    pub(super) fn read(
        &mut self,
        reader: &mut MainReader,
        head: SectionHead,
        ram: Option<SectionId>,
    ) -> Result<DeviceEnd> {
        let id = head.id;
        Item::SectionFull(head.clone()).encode(&mut self.open);
        self.seen.push(id);
        let begin = self.open.len();
        let end = self.payload(reader, id, ram)?;
        if end == DeviceEnd::Footer {
            let payload = self.open.get(begin..self.open.len().saturating_sub(Footer::LEN));
            let payload =
                payload.ok_or_else(|| Error::bug(Phase::Active, "a device section without a footer"))?;
            self.vm = VmState::parse(&head, payload)?;
        }
        Ok(end)
    }

    /// What the source's embedder says of its VM, once.
    pub(super) fn take_vm(&mut self) -> Option<VmState> {
        self.vm.take()
    }

    /// Reads to the footer of section `id`. What looks like a footer, and is none, may hide the
    /// true one: so the end of the stream is looked for, too.
    fn payload(
        &mut self,
        reader: &mut MainReader,
        id: SectionId,
        ram: Option<SectionId>,
    ) -> Result<DeviceEnd> {
        let (mut tail, mut scanned) = (TailScanner::with_limit(self.limit), 0);
        loop {
            let follows = |next: &[u8]| goes_on(next, ram, |other| self.seen.contains(&other));
            let found = find_footer(reader.buffered(), id, follows);
            if matches!(found, Found::Unsure(_)) {
                let new = reader.buffered().get(scanned..);
                let new = new.ok_or_else(|| Error::bug(Phase::Active, "more was scanned than came"))?;
                let end = tail.push(new).map_err(|invalid| Error::invalid(Phase::Active, invalid))?;
                if end.is_some() {
                    return Ok(DeviceEnd::Stream);
                }
                scanned = reader.buffered().len();
            }
            let (Found::Whole(taken) | Found::Unsure(taken)) = found;
            let payload = reader.buffered().get(..taken);
            let payload = payload.ok_or_else(|| Error::bug(Phase::Active, "a footer before its section"))?;
            self.open.extend_from_slice(payload);
            reader.consume(taken);
            scanned -= taken.min(scanned);
            let kept = self.kept.before_ram.len() + self.kept.within_ram.len() + self.open.len();
            self.memory.grow_to(kept, Phase::Active, "device state before the end of RAM")?;
            if kept > self.limit {
                let detail = format!("more than {} bytes of device state before the end of RAM", self.limit);
                return Err(Error::misbehaved(Phase::Active, detail));
            }
            if matches!(found, Found::Whole(_)) {
                return Ok(DeviceEnd::Footer);
            }
            if !reader.fill(Phase::Active, WHAT)? {
                if tail.ends_without_description() {
                    return Ok(DeviceEnd::Stream);
                }
                let detail = format!("the stream ended at byte {}, within {WHAT}", reader.position());
                return Err(Error::new(ErrorKind::Transport, Phase::Active, detail));
            }
        }
    }

    /// RAM, or a command, comes next: the sections up to here were early.
    pub(super) fn place(&mut self, ram_has_begun: bool) {
        let place = if ram_has_begun { &mut self.kept.within_ram } else { &mut self.kept.before_ram };
        place.append(&mut self.open);
    }

    /// What was early, and what the devices' part begins with.
    pub(super) fn into_parts(self) -> (EarlySections, Vec<u8>) {
        (self.kept, self.open)
    }
}
