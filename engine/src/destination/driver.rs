//! The main channel of a destination: reads what the machine expects, and does what it decides.

use std::sync::Arc;
use std::time::Instant;

use multifd_wire::{Configuration, Footer, Item, StreamHeader};

use super::arrival;
use super::early::EarlyDevices;
use super::machine::{Effect, Expected, Facts, Input, Machine, Observed};
use super::mapped::PageReaders;
use super::place::IncomingRam;
use super::ram_reader::{Mark, RamReader};
use super::return_path::ReturnPath;
use super::shared::DestinationShared;
use super::stream_end;
use super::switchover::SwitchoverAck;
use super::tail::{self, Tail};
use crate::error::{Error, Phase, Result};
use crate::run::budget::Share;
use crate::run::counters::Counters;
use crate::stream::MainReader;
use crate::stream::sections::EarlySections;
use crate::stream::vm_state::VmState;

/// What came in on the main channel, RAM apart.
#[derive(Debug)]
pub(super) struct ReceivedMain {
    pub(super) configuration: Configuration,
    /// SWITCHOVER_START was in the stream: a destination of this machine type expects it.
    pub(super) switchover_start: bool,
    /// Device sections that came before the end of RAM.
    pub(super) early: EarlySections,
    pub(super) tail: Tail,
    /// When the source announced its last RAM: it had stopped the guest then. `None` in a stream
    /// without that, such as a background snapshot's.
    pub(super) guest_stopped: Option<Instant>,
    /// Of the tail.
    _memory: Share,
}

/// Reads the main channel, from the stream header to the last byte.
pub(super) struct Driver<'a> {
    reader: MainReader,
    shared: &'a Arc<DestinationShared>,
    return_path: ReturnPath,
    machine: Machine,
    readers: PageReaders,
    incoming: &'a mut dyn IncomingRam,
    ram: Option<RamReader>,
    early: EarlyDevices,
}

impl<'a> Driver<'a> {
    /// `incoming` provides the memory that pages go to.
    pub(super) fn new(
        reader: MainReader,
        shared: &'a Arc<DestinationShared>,
        return_path: ReturnPath,
        ack: SwitchoverAck,
        readers: PageReaders,
        incoming: &'a mut dyn IncomingRam,
    ) -> Self {
        let machine = Machine::new(return_path.leads_back(), ack);
        let early = EarlyDevices::new(shared.limits.device_state, shared.limits.memory.share());
        Self { reader, shared, return_path, machine, readers, incoming, ram: None, early }
    }

    /// Reads to the end.
    pub(super) fn run(mut self) -> Result<ReceivedMain> {
        let name = self.reader.name();
        let begins = self.live_part().map_err(|error| error.on(name.clone()))?;
        self.devices_part(begins).map_err(|error| error.on(name))
    }

    /// Everything before the devices' part; the item that this begins with.
    fn live_part(&mut self) -> Result<Option<Item>> {
        loop {
            let input = match self.machine.expects()? {
                Expected::Tail { begins } => return Ok(begins),
                expected => self.read(expected)?,
            };
            let observed = Observed {
                now: Instant::now(),
                pages: self.shared.session.counters.pages(),
                has_channels: self.shared.channels.has_channels(),
            };
            for effect in self.machine.on(input, &observed)? {
                self.perform(effect)?;
            }
        }
    }

    fn read(&mut self, expected: Expected) -> Result<Input> {
        let reader = &mut self.reader;
        Ok(match expected {
            Expected::Configuration => {
                reader.next(Phase::Setup, "the stream header", StreamHeader::parse)?;
                let what = "the configuration section";
                Input::Configuration(reader.next(Phase::Setup, what, Configuration::parse)?)
            }
            Expected::Item => Input::Item(reader.next(Phase::Active, "a section or command", Item::parse)?),
            Expected::Blocks { mapped } => {
                let configuration = configuration(self.machine.facts())?;
                let (shared, incoming) = (self.shared, &mut *self.incoming);
                let ram = RamReader::open(reader, shared, configuration, incoming, &self.readers, mapped)?;
                self.ram = Some(ram);
                Input::Blocks
            }
            Expected::Records { mapped } => {
                let none = || Error::bug(Phase::Active, "records of RAM without blocks");
                let ram = self.ram.as_mut().ok_or_else(none)?;
                match ram.read(reader, &self.shared.session.counters.main, mapped)? {
                    Mark::EndOfRecords => Input::EndOfRecords,
                    Mark::Flush => Input::Flush,
                }
            }
            Expected::Footer => {
                let Footer(id) = reader.next(Phase::Active, "a section footer", Footer::parse)?;
                Input::Footer(id)
            }
            Expected::Device { head, ram } => {
                let end = self.early.read(reader, head, ram)?;
                if let Some(VmState { name, version, bytes }) = self.early.take_vm() {
                    self.incoming.configure(&name, version, &bytes).map_err(|cause| {
                        let detail = format!("the state of the source's VM, {name} version {version}");
                        Error::incompatible(Phase::Setup, detail).because(cause)
                    })?;
                }
                Input::Device(end)
            }
            Expected::Tail { .. } => return Err(Error::bug(Phase::Device, "the devices' part is no input")),
        })
    }

    fn perform(&mut self, effect: Effect) -> Result<()> {
        match effect {
            Effect::Answer(phase, message) => self.return_path.send(phase, &message),
            Effect::CheckUuid(uuid) => self.shared.on_uuid(uuid),
            Effect::CountRound => {
                Counters::add(&self.shared.session.counters.rounds, 1);
                Ok(())
            }
            Effect::KeepEarly { within_ram } => {
                self.early.place(within_ram);
                Ok(())
            }
            Effect::OpenReturnPath => {
                self.return_path.open();
                Ok(())
            }
            Effect::SpeakDialect => {
                self.shared.speak_dialect();
                self.return_path.speak_dialect();
                Ok(())
            }
            Effect::SyncPoint => self.shared.sync_point(),
        }
    }

    /// The devices' part, and what must be true of RAM at its end. `begins`: its first item, if it
    /// was read already.
    fn devices_part(mut self, begins: Option<Item>) -> Result<ReceivedMain> {
        let none = || Error::bug(Phase::Device, "the devices' part without RAM before it");
        let ram = self.ram.ok_or_else(none)?;
        let (early, mut begun) = self.early.into_parts();
        if let Some(item) = begins {
            item.encode(&mut begun);
        }
        let timeout = self.shared.session.timeout;
        let mut memory = self.shared.limits.memory.share();
        memory.grow_to(begun.len(), Phase::Device, "device state")?;
        let most = self.shared.limits.device_state;
        let tail = tail::read(&mut self.reader, &begun, timeout, most, &mut memory)?;
        arrival::check_all_came(ram.sinks(), &early, &tail)?;
        stream_end::wait(&mut self.reader, &self.return_path, timeout)?;
        let Facts { configuration, switchover_start, guest_stopped } = self.machine.facts().clone();
        let none = || Error::bug(Phase::Device, "the devices' part without a configuration");
        let configuration = configuration.ok_or_else(none)?;
        Ok(ReceivedMain { configuration, switchover_start, early, tail, guest_stopped, _memory: memory })
    }
}

fn configuration(facts: &Facts) -> Result<&Configuration> {
    facts.configuration.as_ref().ok_or_else(|| Error::bug(Phase::Setup, "RAM before the configuration"))
}
