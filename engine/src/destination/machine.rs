//! What a destination does with each thing that the main stream holds: decisions only, without I/O,
//! threads or a clock.
//!
//! ```text
//!  Opening ─ configuration ─> BeforeRam ─ ram START ─> Blocks ─> Records ─ EOS ─> Footer ─> Live
//!                              │  ^ │                              ^  FLUSH: sync point      │ │
//!                              │  └─┴─ command, early device       └── ram PART, ram END ────┘ │ PACKAGED: postcopy.rs
//!                              │                                       command, early device   │
//!                              └── EOF: refused                        EOF, or a device behind END ──> Tail
//! ```
//!
//! The driver reads what [`Machine::expects`] says, gives it to [`Machine::on`], and performs the
//! effects in their order. Page records are no input: their bytes go straight into guest memory,
//! between two inputs.

use std::time::Instant;

use multifd_wire::{
    Advise, BlockName, Command, Configuration, HELLO_PING, Hello, Item, RAM_SECTION, RAM_SECTION_VERSION,
    ROUND_PING, ReturnMessage, SectionHead, SectionId, Wishes,
};

use super::switchover::{Acknowledgement, SwitchoverAck};
use crate::error::{Error, Phase, Result};
use crate::stream::dialect::{self, FEATURE_RESUMPTION};
use crate::stream::mapped_layout::CAPABILITY;

mod events;
mod postcopy;
mod ram;
#[cfg(test)]
mod tests;

pub(super) use events::{DeviceEnd, Effect, Expected, Input, Observed};
use postcopy::Postcopy;
use ram::{Piece, Ram};

/// The main stream of one migration.
///
/// Inputs go in one at a time, in the order of the stream; an error is the end. Time is an
/// argument.
#[derive(Debug)]
pub(super) struct Machine {
    state: State,
    facts: Facts,
    ack: Acknowledgement,
    return_path: ReturnDirection,
    postcopy: Postcopy,
    max_package: usize,
    /// What this end can do, as HELLO says it.
    features: u64,
    /// The RAM section of a guest that may run here.
    switched: Option<SectionId>,
    /// The live section of dirty bitmaps, which must have none.
    bitmaps: Option<SectionId>,
    /// Devices were read since the last live item.
    open_devices: bool,
}

/// The live section of a QEMU with capability dirty-bitmaps, also where no disk has a bitmap.
const BITMAPS_SECTION: &str = "dirty-bitmap";

/// What is known of the source from its stream.
#[derive(Clone, Debug, Default)]
pub(super) struct Facts {
    /// `None` before the configuration was read.
    pub(super) configuration: Option<Configuration>,
    /// SWITCHOVER_START was in the stream.
    pub(super) switchover_start: bool,
    /// When END of RAM began, or the switch to post-copy: the source had stopped the guest then.
    pub(super) guest_stopped: Option<Instant>,
    /// The source may switch to post-copy.
    pub(super) advise: Option<Advise>,
    /// The source has been told what this end can do.
    introduced: bool,
}

/// Whether anything can be said to the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ReturnDirection {
    /// The source has not asked for it.
    Closed,
    Open,
    /// The channel leads one way; whether the source has asked for more.
    OneWay {
        wanted: bool,
    },
}

#[derive(Debug)]
enum State {
    /// Nothing was read.
    Opening,
    /// Between two items, before the RAM section.
    BeforeRam,
    /// In START of RAM, before the list of blocks.
    Blocks(Ram),
    /// In a piece of RAM.
    Records(Ram, Piece),
    /// Behind the records of a piece of RAM.
    Footer(Ram, Piece),
    /// Between two items, behind START of RAM.
    Live(Ram),
    /// In the section of an early device.
    Device(SectionHead, Option<Ram>),
    /// In a piece of the live section of dirty bitmaps.
    NoBitmaps(SectionId, Option<Ram>),
    /// Behind PACKAGED: so many bytes are to be read as a stream of their own.
    Package(Ram, usize),
    /// Between two items of a package.
    Packaged(Ram),
    /// In the devices' part of a package, behind the head of the first.
    PackagedDevices(Ram, SectionHead),
    /// Behind all that the machine decides about.
    Tail(Option<Item>),
    /// Behind the end of a post-copy.
    Done,
    /// An input was refused.
    Failed,
}

type Effects = Vec<Effect>;

impl Machine {
    /// `two_way`: a source at the other end of the main channel could hear an answer.
    /// `max_package`: a source may switch to post-copy, with at most so many bytes of device state.
    pub(super) fn new(two_way: bool, ack: SwitchoverAck, max_package: Option<usize>) -> Self {
        let return_path =
            if two_way { ReturnDirection::Closed } else { ReturnDirection::OneWay { wanted: false } };
        Self {
            state: State::Opening,
            facts: Facts::default(),
            ack: Acknowledgement::new(ack),
            return_path,
            postcopy: if max_package.is_some() { Postcopy::Allowed } else { Postcopy::Refused },
            max_package: max_package.unwrap_or(0),
            features: dialect::FEATURES,
            switched: None,
            bitmaps: None,
            open_devices: false,
        }
    }

    /// What HELLO is to say.
    pub(super) fn offering(self, features: u64) -> Self {
        Self { features, ..self }
    }

    /// What is to be read next, and how it is to be handed over.
    pub(super) fn expects(&self) -> Result<Expected> {
        Ok(match &self.state {
            State::Opening => Expected::Configuration,
            State::BeforeRam | State::Live(_) | State::Packaged(_) => Expected::Item,
            State::Blocks(ram) => Expected::Blocks { mapped: ram.mapped },
            State::Records(ram, _) => Expected::Records { mapped: ram.mapped },
            State::Footer(..) => Expected::Footer,
            State::Device(head, ram) => {
                Expected::Device { head: head.clone(), ram: ram.as_ref().map(|ram| ram.id) }
            }
            State::NoBitmaps(..) => Expected::NoBitmaps,
            State::Package(_, len) => Expected::Package { len: *len },
            State::PackagedDevices(_, head) => Expected::PackagedDevices { head: head.clone() },
            State::Done => Expected::End,
            State::Tail(begins) => Expected::Tail { begins: begins.clone() },
            State::Failed => return Err(Error::bug(Phase::Active, "a stream is read on after its failure")),
        })
    }

    /// What the stream has said so far.
    pub(super) fn facts(&self) -> &Facts {
        &self.facts
    }

    /// The guest may run here: the source has sent RUN.
    pub(super) fn has_switched(&self) -> bool {
        self.postcopy.has_switched()
    }

    /// Takes the next input; what it leads to, in order.
    ///
    /// # Errors
    /// The stream is not what a source may send, or what is supported here. The machine is not to
    /// be used after that.
    pub(super) fn on(&mut self, input: Input, observed: &Observed) -> Result<Effects> {
        let mut effects = Vec::new();
        // Every state is consumed: what a failed input leaves is no state to go on from.
        let state = std::mem::replace(&mut self.state, State::Failed);
        self.state = match (state, input) {
            (State::Opening, Input::Configuration(configuration)) => {
                self.on_configuration(configuration, &mut effects)?
            }
            (State::BeforeRam, Input::Item(item)) => self.on_item(None, item, observed, &mut effects)?,
            (State::Live(ram), Input::Item(item)) => self.on_item(Some(ram), item, observed, &mut effects)?,
            (State::Blocks(ram), Input::Blocks) => State::Records(ram, Piece::Start),
            (State::Records(mut ram, piece), Input::Flush) => {
                ram.on_flush(piece, &mut effects)?;
                State::Records(ram, piece)
            }
            (State::Records(mut ram, piece), Input::EndOfRecords) => {
                ram.on_end_of_records(piece, &mut effects);
                State::Footer(ram, piece)
            }
            (State::Footer(ram, piece), Input::Footer(id)) => {
                self.on_footer(ram, piece, id, observed, &mut effects)?
            }
            (State::Device(_, ram), Input::Device(DeviceEnd::Footer)) => {
                self.open_devices = true;
                ram.map_or(State::BeforeRam, State::Live)
            }
            (State::NoBitmaps(id, ram), Input::NoBitmaps(closed)) if id == closed => {
                ram.map_or(State::BeforeRam, State::Live)
            }
            (State::NoBitmaps(id, _), Input::NoBitmaps(closed)) => {
                let detail = format!("footer of section {closed} in section {id}");
                return Err(Error::misbehaved(Phase::Active, detail));
            }
            (State::Package(ram, _), Input::Package) | (State::PackagedDevices(ram, _), Input::Devices) => {
                State::Packaged(ram)
            }
            (State::Packaged(ram), Input::Item(item)) => self.on_packaged_item(ram, item, &mut effects)?,
            (State::Device(_, ram), Input::Device(DeviceEnd::Stream)) => self.tail(ram, None, observed)?,
            (state, input) => {
                return Err(Error::bug(Phase::Active, format_args!("{input:?} in state {state:?}")));
            }
        };
        Ok(effects)
    }

    fn on_configuration(&mut self, configuration: Configuration, effects: &mut Effects) -> Result<State> {
        tracing::debug!(machine = configuration.machine, "configuration");
        if let Some(bits) = configuration.page_bits.filter(|bits| *bits != 12) {
            let detail = format!("pages of 2^{bits} bytes at the source, 2^12 here");
            return Err(Error::incompatible(Phase::Setup, detail));
        }
        effects.extend(configuration.uuid.map(Effect::CheckUuid));
        self.facts.configuration = Some(configuration);
        Ok(State::BeforeRam)
    }

    /// An item between two sections. `ram`: its section, if it has begun.
    fn on_item(
        &mut self,
        ram: Option<Ram>,
        item: Item,
        observed: &Observed,
        effects: &mut Effects,
    ) -> Result<State> {
        if self.postcopy == Postcopy::Held && !matches!(item, Item::Command(_)) {
            let detail = format!("{item:?} between the sync point at the switch and the package");
            return Err(Error::misbehaved(Phase::Device, detail));
        }
        let last = matches!(item, Item::Eof | Item::SectionFull(_));
        if let Some(ram) = ram.as_ref().filter(|_| last && self.postcopy.has_switched()) {
            return self.on_last_item(ram, &item);
        }
        match item {
            Item::Eof => return self.tail(ram, Some(Item::Eof), observed),
            Item::SectionFull(head) if ram.as_ref().is_some_and(Ram::ended) => {
                return self.tail(ram, Some(Item::SectionFull(head)), observed);
            }
            Item::SectionFull(head) => return early_device(ram, head),
            _ => {}
        }
        if std::mem::take(&mut self.open_devices) {
            effects.push(Effect::KeepEarly { within_ram: ram.is_some() });
        }
        match item {
            Item::Command(command) => self.on_command(command, ram, observed, effects),
            Item::SectionStart(head) => self.on_start(ram, &head),
            Item::SectionPart(id) | Item::SectionEnd(id) if self.bitmaps == Some(id) => {
                Ok(State::NoBitmaps(id, ram))
            }
            Item::SectionPart(id) => Ok(State::Records(Ram::go_on(ram, id)?, Piece::Part)),
            Item::SectionEnd(id) => {
                self.facts.guest_stopped.get_or_insert(observed.now);
                Ok(State::Records(Ram::go_on(ram, id)?, Piece::End))
            }
            Item::Eof | Item::SectionFull(_) => {
                Err(Error::bug(Phase::Active, "an item of the devices' part among live ones"))
            }
        }
    }

    fn on_start(&mut self, ram: Option<Ram>, head: &SectionHead) -> Result<State> {
        if head.idstr == BLOCK_SECTION {
            return Err(Error::incompatible(
                Phase::Setup,
                "the source sends its disks, too (capability block, which QEMU 9.1 removed): only RAM and devices \
                    are moved here, switch it off (virsh: no --copy-storage-all) and move the disks by drive-mirror",
            ));
        }
        let number_of_ram = ram.as_ref().is_some_and(|ram| ram.id == head.id);
        if head.idstr == BITMAPS_SECTION && self.bitmaps.is_none() && !number_of_ram {
            self.bitmaps = Some(head.id);
            return Ok(State::NoBitmaps(head.id, ram));
        }
        if head.idstr != RAM_SECTION || head.instance_id != 0 {
            let detail =
                format!("live section {} (instance {}): only ram is supported", head.idstr, head.instance_id);
            return Err(Error::incompatible(Phase::Setup, detail));
        }
        if head.version_id != RAM_SECTION_VERSION {
            let detail = format!("ram section version {}, expected {RAM_SECTION_VERSION}", head.version_id);
            return Err(Error::incompatible(Phase::Setup, detail));
        }
        if ram.is_some() || self.bitmaps == Some(head.id) {
            return Err(Error::misbehaved(Phase::Setup, "a second START of ram, or of its number"));
        }
        Ok(State::Blocks(Ram::new(head.id, is_mapped(self.configuration()?)?)))
    }

    /// A piece of RAM is over.
    fn on_footer(
        &mut self,
        mut ram: Ram,
        piece: Piece,
        closed: SectionId,
        observed: &Observed,
        effects: &mut Effects,
    ) -> Result<State> {
        if closed != ram.id {
            let detail = format!("footer of section {closed} in section {}", ram.id);
            return Err(Error::misbehaved(Phase::Active, detail));
        }
        if piece == Piece::Part {
            // All pages sent before this PART have come, unless channels have yet to reach a sync
            // point.
            let all_came = ram.take_sync() || !observed.has_channels;
            let is_heard = self.return_path == ReturnDirection::Open;
            if all_came && is_heard && self.ack.due_after_part(observed.pages, observed.now) {
                tracing::debug!("the source waits for an acknowledgement of the switch-over");
                self.answer(Phase::Active, ReturnMessage::SwitchoverAck, effects)?;
            }
        }
        Ok(State::Live(ram))
    }

    fn on_command(
        &mut self,
        command: Command,
        ram: Option<Ram>,
        observed: &Observed,
        effects: &mut Effects,
    ) -> Result<State> {
        match command {
            Command::OpenReturnPath => self.open_return_path(effects)?,
            Command::Ping(value) => {
                if value == HELLO_PING {
                    let hello = Hello { version: dialect::VERSION, features: self.features };
                    effects.push(Effect::SpeakDialect);
                    self.facts.introduced = self.return_path == ReturnDirection::Open;
                    self.answer(Phase::Setup, ReturnMessage::Hello(hello), effects)?;
                }
                // What was recorded wished, too, but was not told that its wishes are heeded.
                if let Some(wishes) = Wishes::of_ping(value).filter(|_| self.facts.introduced) {
                    effects.push(Effect::Heed(wishes));
                }
                if value & ROUND_PING != 0 && self.facts.introduced {
                    effects.push(Effect::Settle(value));
                }
                self.answer(Phase::Active, ReturnMessage::Pong(value), effects)?;
            }
            Command::Resumable(key) => self.on_resumable(ram.as_ref(), key, effects)?,
            Command::Digest { block, digest } => self.on_digest(ram.as_ref(), block, digest, effects)?,
            Command::SwitchoverStart => self.facts.switchover_start = true,
            other => return self.on_postcopy_command(other, ram, observed, effects),
        }
        Ok(ram.map_or(State::BeforeRam, State::Live))
    }

    /// The source would go on over another link when this one breaks.
    fn on_resumable(&self, ram: Option<&Ram>, key: [u8; 32], effects: &mut Effects) -> Result<()> {
        if matches!(self.return_path, ReturnDirection::OneWay { .. }) {
            // Recorded: there is no other link.
            return Ok(());
        }
        let offered = self.facts.introduced && self.features & FEATURE_RESUMPTION != 0;
        if !offered || ram.is_none_or(Ram::ended) {
            let detail = "an offer to go on over another link, where none can be made";
            return Err(Error::misbehaved(Phase::Active, detail));
        }
        effects.push(Effect::Resumable(key));
        Ok(())
    }

    /// What the pages of a block have to be.
    fn on_digest(
        &self,
        ram: Option<&Ram>,
        block: BlockName,
        digest: u64,
        effects: &mut Effects,
    ) -> Result<()> {
        if matches!(self.return_path, ReturnDirection::OneWay { .. }) {
            // Recorded on its way to another destination, whose HELLO was heard.
            tracing::debug!(%block, "a digest in a recorded stream: nothing to compare");
            return Ok(());
        }
        if !self.facts.introduced {
            let detail = format!("a digest of RAM block {block}, from a source that has asked for no HELLO");
            return Err(Error::misbehaved(Phase::Active, detail));
        }
        if !ram.is_some_and(Ram::ended) {
            let detail = format!("a digest of RAM block {block} before the END of ram");
            return Err(Error::misbehaved(Phase::Active, detail));
        }
        effects.push(Effect::Compare { block, digest });
        Ok(())
    }

    fn open_return_path(&mut self, effects: &mut Effects) -> Result<()> {
        match &mut self.return_path {
            ReturnDirection::OneWay { wanted } => *wanted = true,
            direction => {
                *direction = ReturnDirection::Open;
                effects.push(Effect::OpenReturnPath);
            }
        }
        let configuration = self.facts.configuration.as_ref();
        if configuration.is_some_and(|configuration| self.ack.due_at_opening(configuration)) {
            self.answer(Phase::Setup, ReturnMessage::SwitchoverAck, effects)?;
        }
        Ok(())
    }

    /// Answers a source that hears it. What was recorded asks, too, but nothing waits for an
    /// answer.
    fn answer(&self, phase: Phase, message: ReturnMessage, effects: &mut Effects) -> Result<()> {
        match self.return_path {
            ReturnDirection::Open => effects.push(Effect::Answer(phase, message)),
            ReturnDirection::OneWay { .. } => {}
            ReturnDirection::Closed => {
                let detail = format!("{message:?} asked for before OPEN_RETURN_PATH");
                return Err(Error::misbehaved(phase, detail));
            }
        }
        Ok(())
    }

    /// The devices' part begins. Only a background snapshot has no END of RAM; it goes without a
    /// return path and without parallel channels, on which only the sync point of END says that
    /// every page is here (docs/wire.md §9).
    fn tail(&self, ram: Option<Ram>, begins: Option<Item>, observed: &Observed) -> Result<State> {
        let Some(ram) = ram else {
            return Err(Error::misbehaved(Phase::Setup, "the end of the stream before any RAM"));
        };
        let wants_answers =
            matches!(self.return_path, ReturnDirection::Open | ReturnDirection::OneWay { wanted: true });
        let detail = match (ram.ended(), observed.has_channels) {
            (_, true) if !ram.ended_in_sync() => {
                "device state, but no END of ram with a sync point before it"
            }
            (false, false) if wants_answers => "device state, but no END of ram before it",
            _ => return Ok(State::Tail(begins)),
        };
        Err(Error::misbehaved(Phase::Device, detail))
    }

    fn configuration(&self) -> Result<&Configuration> {
        let none = || Error::bug(Phase::Setup, "no configuration before RAM");
        self.facts.configuration.as_ref().ok_or_else(none)
    }
}

fn early_device(ram: Option<Ram>, head: SectionHead) -> Result<State> {
    if let Some(ram) = ram.as_ref().filter(|ram| ram.id == head.id) {
        let detail = format!("a device with the number of ram ({})", ram.id);
        return Err(Error::misbehaved(Phase::Active, detail));
    }
    Ok(State::Device(head, ram))
}

/// The live section of QEMU's old migration of disks.
const BLOCK_SECTION: &str = "block";

/// Of all capabilities that change the stream, mapped-ram is the one that can be read.
fn is_mapped(configuration: &Configuration) -> Result<bool> {
    let capabilities = &configuration.capabilities;
    if let Some(capability) = capabilities.iter().find(|capability| *capability != CAPABILITY) {
        let detail = format!("capability {capability} is on at the source, it is not supported here");
        return Err(Error::incompatible(Phase::Setup, detail));
    }
    Ok(!capabilities.is_empty())
}
