//! Sync points: no channel goes on to a newer copy of a page before every channel has placed the
//! older one.
//!
//! ```text
//!  channel 0   pages pages SYNC ┐ waits          ┌ pages ...
//!  channel 1   pages SYNC ──────┤ waits          ├ pages ...
//!  main        ... FLUSH ───────┴ all are here: ─┘ release
//! ```
//!
//! The rules are in [`SyncState`]; here are the threads that wait for them.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use multifd_transports::Closer;

use super::sync_state::{MainWait, SyncState};
use crate::error::{Error, Phase, Result};
use crate::run::stop::{Monitor, StopSwitch};

/// Why a channel cannot join.
#[derive(Debug)]
pub(crate) enum JoinError {
    /// Before the first sync point: pages of the guest may come on this channel, so that nothing
    /// can go on without it.
    Early(Error),
    /// All channels of the source were there before: this one is of another.
    Late(Error),
}

/// The time in which a packet's pages are stored; ends when it is dropped.
pub(crate) struct Storing<'a>(&'a ChannelSync, u8);

/// Where the channels of one migration meet the main stream.
#[derive(Clone)]
pub(crate) struct ChannelSync {
    state: Monitor<State>,
    stop: StopSwitch,
}

#[derive(Default)]
struct State {
    sync: SyncState,
    /// What wakes a channel's worker.
    closers: BTreeMap<u8, Closer>,
}

impl ChannelSync {
    /// `expected`: the number of channels, if it is known beforehand.
    pub(crate) fn new(stop: &StopSwitch, expected: Option<usize>) -> Self {
        let state = State { sync: SyncState::new(expected), closers: BTreeMap::new() };
        Self { state: Monitor::new(state, stop), stop: stop.clone() }
    }

    pub(crate) fn opened(&self) {
        self.state.modify_and_notify(|state| state.sync.opened());
    }

    pub(crate) fn identified(&self) {
        self.state.modify_and_notify(|state| state.sync.identified());
    }

    /// A channel said its number.
    ///
    /// # Errors
    /// As [`SyncState::join`].
    pub(crate) fn join(&self, id: u8, closer: Closer) -> Result<(), JoinError> {
        self.state.modify_and_notify(|state| {
            state.sync.join(id)?;
            state.closers.insert(id, closer);
            Ok(())
        })
    }

    /// True before the first sync point: a channel that cannot join may be the source's.
    pub(crate) fn is_early(&self) -> bool {
        self.state.read(|state| state.sync.is_early())
    }

    /// No channel can join any more, whether the number of channels was known or not.
    pub(crate) fn is_full(&self) -> bool {
        self.state.read(|state| state.sync.is_full())
    }

    /// Connections that have not said yet what they are.
    pub(crate) fn unidentified(&self) -> usize {
        self.state.read(|state| state.sync.unidentified())
    }

    /// True if there are parallel channels.
    pub(crate) fn has_channels(&self) -> bool {
        self.state.read(|state| state.sync.has_channels())
    }

    /// A packet came in on the channel.
    pub(crate) fn progressed(&self, id: u8) {
        self.state.modify_silently(|state| state.sync.progressed(id));
    }

    /// A packet's pages are about to be stored on the channel.
    ///
    /// # Errors
    /// The main stream has ended: every page of the guest was here by then.
    pub(crate) fn storing(&self, id: u8) -> Result<Storing<'_>> {
        self.state.modify_silently(|state| state.sync.begin_storing(id)).map(|()| Storing(self, id))
    }

    /// The channel goes on over another connection, after the switch to post-copy.
    pub(crate) fn rejoin(&self, id: u8, closer: Closer) {
        self.state.modify_and_notify(|state| {
            state.sync.rejoin(id);
            state.closers.insert(id, closer);
        });
    }

    /// Pages come on the channels after the switch to post-copy, too.
    pub(crate) fn has_switched(&self) -> bool {
        self.state.read(|state| state.sync.has_switched())
    }

    /// The channel has reached a SYNC: waits until main has passed it, too. An error if the
    /// migration stops meanwhile.
    pub(crate) fn arrive(&self, id: u8) -> Result<()> {
        let point = self.state.modify_and_notify(|state| state.sync.arrive(id))?;
        self.state
            .wait(&self.stop, None, |state| state.sync.may_pass(point).then_some(()))
            .ok_or_else(|| Error::stopped(Phase::Active))
    }

    /// The channel's stream has ended, at a packet boundary.
    pub(crate) fn ended(&self, id: u8) {
        self.state.modify_and_notify(|state| state.sync.ended(id));
    }

    /// Main has reached a sync point: waits until every channel has, then lets them go on.
    ///
    /// # Errors
    /// A channel ended before its SYNC, or nothing moved on any channel for `timeout`.
    pub(crate) fn flush(&self, timeout: Duration) -> Result<()> {
        self.meet(self.state.read(|state| MainWait::new(&state.sync, timeout, Instant::now())))
    }

    /// The same of a source that may switch to post-copy: a connection that says nothing may be the
    /// one for urgent pages.
    ///
    /// # Errors
    /// As [`ChannelSync::flush`].
    pub(crate) fn flush_past_urgent(&self, timeout: Duration, whole_pages_on_main: bool) -> Result<()> {
        self.meet(self.state.read(|state| {
            MainWait::new(&state.sync, timeout, Instant::now()).past_urgent(&state.sync, whole_pages_on_main)
        }))
    }

    /// Main has reached the sync point at the switch to post-copy: waits until every channel has.
    ///
    /// From its return on until [`ChannelSync::let_go`] no channel places a page. All that was sent
    /// on them before the switch is in its place by then, older than the discards that follow; what
    /// is sent behind it is read when missing pages have been taken out of memory and a pager fills
    /// them. So no page of the one kind is ever taken for one of the other, whatever the channels
    /// and main do in between.
    ///
    /// # Errors
    /// As [`ChannelSync::flush`].
    pub(crate) fn hold(&self, timeout: Duration) -> Result<()> {
        self.meet(self.state.read(|state| MainWait::new(&state.sync, timeout, Instant::now()).holding()))
    }

    /// Ends a [`ChannelSync::hold`].
    pub(crate) fn let_go(&self) {
        self.state.modify_and_notify(|state| state.sync.let_go());
    }

    fn meet(&self, mut wait: MainWait) -> Result<()> {
        loop {
            let limit = wait.until().saturating_duration_since(Instant::now());
            let outcome =
                self.state.wait(&self.stop, Some(limit), |state| state.sync.poll(&mut wait, Instant::now()));
            if let Some(outcome) = outcome {
                // Wakes the channels that the release was for.
                self.state.notify();
                return outcome;
            }
            if self.stop.tripped() {
                return Err(Error::stopped(Phase::Active));
            }
        }
    }

    /// The main stream is complete: when this returns nothing is stored any more. A channel in the
    /// middle of a packet with pages is closed, a sound source has none.
    pub(crate) fn finish(&self) {
        self.state.modify_and_notify(|state| {
            state.sync.finish();
            state.sync.storing().filter_map(|id| state.closers.get(&id)).for_each(Closer::close);
        });
        // No limit: what is closed cannot keep its worker.
        self.state.wait(&self.stop, None, |state| state.sync.storing().next().is_none().then_some(()));
    }

    pub(crate) fn finished(&self) -> bool {
        self.state.read(|state| state.sync.finished())
    }

    /// Waits until every channel has ended, or `timeout` is over.
    pub(crate) fn drain(&self, timeout: Duration) {
        self.state.wait(&self.stop, Some(timeout), |state| state.sync.all_ended().then_some(()));
    }
}

impl Drop for Storing<'_> {
    fn drop(&mut self) {
        let Self(sync, id) = self;
        if sync.state.modify_silently(|state| state.sync.end_storing(*id)) {
            sync.state.notify();
        }
    }
}

#[cfg(test)]
mod tests;
