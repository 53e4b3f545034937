//! The rules of sync points, without threads or a clock: which channels there are, what each has
//! reached, whether main goes on.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::sync::JoinError;
use crate::error::{Error, ErrorKind, Phase, Result};

/// The longest that connections of which nothing is known yet hold up a sync point, if `timeout` is
/// not less. A source makes all of its connections before it speaks on main (docs/wire.md §12), and
/// the first packet of each goes out at once.
const HEARING: Duration = Duration::from_secs(5);

/// Sync points after which no channel can be missing: with the second, pages of all channels had to
/// be here.
const LAST_TO_JOIN: u64 = 2;

/// The channels of one migration, as far as sync points go.
#[derive(Default)]
pub(in crate::destination) struct SyncState {
    /// Connections that have not said yet what they are: any of them may be a channel.
    unidentified: usize,
    /// Those among them for which a sync point was held up in vain: the next one is not.
    given_up: usize,
    channels: BTreeMap<u8, Arrivals>,
    /// How many channels there are, if that is known beforehand.
    expected: Option<usize>,
    /// Sync points that main has passed.
    released: u64,
    /// The sync point at the switch to post-copy was reached: pages come on the channels that there
    /// are.
    switched: bool,
    /// The main stream has ended: channels are read to their end, nothing is waited for.
    finished: bool,
}

#[derive(Default)]
struct Arrivals {
    syncs: u64,
    ended: bool,
    /// Packets whose pages are on their way into guest memory: more than one where the channel was
    /// replaced.
    storing: usize,
    /// Moves with every packet, so that slow is told from dead.
    packets: u64,
}

/// Main at one sync point.
#[derive(Clone, Copy, Debug)]
pub(in crate::destination) struct MainWait {
    timeout: Duration,
    /// The channels do not go on when main does.
    holds: bool,
    /// Until when connections that are not identified hold it up; `None` from then on.
    hearing: Option<Instant>,
    /// When nothing has moved for too long.
    deadline: Instant,
    /// Packets of all channels when the deadline was set.
    packets: u64,
}

impl MainWait {
    /// Main has reached a sync point. It fails when nothing moves on any channel for one and a half
    /// times `timeout`.
    pub(in crate::destination) fn new(state: &SyncState, timeout: Duration, now: Instant) -> Self {
        let hearing = Some(later(now, timeout.min(HEARING)));
        let deadline = later(now, grace(timeout));
        Self { timeout, holds: false, hearing, deadline, packets: state.packets() }
    }

    /// The same at the switch to post-copy: the channels wait until [`SyncState::let_go`].
    pub(in crate::destination) fn holding(self) -> Self {
        Self { holds: true, ..self }
    }

    /// The same of a source that may switch to post-copy, whose connection for urgent pages says
    /// nothing before the switch: it is not waited for where it cannot be a channel. A channel that
    /// comes behind the first sync point misses nothing, since no page comes before it, and a
    /// source with channels sends no whole page on main.
    pub(in crate::destination) fn past_urgent(self, state: &SyncState, whole_pages_on_main: bool) -> Self {
        let is_alone = state.channels.is_empty() && (state.released == 0 || whole_pages_on_main);
        Self { hearing: self.hearing.filter(|_| !is_alone), ..self }
    }

    /// When to ask again, if no channel moves before.
    pub(in crate::destination) fn until(&self) -> Instant {
        self.hearing.unwrap_or(self.deadline)
    }
}

/// Half of `timeout` more: a channel that stalls within a packet fails after `timeout` by itself,
/// and knows better what is missing.
fn grace(timeout: Duration) -> Duration {
    timeout.saturating_add(timeout / 2)
}

/// A time that cannot be told is a long time away.
fn later(now: Instant, duration: Duration) -> Instant {
    const YEAR: Duration = Duration::from_secs(365 * 24 * 3600);
    now.checked_add(duration).unwrap_or(now + YEAR)
}

impl SyncState {
    /// `expected`: the number of channels, if it is known beforehand.
    pub(in crate::destination) fn new(expected: Option<usize>) -> Self {
        Self { expected, ..Self::default() }
    }

    /// A connection was accepted.
    pub(in crate::destination) fn opened(&mut self) {
        self.unidentified += 1;
    }

    /// A connection has said what it is, or will never.
    pub(in crate::destination) fn identified(&mut self) {
        self.unidentified = self.unidentified.saturating_sub(1);
        self.given_up = self.given_up.min(self.unidentified);
    }

    /// A channel said its number.
    ///
    /// # Errors
    /// The number is taken or out of range, or the channel comes too late: with the second sync
    /// point, pages of all channels had to be here.
    pub(in crate::destination) fn join(&mut self, id: u8) -> Result<(), JoinError> {
        let most = self.expected.unwrap_or(255);
        let refusal = if usize::from(id) >= most {
            format!("channel id {id}, expected 0..{most}")
        } else if self.channels.contains_key(&id) {
            format!("channel id {id} is taken: is a second source connected?")
        } else if self.released >= LAST_TO_JOIN || self.finished || self.switched {
            format!("channel id {id} comes after {} sync points, expected at most 1", self.released)
        } else {
            self.channels.insert(id, Arrivals::default());
            return Ok(());
        };
        let error = Error::misbehaved(Phase::Setup, refusal);
        Err(if self.released == 0 { JoinError::Early(error) } else { JoinError::Late(error) })
    }

    /// True before the first sync point: a channel that cannot join may be the source's.
    pub(super) fn is_early(&self) -> bool {
        self.released == 0
    }

    /// No channel can join any more, whether the number of channels was known or not.
    pub(super) fn is_full(&self) -> bool {
        self.released >= LAST_TO_JOIN || self.is_complete()
    }

    pub(super) fn unidentified(&self) -> usize {
        self.unidentified
    }

    pub(in crate::destination) fn has_channels(&self) -> bool {
        !self.channels.is_empty()
    }

    /// A packet came in on the channel.
    pub(in crate::destination) fn progressed(&mut self, id: u8) {
        if let Some(arrivals) = self.channels.get_mut(&id) {
            arrivals.packets += 1;
        }
    }

    /// A packet's pages are about to be stored.
    pub(super) fn begin_storing(&mut self, id: u8) -> Result<()> {
        match self.channels.get_mut(&id) {
            _ if self.finished => Err(Error::misbehaved(
                Phase::Active,
                "pages after the end of the main stream, they are thrown away",
            )),
            Some(arrivals) => {
                arrivals.storing += 1;
                Ok(())
            }
            None => Err(never_joined(id)),
        }
    }

    /// They are stored. True if main waits for that.
    pub(super) fn end_storing(&mut self, id: u8) -> bool {
        if let Some(arrivals) = self.channels.get_mut(&id) {
            arrivals.storing = arrivals.storing.saturating_sub(1);
        }
        self.finished
    }

    /// The channel goes on over another connection, after the switch to post-copy.
    pub(super) fn rejoin(&mut self, id: u8) {
        self.channels.entry(id).or_default().ended = false;
    }

    /// After a [`MainWait::holding`]: channels go on.
    pub(super) fn let_go(&mut self) {
        self.released += 1;
    }

    /// The channels go on after the switch to post-copy.
    pub(super) fn has_switched(&self) -> bool {
        self.switched
    }

    /// Channels in the middle of a packet's pages.
    pub(super) fn storing(&self) -> impl Iterator<Item = u8> {
        self.channels.iter().filter(|(_, arrivals)| arrivals.storing > 0).map(|(id, _)| *id)
    }

    /// The channel has reached a SYNC: the number of it, for [`SyncState::may_pass`].
    pub(in crate::destination) fn arrive(&mut self, id: u8) -> Result<u64> {
        let arrivals = self.channels.get_mut(&id).ok_or_else(|| never_joined(id))?;
        arrivals.syncs += 1;
        Ok(arrivals.syncs)
    }

    /// Main has passed this sync point, too: a channel that has reached it goes on.
    pub(in crate::destination) fn may_pass(&self, point: u64) -> bool {
        self.finished || self.released >= point
    }

    /// The channel's stream has ended, at a packet boundary.
    pub(in crate::destination) fn ended(&mut self, id: u8) {
        if let Some(arrivals) = self.channels.get_mut(&id) {
            arrivals.ended = true;
        }
    }

    /// True if every channel's stream has ended.
    pub(super) fn all_ended(&self) -> bool {
        self.channels.values().all(|arrivals| arrivals.ended)
    }

    /// The main stream has ended.
    pub(super) fn finish(&mut self) {
        self.finished = true;
    }

    pub(super) fn finished(&self) -> bool {
        self.finished
    }

    /// Whether main passes its sync point now. `None`: not yet, ask again when a channel has moved,
    /// or at [`MainWait::until`].
    ///
    /// # Errors
    /// A channel ended before its SYNC, or nothing moved on any channel for too long.
    pub(in crate::destination) fn poll(&mut self, wait: &mut MainWait, now: Instant) -> Option<Result<()>> {
        if let Some(end) = wait.hearing {
            // Those that have not been heard by then are strangers, or will find themselves closed
            // and fail the source.
            if self.unidentified > self.given_up && !self.all_joined() && now < end {
                return None;
            }
            self.given_up = self.unidentified;
            wait.hearing = None;
            wait.deadline = later(now, grace(wait.timeout));
        }
        if let Some(outcome) = self.try_release(wait.holds) {
            return Some(outcome);
        }
        if now < wait.deadline {
            return None;
        }
        let packets = self.packets();
        if packets == wait.packets {
            let detail = format!("no SYNC within {:?} from {}", wait.timeout, self.missing());
            return Some(Err(Error::new(ErrorKind::Deadline, Phase::Active, detail).on("main")));
        }
        (wait.packets, wait.deadline) = (packets, later(now, grace(wait.timeout)));
        None
    }

    fn packets(&self) -> u64 {
        self.channels.values().map(|channel| channel.packets).sum()
    }

    /// So many channels are here as were announced.
    fn is_complete(&self) -> bool {
        self.expected.is_some_and(|expected| self.channels.len() == expected)
    }

    /// No connection that has not been told apart can be the source's. Before the first sync point
    /// one too many may be, and ends the migration with words.
    fn all_joined(&self) -> bool {
        self.released >= LAST_TO_JOIN || (self.released > 0 && self.is_complete())
    }

    /// `None`: not all are here yet.
    fn try_release(&mut self, holds: bool) -> Option<Result<()>> {
        let point = self.released + 1;
        // A gap in the numbers is a channel on its way.
        if self.numbers() != self.channels.len() {
            return None;
        }
        if self.channels.values().all(|arrivals| arrivals.syncs >= point) {
            if holds {
                self.switched = true;
            } else {
                self.released = point;
            }
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

fn never_joined(id: u8) -> Error {
    Error::misbehaved(Phase::Active, format!("packets of channel {id}, which has not joined"))
}
