//! The main channel of a destination: reads what the machine expects, and does what it decides.

use std::sync::Arc;
use std::time::Instant;

use multifd_wire::{
    BlockName, Configuration, DiscardRange, Footer, Item, ReturnMessage, SectionId, StreamHeader,
};

use super::arrival;
use super::early::EarlyDevices;
use super::hold;
use super::machine::{Effect, Expected, Facts, Input, Machine, Observed};
use super::mapped::PageReaders;
use super::place::IncomingRam;
use super::postcopy::package::Package;
use super::postcopy::serving::Serving;
use super::postcopy::{Guest, listen};
use super::ram_reader::{Mark, RamReader};
use super::return_path::ReturnPath;
use super::shared::DestinationShared;
use super::stream_end;
use super::switchover::SwitchoverAck;
use super::tail::{self, Tail};
use crate::error::{Error, Phase, Result};
use crate::run::budget::Share;
use crate::run::counters::Counters;
use crate::run::secret;
use crate::stream::MainReader;
use crate::stream::dialect::{self, FEATURE_RESUMPTION};
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

/// How far the stream goes while the guest may still run at the source.
pub(super) enum Switched {
    /// To its end: all of RAM is here.
    Arrived(Arc<ReceivedMain>),
    /// To RUN: pages follow, which the driver reads.
    Running(Box<Driver>),
}

/// Reads the main channel, from the stream header to the last byte.
pub(super) struct Driver {
    reader: MainReader,
    shared: Arc<DestinationShared>,
    return_path: ReturnPath,
    machine: Machine,
    readers: PageReaders,
    incoming: Box<dyn IncomingRam>,
    guest: Guest,
    ram: Option<RamReader>,
    early: EarlyDevices,
    /// Items come from here before they come from main.
    package: Option<Package>,
    /// Pages come on the parallel channels after LISTEN, too.
    keeps_channels: bool,
    /// From LISTEN on.
    serving: Option<Arc<Serving>>,
    /// The devices' sections of a package.
    devices: Vec<u8>,
    /// Theirs.
    devices_memory: Share,
    /// PINGs to be answered when the devices have been loaded.
    when_loaded: Vec<u32>,
}

impl Driver {
    /// `incoming` provides the memory that pages go to; `guest`: where the guest of a post-copy
    /// runs.
    pub(super) fn new(
        reader: MainReader,
        shared: &Arc<DestinationShared>,
        return_path: ReturnPath,
        ack: SwitchoverAck,
        readers: PageReaders,
        incoming: Box<dyn IncomingRam>,
        guest: Guest,
    ) -> Self {
        let package = (guest != Guest::NoPostcopy).then_some(shared.limits.device_state);
        let resumes = if shared.resumption.is_some() { FEATURE_RESUMPTION } else { 0 };
        let features = dialect::features(&shared.codecs) | resumes;
        let machine = Machine::new(return_path.leads_back(), ack, package).offering(features);
        Self {
            reader,
            shared: Arc::clone(shared),
            return_path,
            machine,
            readers,
            incoming,
            guest,
            ram: None,
            early: EarlyDevices::new(shared.limits.device_state, shared.limits.memory.share()),
            package: None,
            keeps_channels: false,
            serving: None,
            devices: Vec::new(),
            devices_memory: shared.limits.memory.share(),
            when_loaded: Vec::new(),
        }
    }

    /// Reads to the end, or up to where the guest may run.
    pub(super) fn run(mut self) -> Result<Switched> {
        let name = self.reader.name();
        let live = self.live_part().inspect_err(|_| self.give_back());
        let begins = live.map_err(|error| error.on(name.clone()))?;
        if self.machine.has_switched() {
            return Ok(Switched::Running(Box::new(self)));
        }
        self.devices_part(begins)
            .map(|received| Switched::Arrived(Arc::new(received)))
            .map_err(|error| error.on(name))
    }

    /// Everything before the devices' part, and the item that this begins with; or before what
    /// follows RUN.
    fn live_part(&mut self) -> Result<Option<Item>> {
        loop {
            match self.machine.expects()? {
                Expected::Tail { begins } => return Ok(begins),
                expected => self.step(expected)?,
            }
            if self.machine.has_switched() {
                return Ok(None);
            }
        }
    }

    /// What follows RUN, to the end of the stream.
    pub(super) fn postcopy_part(&mut self) -> Result<()> {
        let name = self.reader.name();
        let mut pages = || loop {
            match self.machine.expects()? {
                Expected::End => return Ok(()),
                expected => self.step(expected)?,
            }
        };
        pages().map_err(|error: Error| error.on(name))
    }

    fn step(&mut self, expected: Expected) -> Result<()> {
        let input = self.read(expected)?;
        let observed = Observed {
            now: Instant::now(),
            pages: self.shared.session.counters.pages(),
            has_channels: self.shared.channels.has_channels(),
        };
        let effects = self.machine.on(input, &observed)?;
        effects.into_iter().try_for_each(|effect| self.perform(effect))
    }

    fn read(&mut self, expected: Expected) -> Result<Input> {
        // Before there is RAM a source has nothing to be held for, and behind a switch it goes on
        // at once.
        let may_be_held = self.ram.is_some() && self.package.is_none() && !self.machine.has_switched();
        let between_rounds = may_be_held && matches!(expected, Expected::Item | Expected::Footer);
        if let Some(limit) = self.shared.limits.hold.filter(|_| between_rounds) {
            hold::wait_between_rounds(&mut self.reader, limit)?;
        }
        let reader = &mut self.reader;
        Ok(match expected {
            Expected::Configuration => {
                reader.next(Phase::Setup, "the stream header", StreamHeader::parse)?;
                let what = "the configuration section";
                Input::Configuration(reader.next(Phase::Setup, what, Configuration::parse)?)
            }
            Expected::Item => Input::Item(match &mut self.package {
                Some(package) => package.item()?,
                None => reader.next(Phase::Active, "a section or command", Item::parse)?,
            }),
            Expected::Blocks { mapped } => {
                self.open_blocks(mapped)?;
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
                if let Some(vm) = self.early.take_vm() {
                    let VmState { name, version, bytes } = &vm;
                    self.incoming.configure(name, *version, bytes).map_err(|cause| {
                        let detail = format!("the state of the source's VM, {name} version {version}");
                        Error::incompatible(Phase::Setup, detail).because(cause)
                    })?;
                    self.shared.resumption.iter().for_each(|kept| kept.note_vm(&vm));
                }
                Input::Device(end)
            }
            Expected::NoBitmaps => Input::NoBitmaps(no_bitmaps(reader)?),
            Expected::Package { len } => {
                self.devices_memory.grow_to(len, Phase::Device, "the package of a post-copy")?;
                self.package = Some(Package::read(reader, len)?);
                Input::Package
            }
            Expected::PackagedDevices { head } => {
                let none = || Error::bug(Phase::Device, "devices of a package that is not there");
                self.devices = self.package.as_mut().ok_or_else(none)?.devices(head)?;
                Input::Devices
            }
            Expected::Tail { .. } | Expected::End => {
                return Err(Error::bug(Phase::Device, "the end of the live part is no input"));
            }
        })
    }

    /// Reads the list of blocks, and has memory provided for them.
    fn open_blocks(&mut self, mapped: bool) -> Result<()> {
        let facts = self.machine.facts();
        let (configuration, advise) = (configuration(facts)?, facts.advise);
        let (shared, incoming) = (&self.shared, &mut *self.incoming);
        let kinds = (mapped, advise.is_some());
        let ram = RamReader::open(&mut self.reader, shared, configuration, incoming, &self.readers, kinds)?;
        if let Some(advise) = advise {
            listen::check_memory(&self.shared, ram.sinks(), advise, self.guest)?;
        }
        self.ram = Some(ram);
        Ok(())
    }

    fn perform(&mut self, effect: Effect) -> Result<()> {
        match effect {
            Effect::Answer(phase, message) => self.return_path.send(phase, &message)?,
            Effect::AnswerWhenLoaded(value) => self.when_loaded.push(value),
            Effect::CheckUuid(uuid) => self.shared.on_uuid(uuid)?,
            Effect::Compare { block, digest } => self.compare(&block, digest)?,
            Effect::CountRound => Counters::add(&self.shared.session.counters.rounds, 1),
            Effect::Discard { block, ranges } => self.discard(&block, &ranges)?,
            Effect::Heed(wishes) => self.shared.heed(wishes),
            Effect::HoldChannels => self.hold_channels()?,
            Effect::KeepEarly { within_ram } => self.early.place(within_ram),
            Effect::KeepListening => {
                listen::check_kernel(&self.shared, self.guest)?;
                self.shared.keep_listening();
                if self.shared.speaks_dialect() {
                    self.return_path.send(Phase::Setup, &ReturnMessage::Id(self.shared.make_id()))?;
                }
            }
            Effect::Listen => self.listen()?,
            Effect::OpenReturnPath => self.return_path.open(),
            Effect::Resume => self.serving()?.resume()?,
            Effect::Resumable(key) => self.offer_resumption(key)?,
            Effect::Run => self.leave_package()?,
            Effect::SendBitmap(block) => self.send_bitmap(&block)?,
            Effect::Settle(ping) => self.shared.resumption.iter().for_each(|kept| kept.settle(ping)),
            Effect::SpeakDialect => {
                self.shared.speak_dialect();
                self.return_path.speak_dialect();
            }
            Effect::SyncPoint => self.shared.sync_point()?,
        }
        Ok(())
    }

    /// The source would go on over another link: from now on this end keeps what it takes.
    fn offer_resumption(&self, key: [u8; secret::LEN]) -> Result<()> {
        let none = || Error::bug(Phase::Setup, "what is kept for another link, before there is anything");
        let resumption = self.shared.resumption.as_ref().ok_or_else(none)?;
        let ours = resumption.agree(key)?;
        self.ram.as_ref().ok_or_else(none)?.sinks().note_recent();
        self.return_path.send(Phase::Setup, &ReturnMessage::Id(resumption.id()))?;
        self.return_path.send(Phase::Setup, &ReturnMessage::ResumeKey(ours))
    }

    fn compare(&self, block: &BlockName, digest: u64) -> Result<()> {
        let none = || Error::bug(Phase::Active, "a digest is compared before there are blocks");
        let sinks = self.ram.as_ref().ok_or_else(none)?.sinks();
        sinks.find(block.as_str())?.compare(digest)?;
        // With the last of them, before device state.
        if sinks.are_compared() { sinks.check_digests() } else { Ok(()) }
    }

    fn discard(&self, block: &BlockName, ranges: &[DiscardRange]) -> Result<()> {
        let none = || Error::bug(Phase::Device, "pages are discarded before there are blocks");
        let sink = self.ram.as_ref().ok_or_else(none)?.sinks().find(block.as_str())?;
        ranges.iter().try_for_each(|range| sink.discard(*range))
    }

    /// The source goes on with the channels after the switch.
    fn hold_channels(&mut self) -> Result<()> {
        if !self.shared.speaks_dialect() {
            let detail =
                "channels that go on after the switch to post-copy, of a source that has not asked for that";
            return Err(Error::misbehaved(Phase::Device, detail));
        }
        self.shared.channels.hold(self.shared.session.timeout)?;
        self.keeps_channels = true;
        Ok(())
    }

    /// The pages that are not here by now are those that follow.
    fn listen(&mut self) -> Result<()> {
        if !self.keeps_channels {
            // What still comes on a channel would be older than the discards.
            self.shared.channels.finish();
        }
        self.shared.resumption.iter().for_each(|kept| kept.end());
        let none = || Error::bug(Phase::Device, "LISTEN before there are blocks");
        let ram = self.ram.as_mut().ok_or_else(none)?;
        let serving = listen::arm(&self.shared, ram.sinks(), self.guest, &self.return_path)?;
        ram.switch(&serving);
        self.serving = Some(serving);
        if self.keeps_channels {
            self.shared.channels.let_go();
        }
        Ok(())
    }

    fn serving(&self) -> Result<&Arc<Serving>> {
        self.serving.as_ref().ok_or_else(|| Error::bug(Phase::Device, "post-copy before LISTEN"))
    }

    fn leave_package(&mut self) -> Result<()> {
        let none = || Error::bug(Phase::Device, "RUN outside of a package");
        self.package.take().ok_or_else(none)?.end()
    }

    fn send_bitmap(&self, block: &BlockName) -> Result<()> {
        let none = || Error::bug(Phase::Active, "a recovery before there are blocks");
        let sink = self.ram.as_ref().ok_or_else(none)?.sinks().find(block.as_str())?;
        self.return_path.send_bitmap(block, &sink.received())
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
        if self.shared.wishes().digest {
            ram.sinks().check_digests()?;
        }
        stream_end::wait(&mut self.reader, &self.return_path, timeout)?;
        received(self.machine.facts(), early, tail, memory)
    }

    /// What the embedder gets of a guest that may run: everything but RAM.
    pub(super) fn take_devices(&mut self) -> Result<(ReceivedMain, Vec<u32>)> {
        let early =
            std::mem::replace(&mut self.early, EarlyDevices::new(0, self.shared.limits.memory.share()));
        let (early, behind) = early.into_parts();
        if !behind.is_empty() {
            return Err(Error::bug(Phase::Device, "devices between the last RAM and the package"));
        }
        let tail = Tail::packaged(std::mem::take(&mut self.devices))?;
        let memory = std::mem::replace(&mut self.devices_memory, self.shared.limits.memory.share());
        let received = received(self.machine.facts(), early, tail, memory)?;
        Ok((received, std::mem::take(&mut self.when_loaded)))
    }

    /// The guest does not run here: if memory waits for pages, it is given back as it is, so that
    /// no thread waits for what never comes.
    pub(super) fn give_back(&self) {
        if let Some(serving) = &self.serving {
            serving.give_back();
        }
    }

    /// What a post-copy shares with other threads.
    pub(super) fn share(&self) -> Result<Arc<Serving>> {
        self.serving().map(Arc::clone)
    }

    /// Goes on over another link.
    pub(super) fn recover(&mut self, reader: MainReader, return_path: ReturnPath) -> Result<()> {
        self.machine.recover()?;
        if let Some(ram) = &mut self.ram {
            ram.forget_last_block();
        }
        (self.reader, self.return_path) = (reader, return_path);
        Ok(())
    }
}

fn received(facts: &Facts, early: EarlySections, tail: Tail, memory: Share) -> Result<ReceivedMain> {
    let Facts { switchover_start, guest_stopped, .. } = *facts;
    let configuration = configuration(facts)?.clone();
    Ok(ReceivedMain { configuration, switchover_start, early, tail, guest_stopped, _memory: memory })
}

/// A piece of the live section of dirty bitmaps, which ends at once where there is no bitmap.
fn no_bitmaps(reader: &mut MainReader) -> Result<SectionId> {
    /// Nothing more in this piece.
    const END: u8 = 0x01;
    let flags = reader.take(Phase::Active, "the flags of dirty bitmaps", 1)?.to_vec();
    if flags != [END] {
        let detail = format!(
            "the source moves dirty bitmaps of its disks (live section dirty-bitmap, flags {flags:02x?}, expected {END:#04x}: none), \
             which is not supported: remove them, or switch off capability dirty-bitmaps at the source"
        );
        return Err(Error::incompatible(Phase::Setup, detail));
    }
    let Footer(id) = reader.next(Phase::Active, "the footer of dirty bitmaps", Footer::parse)?;
    Ok(id)
}

fn configuration(facts: &Facts) -> Result<&Configuration> {
    facts.configuration.as_ref().ok_or_else(|| Error::bug(Phase::Setup, "no configuration before this"))
}
