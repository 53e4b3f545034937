//! The main channel of a destination, from the stream header to the last byte.
//!
//! ```text
//!  header, configuration
//!    -> commands: return path, PING, SWITCHOVER_START
//!    -> ram START (blocks, first sync point) -> ram PART ... -> ram END
//!       between them FULL sections of devices that are saved early (see early.rs)
//!    -> the first FULL section behind END: everything from here on is the devices' (see tail.rs)
//! ```

use std::sync::Arc;
use std::time::Instant;

use multifd_wire::{
    Command, Configuration, Footer, HELLO_PING, Hello, Item, ItemType, RAM_SECTION, RAM_SECTION_VERSION,
    ReturnMessage, SectionHead, SectionId, StreamHeader,
};

use super::arrival;
use super::early::{EarlyDevices, Read};
use super::mapped::PageReaders;
use super::place::IncomingRam;
use super::ram_section::{RamSection, SectionKind};
use super::return_path::ReturnPath;
use super::shared::DestinationShared;
use super::stream_end;
use super::switchover::{Acknowledgement, SwitchoverAck};
use super::tail::{self, Tail};
use crate::error::{Error, Phase, Result};
use crate::stream::MainReader;
use crate::stream::dialect;
use crate::stream::sections::EarlySections;

/// Type bytes of the items that begin the devices' part.
const EOF: u8 = ItemType::Eof.byte();
const SECTION_FULL: u8 = ItemType::SectionFull.byte();

/// Refusal of POSTCOPY_ADVISE.
const NO_POSTCOPY: &str = "the source may switch to postcopy, which is not supported here and would lose the guest: \
    switch off capability postcopy-ram at the source (and dirty-bitmaps, if it is on)";

/// What came in on the main channel, RAM apart.
#[derive(Debug)]
pub(crate) struct ReceivedMain {
    pub(crate) configuration: Configuration,
    /// SWITCHOVER_START was in the stream: a destination of this machine type expects it.
    pub(crate) switchover_start: bool,
    /// Device sections that came before the end of RAM.
    pub(crate) early: EarlySections,
    pub(crate) tail: Tail,
    /// When the source announced its last RAM: it had stopped the guest then. `None` in a stream without that, such as a
    /// background snapshot's.
    pub(crate) guest_stopped: Option<Instant>,
}

pub(crate) struct MainChannel<'a> {
    reader: MainReader,
    shared: &'a Arc<DestinationShared>,
    return_path: ReturnPath,
    /// The source has asked for the return path, whether anything can be said on it or not.
    wants_answers: bool,
    ack: Acknowledgement,
    readers: PageReaders,
    switchover_start: bool,
    guest_stopped: Option<Instant>,
    early: EarlyDevices,
    /// Sync points up to the last PART.
    synced: u64,
    ram: Option<(SectionId, RamSection<'a>)>,
}

impl<'a> MainChannel<'a> {
    pub(crate) fn new(
        reader: MainReader,
        shared: &'a Arc<DestinationShared>,
        return_path: ReturnPath,
        ack: SwitchoverAck,
        readers: PageReaders,
    ) -> Self {
        Self {
            reader,
            shared,
            return_path,
            wants_answers: false,
            ack: Acknowledgement::new(ack),
            readers,
            switchover_start: false,
            guest_stopped: None,
            early: EarlyDevices::default(),
            synced: 0,
            ram: None,
        }
    }

    /// Reads to the end. Pages land in what `ram` provides.
    pub(crate) fn run(mut self, ram: &mut dyn IncomingRam) -> Result<ReceivedMain> {
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
        self.finish(configuration)
    }

    /// The devices' part, and what must be true of RAM at its end.
    fn finish(mut self, configuration: Configuration) -> Result<ReceivedMain> {
        let name = self.reader.name();
        let Some((_, ram)) = &self.ram else {
            let detail = "the end of the stream before any RAM";
            return Err(Error::misbehaved(Phase::Setup, detail).on(name));
        };
        self.check_ram_has_ended(ram).map_err(|error| error.on(name.clone()))?;
        let (early, begun) = self.early.into_parts();
        let timeout = self.shared.session.timeout;
        let tail = tail::read(&mut self.reader, &begun, timeout)?;
        arrival::check_all_came(ram.sinks(), &early, &tail).map_err(|error| error.on(name))?;
        stream_end::wait(&mut self.reader, &self.return_path, timeout)?;
        let Self { switchover_start, guest_stopped, .. } = self;
        Ok(ReceivedMain { configuration, switchover_start, early, tail, guest_stopped })
    }

    /// False when the next byte begins the devices' part of the stream: the end, or a device behind the END of RAM.
    fn more_live_items(&mut self) -> Result<bool> {
        loop {
            const WHAT: &str = "a section or command";
            let next = self.reader.peek(Phase::Active, WHAT, 1)?.first().copied();
            let ram = self.ram.as_ref();
            match next {
                Some(EOF) => return Ok(false),
                Some(SECTION_FULL) if ram.is_some_and(|(_, ram)| ram.ended()) => return Ok(false),
                Some(SECTION_FULL) => {
                    let id = ram.map(|(id, _)| *id);
                    let read = self.early.read(&mut self.reader, id);
                    if read.map_err(|error| error.on(self.reader.name()))? == Read::EndOfStream {
                        return Ok(false);
                    }
                }
                None => return Err(self.reader.ended(Phase::Active, WHAT)),
                Some(_) => {
                    self.early.place(ram.is_some());
                    return Ok(true);
                }
            }
        }
    }

    /// Only a background snapshot has no END of RAM; it goes without a return path and without parallel channels, on which only the
    /// sync point of END says that every page is here (docs/wire.md §9).
    fn check_ram_has_ended(&self, ram: &RamSection<'_>) -> Result<()> {
        let detail = match (ram.ended(), self.shared.channels.has_channels()) {
            (_, true) if !ram.ended_in_sync() => {
                "device state, but no END of ram with a sync point before it"
            }
            (false, false) if self.wants_answers => "device state, but no END of ram before it",
            _ => return Ok(()),
        };
        Err(Error::misbehaved(Phase::Device, detail))
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
            Item::SectionPart(id) => {
                self.on_ram(id, SectionKind::Part)?;
                self.acknowledge_if_waited_for()
            }
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
                self.wants_answers = true;
                if self.ack.due_at_opening(configuration) {
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
            // What was recorded can no longer switch to postcopy: only a source that hears answers does.
            Command::PostcopyAdvise(_) if !self.return_path.leads_back() => Ok(()),
            // Once it has begun postcopy, a source cannot go back: its guest would be lost with the refusal.
            Command::PostcopyAdvise(_) => Err(Error::incompatible(Phase::Setup, NO_POSTCOPY)),
            ref other => {
                Err(Error::incompatible(Phase::Active, format!("command {other:?} is not supported")))
            }
        }
    }

    /// Tells a source that has nothing left to send, and does not switch over, that it may.
    fn acknowledge_if_waited_for(&mut self) -> Result<()> {
        let synced = self.ram.as_ref().map_or(0, |(_, ram)| ram.syncs());
        let through = !self.shared.channels.has_channels() || synced > self.synced;
        self.synced = synced;
        if !self.return_path.is_open() || !through {
            return Ok(());
        }
        let pages = self.shared.session.counters.pages();
        if self.ack.due_after_part(pages, Instant::now()) {
            tracing::debug!("the source waits for an acknowledgement of the switch-over");
            self.return_path.send(Phase::Active, &ReturnMessage::SwitchoverAck)?;
        }
        Ok(())
    }

    fn on_start(
        &mut self,
        head: SectionHead,
        configuration: &Configuration,
        ram: &mut dyn IncomingRam,
    ) -> Result<()> {
        if head.idstr != RAM_SECTION || head.instance_id != 0 {
            let detail =
                format!("live section {} (instance {}): only ram is supported", head.idstr, head.instance_id);
            return Err(Error::incompatible(Phase::Setup, detail));
        }
        if head.version_id != RAM_SECTION_VERSION {
            let detail = format!("ram section version {}, expected {RAM_SECTION_VERSION}", head.version_id);
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
