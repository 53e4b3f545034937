//! The main channel of a destination, from the stream header to the last byte.
//!
//! ```text
//!  header, configuration
//!    -> commands: return path, PING, SWITCHOVER_START
//!    -> ram START (blocks, first sync point) -> ram PART ... -> ram END
//!    -> the first FULL section: everything from here on is the devices' (see tail.rs)
//! ```

use std::sync::Arc;
use std::time::Instant;

use multifd_wire::{
    Command, Configuration, Footer, HELLO_PING, Hello, Item, ReturnMessage, SectionHead, SectionId,
    StreamHeader,
};

use super::landing::IncomingRam;
use super::mapped::PageReaders;
use super::ram_section::{RamSection, SectionKind};
use super::return_path::ReturnPath;
use super::shared::Shared;
use super::stream_end;
use super::switchover::SwitchoverAck;
use super::tail::{self, Tail};
use crate::dialect;
use crate::error::{Error, Phase, Result};
use crate::stream::StreamReader;

/// Type bytes of the items that begin the devices' part. Spec: docs/wire.md §1.
const EOF: u8 = 0x00;
const SECTION_FULL: u8 = 0x04;

/// What came in on the main channel, RAM apart.
#[derive(Debug)]
pub(crate) struct MainStream {
    pub(crate) configuration: Configuration,
    /// SWITCHOVER_START was in the stream: a destination of this machine type expects it.
    pub(crate) switchover_start: bool,
    pub(crate) tail: Tail,
    /// When the source announced its last RAM: it had stopped the guest then. `None` in a stream without that, such as a
    /// background snapshot's.
    pub(crate) guest_stopped: Option<Instant>,
}

pub(crate) struct MainChannel<'a> {
    reader: StreamReader,
    shared: &'a Arc<Shared>,
    return_path: ReturnPath,
    ack: SwitchoverAck,
    readers: PageReaders,
    switchover_start: bool,
    guest_stopped: Option<Instant>,
    ram: Option<(SectionId, RamSection<'a>)>,
}

impl<'a> MainChannel<'a> {
    pub(crate) fn new(
        reader: StreamReader,
        shared: &'a Arc<Shared>,
        return_path: ReturnPath,
        ack: SwitchoverAck,
        readers: PageReaders,
    ) -> Self {
        Self {
            reader,
            shared,
            return_path,
            ack,
            readers,
            switchover_start: false,
            guest_stopped: None,
            ram: None,
        }
    }

    /// Reads to the end. Pages land in what `ram` provides.
    pub(crate) fn run(mut self, ram: &mut dyn IncomingRam) -> Result<MainStream> {
        self.reader.next(Phase::Setup, "the stream header", StreamHeader::parse)?;
        let configuration =
            self.reader.next(Phase::Setup, "the configuration section", Configuration::parse)?;
        tracing::debug!(machine = configuration.machine, "configuration");
        if let Some(bits) = configuration.page_bits.filter(|bits| *bits != 12) {
            let detail = format!("pages of 2^{bits} bytes at the source, 2^12 here");
            return Err(Error::incompatible(Phase::Setup, detail).on(self.reader.name()));
        }
        if let Some(uuid) = configuration.uuid {
            self.shared.on_uuid(uuid).map_err(|error| error.on(self.reader.name()))?;
        }
        while self.more_live_items()? {
            let item = self.reader.next(Phase::Active, "a section or command", Item::parse)?;
            self.on_item(item, &configuration, ram).map_err(|error| error.on(self.reader.name()))?;
        }
        self.check_ram_is_complete()?;
        let timeout = self.shared.session.timeout;
        let tail = tail::read(&mut self.reader, timeout)?;
        stream_end::wait(&mut self.reader, &self.return_path, timeout)?;
        let Self { switchover_start, guest_stopped, .. } = self;
        Ok(MainStream { configuration, switchover_start, tail, guest_stopped })
    }

    /// False when the next byte begins the devices' part of the stream.
    fn more_live_items(&mut self) -> Result<bool> {
        let next = self.reader.bytes(Phase::Active, "a section or command", 1)?.first().copied();
        let device_part = matches!(next, Some(EOF | SECTION_FULL));
        if device_part && self.ram.is_none() {
            let detail =
                "device state before any RAM: devices that are saved early (virtio-mem) are not supported";
            return Err(Error::incompatible(Phase::Setup, detail).on(self.reader.name()));
        }
        Ok(!device_part)
    }

    /// With parallel channels, only the sync point of END says that every page is here (docs/wire.md §9).
    fn check_ram_is_complete(&self) -> Result<()> {
        let ended = self.ram.as_ref().is_some_and(|(_, ram)| ram.ended_in_sync());
        if ended || !self.shared.gate.has_channels() {
            return Ok(());
        }
        let detail = "device state, but no END of ram with a sync point before it";
        Err(Error::misbehaved(Phase::Device, detail).on(self.reader.name()))
    }

    fn on_item(
        &mut self,
        item: Item,
        configuration: &Configuration,
        ram: &mut dyn IncomingRam,
    ) -> Result<()> {
        match item {
            Item::Command(command) => self.on_command(&command, configuration),
            Item::SectionStart(head) => self.on_start(head, configuration, ram),
            Item::SectionPart(id) => self.on_ram(id, SectionKind::Part),
            Item::SectionEnd(id) => {
                self.guest_stopped = Some(Instant::now());
                self.on_ram(id, SectionKind::End)
            }
            other => Err(Error::misbehaved(Phase::Active, format!("{other:?} between live sections"))),
        }
    }

    fn on_command(&mut self, command: &Command, configuration: &Configuration) -> Result<()> {
        match *command {
            Command::OpenReturnPath => {
                self.return_path.open();
                if self.ack.wanted_for(configuration) {
                    self.return_path.send(Phase::Setup, &ReturnMessage::SwitchoverAck)?;
                }
                Ok(())
            }
            Command::Ping(value) => {
                if value == HELLO_PING {
                    let hello = Hello { version: dialect::VERSION, features: dialect::FEATURE_DELTAS };
                    self.shared.speak_dialect();
                    self.return_path.send(Phase::Setup, &ReturnMessage::Hello(hello))?;
                }
                self.return_path.send(Phase::Active, &ReturnMessage::Pong(value))
            }
            Command::SwitchoverStart => {
                self.switchover_start = true;
                Ok(())
            }
            // Only says that the source may switch to postcopy later: up to then, nothing differs.
            Command::PostcopyAdvise(advise) => match advise {
                Some(advise) if advise.page_sizes != advise.target_page => Err(Error::incompatible(
                    Phase::Setup,
                    format!(
                        "postcopy with host pages {:#x}: only 4 KiB pages are supported",
                        advise.page_sizes
                    ),
                )),
                _ => Ok(()),
            },
            ref other => {
                Err(Error::incompatible(Phase::Active, format!("command {other:?} is not supported")))
            }
        }
    }

    fn on_start(
        &mut self,
        head: SectionHead,
        configuration: &Configuration,
        ram: &mut dyn IncomingRam,
    ) -> Result<()> {
        if head.idstr != "ram" || head.instance_id != 0 {
            let detail =
                format!("live section {} (instance {}): only ram is supported", head.idstr, head.instance_id);
            return Err(Error::incompatible(Phase::Setup, detail));
        }
        if head.version_id != 4 {
            let detail = format!("ram section version {}, expected 4", head.version_id);
            return Err(Error::incompatible(Phase::Setup, detail));
        }
        if self.ram.is_some() {
            return Err(Error::misbehaved(Phase::Setup, "a second START of ram"));
        }
        let mut section =
            RamSection::start(&mut self.reader, self.shared, configuration, ram, &self.readers)?;
        section.read(&mut self.reader, SectionKind::Start)?;
        self.ram = Some((head.id, section));
        self.footer(head.id)
    }

    fn on_ram(&mut self, id: SectionId, kind: SectionKind) -> Result<()> {
        match &mut self.ram {
            Some((ram, section)) if *ram == id => section.read(&mut self.reader, kind)?,
            Some((ram, _)) => {
                let detail = format!("section id {id}, the only live section is ram ({ram})");
                return Err(Error::misbehaved(Phase::Active, detail));
            }
            None => {
                return Err(Error::misbehaved(Phase::Setup, format!("section id {id} was never started")));
            }
        }
        self.footer(id)
    }

    fn footer(&mut self, id: SectionId) -> Result<()> {
        let Footer(closed) = self.reader.next(Phase::Active, "a section footer", Footer::parse)?;
        if closed == id {
            return Ok(());
        }
        Err(Error::misbehaved(Phase::Active, format!("footer of section {closed} in section {id}")))
    }
}
