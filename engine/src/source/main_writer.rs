//! Writing the section stream on the main channel.

use std::sync::Arc;

use multifd_transports::Channel;
use multifd_wire::{
    Command, Configuration, Footer, Item, RAM_SECTION, RAM_SECTION_VERSION, RamRecord, SectionHead,
    SectionId, StreamHeader,
};

use super::outgoing::OutgoingRam;
use super::rounds::{BlockNaming, ZeroReport};
use crate::error::{Error, Phase, Result};
use crate::guest::PAGE_SIZE;
use crate::io::{MainFile, Ranges};

/// The RAM section's number in our streams. Any would do; QEMU's x86 machines use this one.
const RAM_ID: SectionId = SectionId(1);

/// Bytes gathered before they are sent, when nothing else calls for it: QEMU's own buffer.
const FLUSH_AT: usize = 32 << 10;

/// Writes items; nothing is on the wire before [`MainWriter::flush`] or a full buffer.
pub(super) struct MainWriter {
    channel: Arc<Channel>,
    buffer: Vec<u8>,
    naming: BlockNaming,
    phase: Phase,
    /// Main is a file.
    file: Option<MainFile>,
}

impl MainWriter {
    /// `file`: main is this one.
    pub(super) fn new(channel: Arc<Channel>, file: Option<MainFile>) -> Self {
        Self {
            channel,
            buffer: Vec::with_capacity(2 * FLUSH_AT),
            naming: BlockNaming::default(),
            phase: Phase::Setup,
            file,
        }
    }

    /// The phase that errors name from now on.
    pub(super) fn enter(&mut self, phase: Phase) {
        self.phase = phase;
    }

    pub(super) fn channel(&self) -> &Arc<Channel> {
        &self.channel
    }

    pub(super) fn header(&mut self, configuration: &Configuration) {
        StreamHeader.encode(&mut self.buffer);
        configuration.encode(&mut self.buffer);
    }

    pub(super) fn command(&mut self, command: Command) -> Result<()> {
        Item::Command(command).encode(&mut self.buffer);
        self.flush()
    }

    /// A command that others follow.
    pub(super) fn queue(&mut self, command: Command) -> Result<()> {
        Item::Command(command).encode(&mut self.buffer);
        if self.buffer.len() >= FLUSH_AT { self.flush() } else { Ok(()) }
    }

    pub(super) fn ping(&mut self, value: u32) -> Result<()> {
        self.command(Command::Ping(value))
    }

    /// Begins the RAM section with the list of blocks.
    pub(super) fn ram_start(&mut self, ram: &OutgoingRam) {
        self.ram_head(ram);
        ram.list().for_each(|entry| entry.encode(&mut self.buffer));
    }

    /// Begins the RAM section as far as the entries of the list.
    pub(super) fn ram_head(&mut self, ram: &OutgoingRam) {
        let (idstr, version_id) = (RAM_SECTION.to_owned(), RAM_SECTION_VERSION);
        let head = SectionHead { id: RAM_ID, idstr, instance_id: 0, version_id };
        Item::SectionStart(head).encode(&mut self.buffer);
        self.record(&RamRecord::MemSize { total: ram.total_bytes() });
    }

    pub(super) fn ram_part(&mut self) {
        Item::SectionPart(RAM_ID).encode(&mut self.buffer);
    }

    /// A piece of RAM without a page, as a source that has nothing to send sends it.
    pub(super) fn empty_piece_of_ram() -> Vec<u8> {
        let mut piece = Vec::new();
        Item::SectionPart(RAM_ID).encode(&mut piece);
        RamRecord::EndOfSection.encode(PAGE_SIZE, &mut piece);
        Footer(RAM_ID).encode(&mut piece);
        piece
    }

    pub(super) fn ram_end(&mut self) {
        Item::SectionEnd(RAM_ID).encode(&mut self.buffer);
    }

    /// Closes the section item that is open, and sends it.
    pub(super) fn end_of_section(&mut self) -> Result<()> {
        self.record(&RamRecord::EndOfSection);
        Footer(RAM_ID).encode(&mut self.buffer);
        self.flush()
    }

    pub(super) fn record(&mut self, record: &RamRecord) {
        record.encode(PAGE_SIZE, &mut self.buffer);
    }

    /// Zero pages of one block.
    pub(super) fn zero_pages(&mut self, ram: &OutgoingRam, report: &ZeroReport) -> Result<()> {
        let name = ram.blocks.at(report.block).block.name();
        for offset in &report.offsets {
            let block = self.naming.refer(report.block, name);
            self.record(&RamRecord::Zero { offset: *offset, block });
        }
        if self.buffer.len() >= FLUSH_AT { self.flush() } else { Ok(()) }
    }

    /// How a page record of the block names it, after all records so far.
    pub(super) fn naming(&mut self) -> &mut BlockNaming {
        &mut self.naming
    }

    /// Ends the stream of a post-copy, which has no vmdescription.
    pub(super) fn eof(&mut self) -> Result<()> {
        Item::Eof.encode(&mut self.buffer);
        self.flush()
    }

    /// Buffered bytes. A caller that writes to the channel directly must send these first.
    pub(super) fn unsent(&mut self) -> &mut Vec<u8> {
        &mut self.buffer
    }

    /// Sends bytes as they are, after what is buffered.
    pub(super) fn raw(&mut self, bytes: &[u8]) -> Result<()> {
        self.flush()?;
        self.channel.send_all(bytes).map_err(|error| self.error(error))
    }

    /// Sends ranges of memory as they are, before what is buffered.
    pub(super) fn ranges(&self, list: Ranges<'_>) -> std::io::Result<()> {
        match &self.file {
            Some(file) => list.write(file),
            None => list.send(&self.channel),
        }
    }

    pub(super) fn flush(&mut self) -> Result<()> {
        if !self.buffer.is_empty() {
            self.channel.send_all(&self.buffer).map_err(|error| self.error(error))?;
            self.buffer.clear();
        }
        Ok(())
    }

    pub(super) fn error(&self, error: std::io::Error) -> Error {
        if self.file.is_some() {
            Error::storage(self.phase, "writing", error).on(self.name())
        } else {
            Error::io(self.phase, "sending", error).on(self.name())
        }
    }

    pub(super) fn name(&self) -> String {
        format!("main ({})", self.channel.peer())
    }
}
