//! What source and destination share: the stop switch, the channels that are open, the counters.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use multifd_transports::{Channel, SocketOptions};

use crate::error::{Error, ErrorKind, Phase, Result};
use crate::run::counters::{Counters, Progress};
use crate::run::open_set::OpenSet;
use crate::run::state::MigrationState;
use crate::run::stop::{StopSwitch, lock};
use crate::run::workers::Crew;

/// How long a peer may keep us waiting by default: for a connection, an answer, the rest of a
/// packet.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(60);

/// How far the hand-over of the guest has come: what an end of this process at this moment would
/// leave.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HandOver {
    /// The guest may run on at the source.
    #[default]
    Before,
    /// The guest may run at the destination: the source must not resume it unasked.
    Begun,
    /// The guest has moved, and both ends know as much as they ever will.
    Done,
}

/// Reads the progress of a migration from any thread.
#[derive(Clone)]
pub struct ProgressReader(Arc<Session>);

/// Cancels a migration from any thread: everything that waits is woken, the migration ends with
/// [`ErrorKind::Cancelled`].
#[derive(Clone)]
pub struct Canceller(Arc<Session>);

pub(crate) struct Session {
    pub(crate) stop: StopSwitch,
    started: Arc<Mutex<Instant>>,
    pub(crate) timeout: Duration,
    pub(crate) counters: Arc<Counters>,
    channels: Arc<OpenSet<Arc<Channel>>>,
    state: Arc<Mutex<Watched>>,
    hand_over: Arc<Mutex<HandOver>>,
    /// This one is a link of that, which may go on over another.
    whole: Option<Arc<Self>>,
}

/// A state, and who is told of the next.
#[derive(Default)]
struct Watched {
    now: MigrationState,
    told: Vec<Sender<MigrationState>>,
}

impl Watched {
    fn set(&mut self, next: MigrationState) {
        self.now = next;
        self.told.retain(|told| told.send(next).is_ok());
    }
}

impl Session {
    pub(crate) fn new(timeout: Duration) -> Arc<Self> {
        Arc::new(Self {
            stop: StopSwitch::default(),
            started: Arc::new(Mutex::new(Instant::now())),
            timeout,
            counters: Arc::default(),
            channels: Arc::new(OpenSet::new()),
            state: Arc::default(),
            hand_over: Arc::default(),
            whole: None,
        })
    }

    /// A link of this migration: what ends it ends no more than its own threads and connections. It
    /// ends with the migration.
    pub(crate) fn link(self: &Arc<Self>) -> Arc<Self> {
        let stop = StopSwitch::default();
        let of_link = stop.clone();
        // Only a cancel ends the whole before its link.
        self.stop.on_trip(move || of_link.trip(cancelled()));
        Arc::new(Self {
            stop,
            started: Arc::clone(&self.started),
            timeout: self.timeout,
            counters: Arc::clone(&self.counters),
            channels: Arc::clone(&self.channels),
            state: Arc::clone(&self.state),
            hand_over: Arc::clone(&self.hand_over),
            whole: Some(Arc::clone(self)),
        })
    }

    /// Ends this link because of `error`: wakes and joins its threads, whose connections are
    /// closed. The first cause can be looked at.
    pub(crate) fn end_link(&self, error: Error, crew: &Crew) {
        self.stop.trip(error);
        crew.join();
        self.retire_closed_channels();
    }

    /// The migration that this is a link of, or all of it.
    pub(crate) fn whole(self: &Arc<Self>) -> &Arc<Self> {
        self.whole.as_ref().unwrap_or(self)
    }

    /// Makes a new connection part of the migration: its silence is limited, its bytes are counted.
    ///
    /// The caller registers what wakes it when the migration stops: main may have a last message to
    /// send, the others just close.
    ///
    /// # Errors
    /// `Cancelled` if the channels have been closed already: this one is closed, too.
    pub(crate) fn adopt(&self, channel: Channel, phase: Phase) -> Result<Arc<Channel>> {
        channel
            .set_timeout(Some(self.timeout))
            .map_err(|error| Error::io(phase, "setting up the socket", error).on(channel.peer()))?;
        let channel = Arc::new(channel);
        if self.channels.add(Arc::clone(&channel)) {
            return Ok(channel);
        }
        channel.closer().close();
        let detail = "a channel of a migration that has ended";
        Err(Error::new(ErrorKind::Cancelled, phase, detail).on(channel.peer()))
    }

    /// The options of the migration's sockets: see `SourceBuilder::socket_options`.
    pub(crate) fn socket_options(&self, wanted: &SocketOptions) -> SocketOptions {
        let user_timeout = wanted.user_timeout.or_else(|| self.timeout.checked_add(Duration::from_secs(10)));
        SocketOptions { user_timeout, ..wanted.clone() }
    }

    /// Shuts the channel's socket down when the migration stops, which wakes the threads that read
    /// or write it.
    pub(crate) fn close_on_stop(&self, channel: &Channel) {
        let closer = channel.closer();
        self.stop.on_trip(move || closer.close());
    }

    /// Shuts every socket down, at the regular end. A channel that is adopted later is closed at
    /// once.
    pub(crate) fn close_channels(&self) {
        self.channels.close(|channel| channel.closer().close());
    }

    /// The migration begins now: a destination that has waited for its source does not count the
    /// wait.
    pub(crate) fn begin(&self) {
        *lock(&self.started) = Instant::now();
    }

    /// Since the migration began.
    pub(crate) fn elapsed(&self) -> Duration {
        lock(&self.started).elapsed()
    }

    /// Lets go of the connections that this end has closed, whose descriptors go with their last
    /// users. What went over them stays counted.
    pub(crate) fn retire_closed_channels(&self) {
        self.channels.retire(|channel| channel.is_closed(), |channel| bytes_of(channel));
        self.counters.retire_closed_channels();
    }

    pub(crate) fn wire_bytes(&self) -> u64 {
        self.channels.sum(|channel| bytes_of(channel))
    }

    pub(crate) fn progress(&self) -> Progress {
        self.counters.read(self.wire_bytes())
    }

    pub(crate) fn state(&self) -> MigrationState {
        lock(&self.state).now
    }

    /// Every state from now on, in its order.
    pub(crate) fn state_changes(&self) -> Receiver<MigrationState> {
        let (told, changes) = channel();
        lock(&self.state).told.push(told);
        changes
    }

    /// Goes on to `next`, if the table of transitions lets it.
    pub(crate) fn enter(&self, next: MigrationState) -> Result<()> {
        let mut state = lock(&self.state);
        if !state.now.may_become(next) {
            let detail = match state.now {
                MigrationState::Cancelling => "cancelled by the caller".to_owned(),
                now => format!("the migration is {now}, it cannot become {next}"),
            };
            return Err(Error::new(ErrorKind::Cancelled, Phase::Active, detail));
        }
        state.set(next);
        Ok(())
    }

    /// The guest has moved. Whatever else happened meanwhile, a cancel above all, came too late.
    pub(crate) fn complete(&self) {
        lock(&self.state).set(MigrationState::Completed);
    }

    /// Ends the migration because of `error`: wakes and joins every thread.
    ///
    /// Gives the first cause, which another thread may have known before.
    pub(crate) fn fail(&self, error: Error, crew: &Crew) -> Error {
        let phase = error.phase();
        self.stop.trip(error);
        self.note_end_of_failed();
        crew.join();
        // A channel that came too late to be closed by the stop; a command behind it is ended now.
        self.close_channels();
        let cause = self.stop.cause_or(Error::stopped(phase));
        if let Some(whole) = &self.whole {
            if whole.stop.tripped() {
                // Cancelled, when the link had ended already.
                return whole.stop.cause_or(cause);
            }
            // Whatever else waits, for the caller's go-ahead for instance.
            whole.stop.trip(Error::stopped(phase));
        }
        cause
    }

    pub(crate) fn hand_over(&self) -> HandOver {
        *lock(&self.hand_over)
    }

    pub(crate) fn set_hand_over(&self, hand_over: HandOver) {
        *lock(&self.hand_over) = hand_over;
    }

    /// The embedder has dropped the migration.
    fn note_end_of_dropped(&self) {
        let mut state = lock(&self.state);
        if state.now == MigrationState::Cancelling {
            state.set(MigrationState::Cancelled);
        }
    }

    /// The switch has tripped: cancelled if the caller wanted that, else failed.
    pub(crate) fn note_end_of_failed(&self) {
        let mut state = lock(&self.state);
        if state.now == MigrationState::Cancelling {
            state.set(MigrationState::Cancelled);
        } else if state.now.may_become(MigrationState::Failed) {
            state.set(MigrationState::Failed);
        }
    }
}

impl ProgressReader {
    pub(crate) fn new(session: &Arc<Session>) -> Self {
        Self(Arc::clone(session))
    }

    /// The numbers now.
    pub fn now(&self) -> Progress {
        self.0.progress()
    }
}

/// Notes, when it is dropped, that a migration which has not come to an end was cancelled: the
/// embedder has dropped it.
pub(crate) struct NoteEnd(pub(crate) Arc<Session>);

impl Drop for NoteEnd {
    fn drop(&mut self) {
        // Not an error: a migration that is over stays as it ended.
        let _ = self.0.enter(MigrationState::Cancelling);
        self.0.note_end_of_dropped();
    }
}

fn cancelled() -> Error {
    Error::new(ErrorKind::Cancelled, Phase::Active, "cancelled by the caller")
}

impl Canceller {
    pub(crate) fn new(session: &Arc<Session>) -> Self {
        Self(Arc::clone(session.whole()))
    }

    /// Cancels. Has no effect on a migration that has ended. False: the guest has been handed over
    /// to the destination of a post-copy, and needs what is here; the migration goes on.
    pub fn cancel(&self) -> bool {
        if let Err(refused) = self.0.enter(MigrationState::Cancelling)
            && self.0.state().is_postcopy()
        {
            tracing::warn!(%refused, "not cancelled: the guest runs at the destination and waits for its RAM");
            return false;
        }
        self.0.stop.trip(cancelled());
        true
    }

    /// How far the hand-over has come, for a caller who is about to end the process.
    pub fn hand_over(&self) -> HandOver {
        self.0.hand_over()
    }

    /// Closes every channel, also after the point of no return, when a cancel comes too late: what
    /// is still waited for then is waited for no longer, and commands behind channels are ended.
    pub fn close_channels(&self) {
        self.0.close_channels();
    }
}

fn bytes_of(channel: &Channel) -> u64 {
    channel.bytes_sent() + channel.bytes_received()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_session_gives_the_first_cause_and_has_no_threads_left() {
        let session = Session::new(DEFAULT_TIMEOUT);
        let crew = Crew::new(session.stop.clone());
        session.enter(MigrationState::Setup).unwrap();
        crew.spawn("mig-test", Phase::Active, || {
            Err(Error::new(ErrorKind::InvalidStream, Phase::Active, "the first"))
        })
        .unwrap();
        crew.join();
        let cause = session.fail(Error::stopped(Phase::Device), &crew);
        assert_eq!(cause.to_string(), "active: the first");
        assert_eq!(session.state(), MigrationState::Failed);
    }

    #[test]
    fn a_session_that_was_cancelled_ends_as_cancelled() {
        let session = Session::new(DEFAULT_TIMEOUT);
        let crew = Crew::new(session.stop.clone());
        session.enter(MigrationState::Setup).unwrap();
        Canceller::new(&session).cancel();
        let cause = session.fail(Error::stopped(Phase::Setup), &crew);
        assert_eq!((cause.kind(), session.state()), (ErrorKind::Cancelled, MigrationState::Cancelled));
    }
}
