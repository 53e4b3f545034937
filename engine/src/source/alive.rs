//! Signs of life of a source whose embedder has the migration in hand: a guest that is on pause
//! between rounds, a hold before the switch-over, device state that is being saved. Spec:
//! docs/wire.md §27.4.
//!
//! ```text
//!  the caller's thread   Busy ── a call returns, or waits for the caller ──> Idle ── the next call ──> Busy
//!  mig-alive             says nothing                                        a PING each 250 ms
//! ```

use std::sync::Arc;

use multifd_transports::Channel;
use multifd_wire::{ALIVE_PING, Command, Item};

use crate::error::{Error, Phase, Result};
use crate::run::stop::Monitor;
use crate::run::workers::Crew;
use crate::stream::dialect::ALIVE_INTERVAL;

/// Writes between two items of the main channel while nothing else does.
pub(super) struct KeepAlive {
    state: Monitor<State>,
}

struct State {
    turn: Turn,
    /// What is sent; nothing if the destination takes nothing of that kind here.
    beat: Vec<u8>,
    /// The beat is a piece of RAM, which may come before the last one only.
    is_ram: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Turn {
    /// The caller's thread may be in the middle of an item.
    Busy,
    /// Everything that was written is a whole item, and has been sent.
    Idle,
    Over,
}

/// The caller's thread writes on main until this is dropped.
pub(super) struct Busy(Monitor<State>);

impl KeepAlive {
    /// `piece_of_ram`: what is sent instead of a PING to a destination that has no return path, if
    /// it takes that.
    pub(super) fn start(
        channel: &Arc<Channel>,
        return_path: bool,
        piece_of_ram: Option<Vec<u8>>,
        crew: &Crew,
    ) -> Result<Self> {
        let is_ram = !return_path;
        let beat = if return_path { ping() } else { piece_of_ram.unwrap_or_default() };
        let state = Monitor::new(State { turn: Turn::Busy, beat, is_ram }, crew.stop());
        let (shared, stop, channel) = (state.clone(), crew.stop().clone(), Arc::clone(channel));
        if shared.read(|state| !state.beat.is_empty()) {
            crew.spawn("mig-alive", Phase::Active, move || {
                let over = |state: &mut State| (state.turn == Turn::Over).then_some(());
                while shared.wait(&stop, Some(ALIVE_INTERVAL), over).is_none() && !stop.tripped() {
                    shared.modify_silently(|state| state.say(&channel))?;
                }
                Ok(())
            })?;
        }
        Ok(Self { state })
    }

    /// Before the caller's thread writes on main.
    pub(super) fn busy(&self) -> Busy {
        self.state.modify_silently(|state| state.turn = Turn::Busy);
        Busy(self.state.clone())
    }

    /// The last piece of RAM begins.
    pub(super) fn end_of_ram(&self) {
        self.state.modify_silently(|state| {
            if state.is_ram {
                state.beat.clear();
            }
        });
    }

    /// Lets the thread end.
    pub(super) fn end(&self) {
        self.state.modify_and_notify(|state| state.turn = Turn::Over);
    }
}

impl Busy {
    /// The caller's thread waits for the embedder, in the middle of a call and between two items.
    pub(super) fn rest<R>(&self, wait: impl FnOnce() -> R) -> R {
        self.0.modify_silently(State::rest);
        let result = wait();
        self.0.modify_silently(|state| state.turn = Turn::Busy);
        result
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.modify_silently(State::rest);
    }
}

impl State {
    fn rest(&mut self) {
        if self.turn == Turn::Busy {
            self.turn = Turn::Idle;
        }
    }

    fn say(&self, channel: &Channel) -> Result<()> {
        if self.turn != Turn::Idle {
            return Ok(());
        }
        channel.send_all(&self.beat).map_err(|error| {
            Error::io(Phase::Active, "sending a sign of life", error).on(format!("main ({})", channel.peer()))
        })
    }
}

fn ping() -> Vec<u8> {
    let mut beat = Vec::new();
    Item::Command(Command::Ping(ALIVE_PING)).encode(&mut beat);
    beat
}
