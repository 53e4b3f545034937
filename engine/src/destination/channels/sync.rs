//! Sync points: no channel goes on to a newer copy of a page before every channel has placed the older one.
//!
//! ```text
//!  channel 0   pages pages SYNC ┐ waits          ┌ pages ...
//!  channel 1   pages SYNC ──────┤ waits          ├ pages ...
//!  main        ... FLUSH ───────┴ all are here: ─┘ release
//! ```

use std::collections::BTreeMap;
use std::time::Duration;

use multifd_transports::Closer;

use crate::error::{Error, ErrorKind, Phase, Result};
use crate::run::stop::{Monitor, StopSwitch};

/// Why a channel cannot join.
#[derive(Debug)]
pub(crate) enum JoinError {
    /// Before the first sync point: pages of the guest may come on this channel, so that nothing can go on without it.
    Early(Error),
    /// All channels of the source were there before: this one is of another.
    Late(Error),
}

/// The time in which a packet's pages are stored; ends when it is dropped.
pub(crate) struct Storing<'a>(&'a Gate, u8);

/// Where the channels of one migration meet the main stream.
#[derive(Clone)]
pub(crate) struct Gate {
    state: Monitor<State>,
    stop: StopSwitch,
}

/// The longest that connections of which nothing is known yet hold up a sync point, if `timeout` is not less. A source makes
/// all of its connections before it speaks on main (docs/wire.md §12), and the first packet of each goes out at once.
const HEARING: Duration = Duration::from_secs(5);

/// Sync points after which no channel can be missing: with the second, pages of all channels had to be here.
const LAST_TO_JOIN: u64 = 2;

#[derive(Default)]
struct State {
    /// Connections that have not said yet what they are: any of them may be a channel.
    unidentified: usize,
    channels: BTreeMap<u8, Arrivals>,
    /// How many channels there are, if that is known beforehand.
    expected: Option<usize>,
    /// Sync points that main has passed.
    released: u64,
    /// The main stream has ended: channels are read to their end, nothing is waited for.
    finished: bool,
}

struct Arrivals {
    closer: Closer,
    syncs: u64,
    ended: bool,
    /// A packet's pages are on their way into guest memory.
    storing: bool,
    /// Moves with every packet, so that slow is told from dead.
    packets: u64,
}

impl Gate {
    /// `expected`: the number of channels, if it is known beforehand.
    pub(crate) fn new(stop: &StopSwitch, expected: Option<usize>) -> Self {
        let state = State { expected, ..State::default() };
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
    /// The number is taken or out of range, or the channel comes too late: with the second sync point, pages of all channels had
    /// to be here.
    pub(crate) fn join(&self, id: u8, closer: Closer) -> Result<(), JoinError> {
        self.state.modify_and_notify(|state| {
            let most = state.expected.unwrap_or(255);
            let refusal = if usize::from(id) >= most {
                format!("channel id {id}, expected 0..{most}")
            } else if state.channels.contains_key(&id) {
                format!("channel id {id} is taken: is a second source connected?")
            } else if state.released >= LAST_TO_JOIN || state.finished {
                format!("channel id {id} comes after {} sync points, expected at most 1", state.released)
            } else {
                let arrivals = Arrivals { closer, syncs: 0, ended: false, storing: false, packets: 0 };
                state.channels.insert(id, arrivals);
                return Ok(());
            };
            let error = Error::misbehaved(Phase::Setup, refusal);
            Err(if state.released == 0 { JoinError::Early(error) } else { JoinError::Late(error) })
        })
    }

    /// True before the first sync point: a channel that cannot join may be the source's.
    pub(crate) fn is_early(&self) -> bool {
        self.state.read(|state| state.released == 0)
    }

    /// No channel can join any more, whether the number of channels was known or not.
    pub(crate) fn is_full(&self) -> bool {
        self.state.read(|state| state.released >= LAST_TO_JOIN || state.is_complete())
    }

    /// Connections that have not said yet what they are.
    pub(crate) fn unidentified(&self) -> usize {
        self.state.read(|state| state.unidentified)
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

    /// A packet's pages are about to be stored on the channel.
    ///
    /// # Errors
    /// The main stream has ended: every page of the guest was here by then.
    pub(crate) fn storing(&self, id: u8) -> Result<Storing<'_>> {
        self.state.modify_silently(|state| match state.channels.get_mut(&id) {
            _ if state.finished => Err(Error::misbehaved(
                Phase::Active,
                "pages after the end of the main stream, they are thrown away",
            )),
            Some(arrivals) => {
                arrivals.storing = true;
                Ok(Storing(self, id))
            }
            None => Err(never_joined(id)),
        })
    }

    /// The channel has reached a SYNC: waits until main has passed it, too. An error if the migration stops meanwhile.
    pub(crate) fn arrive(&self, id: u8) -> Result<()> {
        let mine = self.state.modify_and_notify(|state| {
            let arrivals = state.channels.get_mut(&id)?;
            arrivals.syncs += 1;
            Some(arrivals.syncs)
        });
        let mine = mine.ok_or_else(|| never_joined(id))?;
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
        // Those that have not been heard by then are strangers, or will find themselves closed and fail the source.
        self.state.wait(&self.stop, Some(patience.min(HEARING)), |state| {
            (state.unidentified == 0 || state.all_joined()).then_some(())
        });
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

    /// The main stream is complete: when this returns nothing is stored any more. A channel in the middle of a packet with pages
    /// is closed, a sound source has none.
    pub(crate) fn finish(&self) {
        self.state.modify_and_notify(|state| {
            state.finished = true;
            state.channels.values().filter(|it| it.storing).for_each(|it| it.closer.close());
        });
        // No limit: what is closed cannot keep its worker.
        self.state.wait(&self.stop, None, |state| {
            (!state.channels.values().any(|arrivals| arrivals.storing)).then_some(())
        });
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
    /// So many channels are here as were announced.
    fn is_complete(&self) -> bool {
        self.expected.is_some_and(|expected| self.channels.len() == expected)
    }

    /// No connection that has not been told apart can be the source's. Before the first sync point one too many may be, and ends
    /// the migration with words.
    fn all_joined(&self) -> bool {
        self.released >= LAST_TO_JOIN || (self.released > 0 && self.is_complete())
    }

    /// `None`: not all are here yet.
    fn try_release(&mut self) -> Option<Result<()>> {
        let point = self.released + 1;
        // A gap in the numbers is a channel on its way.
        if self.numbers() != self.channels.len() {
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
        self.channels
            .keys()
            .next_back()
            .map_or(0, |highest| usize::from(*highest) + 1)
            .max(self.expected.unwrap_or(0))
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
            names.push(format!("connections that have not said what they are: {}", self.unidentified));
        }
        names.join(", ")
    }
}

impl Drop for Storing<'_> {
    fn drop(&mut self) {
        let Self(gate, id) = self;
        let wakes = gate.state.modify_silently(|state| {
            if let Some(arrivals) = state.channels.get_mut(id) {
                arrivals.storing = false;
            }
            state.finished
        });
        if wakes {
            gate.state.notify();
        }
    }
}

fn never_joined(id: u8) -> Error {
    Error::misbehaved(Phase::Active, format!("packets of channel {id}, which has not joined"))
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use multifd_transports::Channel;

    use super::*;
    use crate::run::workers::Crew;

    const SOON: Duration = Duration::from_millis(5);

    fn join(gate: &Gate, id: u8) {
        gate.join(id, Channel::pair().unwrap().0.closer()).unwrap();
    }

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
        join(&gate, 0);
        assert!(refusal(&gate).ends_with("from channel 0, channel 1 (never came)"), "{}", refusal(&gate));
    }

    #[test]
    fn a_gap_in_the_numbers_is_waited_for() {
        let gate = Gate::new(&StopSwitch::default(), None);
        join(&gate, 1);
        assert!(refusal(&gate).contains("channel 0 (never came)"));
    }

    #[test]
    fn a_connection_that_has_not_spoken_is_heard_out_and_no_longer() {
        let gate = Gate::new(&StopSwitch::default(), None);
        gate.opened();
        let begun = Instant::now();
        assert!(gate.flush(SOON).is_ok());
        assert!(begun.elapsed() >= SOON);
    }

    #[test]
    fn a_connection_that_turns_out_to_be_a_channel_is_waited_for() {
        let gate = Gate::new(&StopSwitch::default(), None);
        gate.opened();
        let heard = gate.clone();
        let (one, _other) = Channel::pair().unwrap();
        let closer = one.closer();
        let crew = Crew::new(StopSwitch::default());
        crew.spawn("mig-test", Phase::Active, move || {
            heard.join(0, closer).unwrap();
            heard.identified();
            heard.arrive(0)
        })
        .unwrap();
        gate.flush(Duration::from_secs(60)).unwrap();
        crew.join();
        assert!(gate.has_channels());
    }

    #[test]
    fn a_channel_that_does_not_fit_is_an_error_until_the_first_sync_point() {
        let gate = Gate::new(&StopSwitch::default(), Some(1));
        let (one, _other) = Channel::pair().unwrap();
        join(&gate, 0);
        assert!(gate.is_full());
        for id in [0, 1] {
            assert!(matches!(gate.join(id, one.closer()), Err(JoinError::Early(_))));
        }
        gate.finish();
        assert!(
            matches!(gate.storing(0).map(drop), Err(error) if error.to_string().contains("after the end"))
        );
    }

    #[test]
    fn the_end_of_the_main_stream_waits_for_pages_on_their_way_and_closes_their_channel() {
        let gate = Gate::new(&StopSwitch::default(), None);
        let (one, other) = Channel::pair().unwrap();
        gate.join(0, one.closer()).unwrap();
        let crew = Crew::new(StopSwitch::default());
        let (worker, (begun, waiting)) = (gate.clone(), std::sync::mpsc::channel());
        crew.spawn("mig-test", Phase::Active, move || {
            let storing = worker.storing(0)?;
            begun.send(()).unwrap();
            // Ends when the gate closes the channel: the peer sends nothing.
            assert!(one.recv(&mut [0]).is_err());
            drop(storing);
            Ok(())
        })
        .unwrap();
        waiting.recv().unwrap();
        gate.finish();
        assert!(!gate.state.read(|state| state.channels.values().any(|arrivals| arrivals.storing)));
        crew.join();
        drop(other);
    }

    #[test]
    fn a_channel_that_ended_too_early_is_an_error_at_once() {
        let gate = Gate::new(&StopSwitch::default(), None);
        join(&gate, 0);
        gate.ended(0);
        let error = gate.flush(Duration::from_secs(60)).unwrap_err();
        assert_eq!(error.channel(), Some("channel 0"));
    }
}
