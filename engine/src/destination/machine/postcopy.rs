//! Post-copy, as far as the machine decides about it. Spec: docs/wire.md §15.
//!
//! ```text
//!  ADVISE ─> advised ─ DISCARD.. ─ PACKAGED { LISTEN ─> listening ─ devices, PING.. ─ RUN } ─> running ─ PART.. END EOF
//!               └─ POSTCOPY_CHANNELS ─> held ─^                                      a new link: RECV_BITMAP.. RESUME ─^
//! ```

use multifd_wire::{Advise, Command, Item, ReturnMessage, SectionHead};

use super::ram::Ram;
use super::{Effect, Effects, Machine, Observed, ReturnDirection, State};
use crate::error::{Error, Phase, Result};
use crate::guest::PAGE;

/// Refusal of POSTCOPY_ADVISE.
const NO_POSTCOPY: &str = "the source may switch to postcopy, which is not allowed here: allow it (DestinationBuilder::postcopy), or \
    switch off capability postcopy-ram at the source";

/// Most bytes of a package, whatever else is allowed: it is read while the guest is paused.
const MAX_PACKAGE: usize = 256 << 20;

/// How far a post-copy has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Postcopy {
    /// A source that may switch is refused.
    Refused,
    /// A source may announce that it may switch.
    Allowed,
    /// ADVISE has come.
    Advised,
    /// The same, and the parallel channels have met main: nothing more comes on them before LISTEN.
    Held,
    /// LISTEN has come: what follows is the state of the devices.
    Listening,
    /// The same, behind the state of the devices.
    Loaded,
    /// RUN has come: the guest runs here or nowhere.
    Running,
    /// The same over a new link, before RESUME.
    Recovering,
}

impl Postcopy {
    /// The guest may run here.
    pub(super) fn has_switched(self) -> bool {
        matches!(self, Self::Running | Self::Recovering)
    }
}

impl Machine {
    /// A command that belongs to post-copy, or to nothing that is known here, between two sections.
    pub(super) fn on_postcopy_command(
        &mut self,
        command: Command,
        ram: Option<Ram>,
        observed: &Observed,
        effects: &mut Effects,
    ) -> Result<State> {
        match (command, self.postcopy, ram) {
            // What was recorded can no longer switch to postcopy: only a source that hears answers
            // does.
            (Command::PostcopyAdvise(_), _, ram)
                if matches!(self.return_path, ReturnDirection::OneWay { .. }) =>
            {
                Ok(ram.map_or(State::BeforeRam, State::Live))
            }
            (Command::PostcopyAdvise(Some(advise)), Postcopy::Allowed, None) => {
                self.on_advise(advise, effects)?;
                Ok(State::BeforeRam)
            }
            // A QEMU that may move dirty bitmaps after RAM. One that has bitmaps begins their live
            // section before its first page, which is refused.
            (Command::PostcopyAdvise(None), Postcopy::Refused | Postcopy::Allowed, None) => {
                Ok(State::BeforeRam)
            }
            // Once it has begun postcopy, a source cannot go back: its guest would be lost with the
            // refusal.
            (Command::PostcopyAdvise(_), Postcopy::Refused | Postcopy::Allowed, _) => {
                Err(Error::incompatible(Phase::Setup, NO_POSTCOPY))
            }
            // Not behind a discard: what was sent on a channel before would come after it.
            (Command::PostcopyChannels, Postcopy::Advised, Some(ram))
                if self.facts.guest_stopped.is_none() =>
            {
                self.facts.guest_stopped = Some(observed.now);
                self.postcopy = Postcopy::Held;
                effects.push(Effect::HoldChannels);
                Ok(State::Live(ram))
            }
            (Command::RamDiscard { block, ranges }, Postcopy::Advised | Postcopy::Held, Some(ram)) => {
                self.facts.guest_stopped.get_or_insert(observed.now);
                effects.push(Effect::Discard { block, ranges });
                Ok(State::Live(ram))
            }
            (Command::Packaged(len), Postcopy::Advised | Postcopy::Held, Some(ram)) => {
                self.facts.guest_stopped.get_or_insert(observed.now);
                package_len(len, self.max_package.min(MAX_PACKAGE)).map(|len| State::Package(ram, len))
            }
            (Command::RecvBitmap(block), Postcopy::Recovering, Some(ram)) => {
                effects.push(Effect::SendBitmap(block));
                Ok(State::Live(ram))
            }
            (Command::PostcopyResume, Postcopy::Recovering, Some(ram)) => {
                self.postcopy = Postcopy::Running;
                effects.push(Effect::Resume);
                Ok(State::Live(ram))
            }
            (other, Postcopy::Refused, _) | (other @ Command::EnableColo, ..) => {
                Err(Error::incompatible(Phase::Active, format!("command {other:?} is not supported")))
            }
            (other, postcopy, ram) => {
                let ram = if ram.is_some() { "" } else { ", before ram" };
                let detail = format!("command {other:?} out of order: post-copy is {postcopy:?}{ram}");
                Err(Error::misbehaved(Phase::Active, detail))
            }
        }
    }

    fn on_advise(&mut self, advise: Advise, effects: &mut Effects) -> Result<()> {
        if self.return_path != ReturnDirection::Open {
            let detail = "the source may switch to postcopy, but has not opened the return path";
            return Err(Error::misbehaved(Phase::Setup, detail));
        }
        if advise.target_page != PAGE as u64 {
            let detail = format!("pages of {} bytes at the source, {PAGE} here", advise.target_page);
            return Err(Error::incompatible(Phase::Setup, detail));
        }
        if advise.page_sizes == 0 || advise.page_sizes & (PAGE as u64 - 1) != 0 {
            let detail = format!("host page sizes {:#x} at the source", advise.page_sizes);
            return Err(Error::misbehaved(Phase::Setup, detail));
        }
        self.postcopy = Postcopy::Advised;
        self.facts.advise = Some(advise);
        effects.push(Effect::KeepListening);
        Ok(())
    }

    /// An item within a package.
    pub(super) fn on_packaged_item(&mut self, ram: Ram, item: Item, effects: &mut Effects) -> Result<State> {
        match (item, self.postcopy) {
            (Item::Command(Command::PostcopyListen), Postcopy::Advised | Postcopy::Held) => {
                self.postcopy = Postcopy::Listening;
                effects.push(Effect::Listen);
                Ok(State::Packaged(ram))
            }
            (Item::SectionFull(head), Postcopy::Listening) => {
                self.postcopy = Postcopy::Loaded;
                packaged_devices(ram, head)
            }
            // What is asked behind the devices is whether they have been loaded.
            (Item::Command(Command::Ping(value)), Postcopy::Loaded) => {
                effects.push(Effect::AnswerWhenLoaded(value));
                Ok(State::Packaged(ram))
            }
            (Item::Command(Command::Ping(value)), _) => {
                self.answer(Phase::Device, ReturnMessage::Pong(value), effects)?;
                Ok(State::Packaged(ram))
            }
            (Item::Command(Command::PostcopyRun), Postcopy::Listening | Postcopy::Loaded) => {
                (self.postcopy, self.switched) = (Postcopy::Running, Some(ram.id));
                effects.push(Effect::Run);
                Ok(State::Live(Ram::behind_switch(ram.id)))
            }
            (item, postcopy) => {
                let detail = format!("{item:?} in a package, out of order: post-copy is {postcopy:?}");
                Err(Error::misbehaved(Phase::Device, detail))
            }
        }
    }

    /// An item that cannot be one of pre-copy's, behind RUN.
    pub(super) fn on_last_item(&self, ram: &Ram, item: &Item) -> Result<State> {
        let detail = match item {
            Item::Eof if ram.ended() => return Ok(State::Done),
            Item::Eof => "the end of the stream, but no END of ram before it".to_owned(),
            other => format!("{other:?} after RUN: the devices are here"),
        };
        Err(Error::misbehaved(Phase::Active, detail))
    }

    /// The link is gone. The stream goes on over another, between two sections.
    ///
    /// # Errors
    /// The guest does not run here: there is nothing to go on with.
    pub(in crate::destination) fn recover(&mut self) -> Result<()> {
        let id = self.switched.filter(|_| self.postcopy.has_switched());
        let id = id.ok_or_else(|| Error::bug(Phase::Active, "a recovery before the switch"))?;
        self.postcopy = Postcopy::Recovering;
        self.state = State::Live(Ram::behind_switch(id));
        Ok(())
    }
}

fn packaged_devices(ram: Ram, head: SectionHead) -> Result<State> {
    if ram.id == head.id {
        let detail = format!("a device with the number of ram ({})", ram.id);
        return Err(Error::misbehaved(Phase::Device, detail));
    }
    Ok(State::PackagedDevices(ram, head))
}

fn package_len(len: u32, most: usize) -> Result<usize> {
    let len = len as usize;
    if (1..=most).contains(&len) {
        return Ok(len);
    }
    let detail = format!("a package of {len} bytes, expected 1 to {most}");
    Err(Error::misbehaved(Phase::Device, detail))
}
