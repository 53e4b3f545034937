//! Sync points: no channel goes on to a newer copy of a page before every channel has placed the older one.
//!
//! ```text
//!  channel 0   pages pages SYNC ┐ waits          ┌ pages ...
//!  channel 1   pages SYNC ──────┤ waits          ├ pages ...
//!  main        ... FLUSH ───────┴ all are here: ─┘ release
//! ```

use std::collections::BTreeMap;
use std::time::Duration;

use crate::error::{Error, ErrorKind, Phase, Result};
use crate::stop::{Monitor, StopSwitch};

/// Where the channels of one migration meet the main stream.
#[derive(Clone)]
pub(crate) struct Gate {
    state: Monitor<State>,
    stop: StopSwitch,
}

#[derive(Default)]
struct State {
    /// Connections whose first bytes have not come yet: any of them may be a channel.
    unidentified: usize,
    channels: BTreeMap<u8, Arrivals>,
    /// Channels that there are at least.
    expected: usize,
    /// Sync points that main has passed.
    released: u64,
    /// The main stream has ended: channels are read to their end, nothing is waited for.
    finished: bool,
}

#[derive(Default)]
struct Arrivals {
    syncs: u64,
    ended: bool,
    /// Moves with every packet, so that slow is told from dead.
    packets: u64,
}

impl Gate {
    /// `expected`: the number of channels, if it is known beforehand.
    pub(crate) fn new(stop: &StopSwitch, expected: Option<usize>) -> Self {
        let state = State { expected: expected.unwrap_or(0), ..State::default() };
        Self { state: Monitor::new(state, stop), stop: stop.clone() }
    }

    pub(crate) fn opened(&self) {
        self.state.modify_and_notify(|state| state.unidentified += 1);
    }

    pub(crate) fn identified(&self) {
        self.state.modify_and_notify(|state| state.unidentified = state.unidentified.saturating_sub(1));
    }

    /// A channel said its number.
    ///
    /// # Errors
    /// The number is taken, or the channel comes too late: with the second sync point, pages of all channels had to be here.
    pub(crate) fn join(&self, id: u8) -> Result<()> {
        self.state.modify_and_notify(|state| {
            let refusal = if state.channels.contains_key(&id) {
                format!("channel id {id} is taken")
            } else if state.released > 1 {
                format!("channel id {id} comes after {} sync points, expected at most 1", state.released)
            } else {
                state.channels.insert(id, Arrivals::default());
                return Ok(());
            };
            Err(Error::misbehaved(Phase::Setup, refusal))
        })
    }

    /// True if there are parallel channels.
    pub(crate) fn has_channels(&self) -> bool {
        self.state.read(|state| !state.channels.is_empty())
    }

    /// A packet came in on the channel.
    pub(crate) fn progressed(&self, id: u8) {
        self.state.modify_silently(|state| {
            if let Some(arrivals) = state.channels.get_mut(&id) {
                arrivals.packets += 1;
            }
        });
    }

    /// The channel has reached a SYNC: waits until main has passed it, too. An error if the migration stops meanwhile.
    pub(crate) fn arrive(&self, id: u8) -> Result<()> {
        let mine = self.state.modify_and_notify(|state| {
            let arrivals = state.channels.entry(id).or_default();
            arrivals.syncs += 1;
            arrivals.syncs
        });
        self.state
            .wait(&self.stop, None, |state| (state.finished || state.released >= mine).then_some(()))
            .ok_or_else(|| Error::stopped(Phase::Active))
    }

    /// The channel's stream has ended, at a packet boundary.
    pub(crate) fn ended(&self, id: u8) {
        self.state.modify_and_notify(|state| {
            if let Some(arrivals) = state.channels.get_mut(&id) {
                arrivals.ended = true;
            }
        });
    }

    /// Main has reached a sync point: waits until every channel has, then lets them go on.
    ///
    /// # Errors
    /// A channel ended before its SYNC, or nothing moved on any channel for `patience`.
    pub(crate) fn flush(&self, patience: Duration) -> Result<()> {
        let mut packets = u64::MAX;
        loop {
            let outcome = self.state.wait(&self.stop, Some(patience), State::try_release);
            if let Some(outcome) = outcome {
                // Wakes the channels that the release was for.
                self.state.notify();
                return outcome;
            }
            if self.stop.tripped() {
                return Err(Error::stopped(Phase::Active));
            }
            let now = self.state.read(|state| state.channels.values().map(|channel| channel.packets).sum());
            if now == packets {
                let missing = self.state.read(State::missing);
                let detail = format!("no SYNC within {patience:?} from {missing}");
                return Err(Error::new(ErrorKind::Deadline, Phase::Active, detail).on("main"));
            }
            packets = now;
        }
    }

    /// The main stream is complete.
    pub(crate) fn finish(&self) {
        self.state.modify_and_notify(|state| state.finished = true);
    }

    pub(crate) fn finished(&self) -> bool {
        self.state.read(|state| state.finished)
    }

    /// Waits until every channel has ended, or `patience` is over.
    pub(crate) fn drain(&self, patience: Duration) {
        self.state.wait(&self.stop, Some(patience), |state| {
            state.channels.values().all(|arrivals| arrivals.ended).then_some(())
        });
    }
}

impl State {
    /// `None`: not all are here yet.
    fn try_release(&mut self) -> Option<Result<()>> {
        let point = self.released + 1;
        // A gap in the numbers is a channel on its way, and so may be whoever has not said who it is.
        if self.unidentified > 0 || self.numbers() != self.channels.len() {
            return None;
        }
        if self.channels.values().all(|arrivals| arrivals.syncs >= point) {
            self.released = point;
            return Some(Ok(()));
        }
        let gone = self.channels.iter().find(|(_, arrivals)| arrivals.ended && arrivals.syncs < point);
        gone.map(|(id, arrivals)| {
            let detail = format!("ended after {} of {point} sync points", arrivals.syncs);
            Err(Error::new(ErrorKind::Transport, Phase::Active, detail).on(format!("channel {id}")))
        })
    }

    /// Channel numbers are dense: so many there must be.
    fn numbers(&self) -> usize {
        self.channels.keys().next_back().map_or(0, |highest| usize::from(*highest) + 1).max(self.expected)
    }

    fn missing(&self) -> String {
        let point = self.released + 1;
        let mut names: Vec<_> = self
            .channels
            .iter()
            .filter(|(_, arrivals)| arrivals.syncs < point)
            .map(|(id, _)| format!("channel {id}"))
            .collect();
        let known = |id: usize| u8::try_from(id).is_ok_and(|id| self.channels.contains_key(&id));
        names.extend(
            (0..self.numbers()).filter(|id| !known(*id)).map(|id| format!("channel {id} (never came)")),
        );
        if self.unidentified > 0 {
            names.push(format!("{} connections that never spoke", self.unidentified));
        }
        names.join(", ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_millis(5);

    fn refusal(gate: &Gate) -> String {
        gate.flush(SOON).unwrap_err().to_string()
    }

    #[test]
    fn without_channels_nothing_is_waited_for() {
        let gate = Gate::new(&StopSwitch::default(), None);
        assert!(gate.flush(SOON).is_ok() && gate.flush(SOON).is_ok());
    }

    #[test]
    fn an_expected_channel_that_never_came_is_named() {
        let gate = Gate::new(&StopSwitch::default(), Some(2));
        gate.join(0).unwrap();
        assert!(refusal(&gate).ends_with("from channel 0, channel 1 (never came)"), "{}", refusal(&gate));
    }

    #[test]
    fn a_gap_in_the_numbers_is_waited_for() {
        let gate = Gate::new(&StopSwitch::default(), None);
        gate.join(1).unwrap();
        assert!(refusal(&gate).contains("channel 0 (never came)"));
    }

    #[test]
    fn a_connection_that_has_not_spoken_is_waited_for() {
        let gate = Gate::new(&StopSwitch::default(), None);
        gate.opened();
        assert!(refusal(&gate).contains("1 connections that never spoke"));
        gate.identified();
        assert!(gate.flush(SOON).is_ok());
    }

    #[test]
    fn a_channel_that_ended_too_early_is_an_error_at_once() {
        let gate = Gate::new(&StopSwitch::default(), None);
        gate.join(0).unwrap();
        gate.ended(0);
        let error = gate.flush(Duration::from_secs(60)).unwrap_err();
        assert_eq!(error.channel(), Some("channel 0"));
    }
}
