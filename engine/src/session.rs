//! What source and destination share: the stop switch, the channels that are open, the counters.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use multifd_transports::{Channel, SocketOptions};

use crate::error::{Error, ErrorKind, Phase, Result};
use crate::state::MigrationState;
use crate::stop::StopSwitch;

/// How long a peer may keep us waiting by default: for a connection, an answer, the rest of a packet.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(60);

/// Plain numbers about a migration that is under way; all of them only grow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Bytes of guest RAM in all blocks. 0 until the list of blocks is known.
    pub ram_bytes: u64,
    /// Bytes on the wire, all channels, both directions.
    pub wire_bytes: u64,
    /// Pages that went with their content, compressed or not.
    pub pages_normal: u64,
    /// Pages that went as "is zero".
    pub pages_zero: u64,
    /// Pages that went as a difference to their older content.
    pub pages_xbzrle: u64,
    /// Passes over RAM (dirty sync count).
    pub rounds: u64,
    /// Parallel channels; 0 while there is only the main one.
    pub channels: u64,
}

/// Reads the progress of a migration from any thread.
#[derive(Clone)]
pub struct ProgressReader(Arc<Session>);

/// Cancels a migration from any thread: everything that waits is woken, the migration ends with [`ErrorKind::Cancelled`].
#[derive(Clone)]
pub struct Canceller(Arc<Session>);

pub(crate) struct Session {
    pub(crate) stop: StopSwitch,
    started: Mutex<Instant>,
    pub(crate) timeout: Duration,
    pub(crate) counters: Counters,
    channels: Mutex<Vec<Arc<Channel>>>,
    state: Mutex<MigrationState>,
}

#[derive(Default)]
pub(crate) struct Counters {
    pub(crate) ram_bytes: AtomicU64,
    pub(crate) pages_normal: AtomicU64,
    pub(crate) pages_zero: AtomicU64,
    pub(crate) pages_xbzrle: AtomicU64,
    pub(crate) rounds: AtomicU64,
    pub(crate) channels: AtomicU64,
    pub(crate) zero_copy_sends: AtomicU64,
    pub(crate) zero_copy_copied: AtomicU64,
    pub(crate) zero_copy_refused: AtomicU64,
}

impl Session {
    pub(crate) fn new(timeout: Duration) -> Arc<Self> {
        Arc::new(Self {
            stop: StopSwitch::default(),
            started: Mutex::new(Instant::now()),
            timeout,
            counters: Counters::default(),
            channels: Mutex::default(),
            state: Mutex::default(),
        })
    }

    /// Makes a new connection part of the migration: its silence is limited, its bytes are counted.
    ///
    /// The caller registers what wakes it when the migration stops: `main` says goodbye first, the others just close.
    pub(crate) fn adopt(&self, channel: Channel, phase: Phase) -> Result<Arc<Channel>> {
        channel
            .set_silence_limit(Some(self.timeout))
            .map_err(|error| Error::io(phase, "setting up the socket", error).on(channel.peer()))?;
        let channel = Arc::new(channel);
        self.lock_channels().push(Arc::clone(&channel));
        Ok(channel)
    }

    /// The options of the migration's sockets: see `SourceBuilder::socket_options`.
    pub(crate) fn socket_options(&self, wanted: &SocketOptions) -> SocketOptions {
        let user_timeout = wanted.user_timeout.or_else(|| self.timeout.checked_add(Duration::from_secs(10)));
        SocketOptions { user_timeout, ..wanted.clone() }
    }

    /// Shuts the channel's socket down when the migration stops, which wakes whoever reads or writes it.
    pub(crate) fn close_on_stop(&self, channel: &Channel) {
        let closer = channel.closer();
        self.stop.on_trip(move || closer.close());
    }

    /// Shuts every socket down, at the regular end.
    pub(crate) fn close_channels(&self) {
        self.lock_channels().iter().for_each(|channel| channel.closer().close());
    }

    /// The migration begins now: a destination that has waited for its source does not count the wait.
    pub(crate) fn begin(&self) {
        *self.started.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }

    /// Since the migration began.
    pub(crate) fn elapsed(&self) -> Duration {
        self.started.lock().unwrap_or_else(PoisonError::into_inner).elapsed()
    }

    pub(crate) fn wire_bytes(&self) -> u64 {
        self.lock_channels().iter().map(|channel| channel.bytes_sent() + channel.bytes_received()).sum()
    }

    pub(crate) fn progress(&self) -> Progress {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let counters = &self.counters;
        Progress {
            ram_bytes: read(&counters.ram_bytes),
            wire_bytes: self.wire_bytes(),
            pages_normal: read(&counters.pages_normal),
            pages_zero: read(&counters.pages_zero),
            pages_xbzrle: read(&counters.pages_xbzrle),
            rounds: read(&counters.rounds),
            channels: read(&counters.channels),
        }
    }

    pub(crate) fn state(&self) -> MigrationState {
        *self.lock_state()
    }

    /// Goes on to `next`, if the table of transitions lets it.
    pub(crate) fn enter(&self, next: MigrationState) -> Result<()> {
        let mut state = self.lock_state();
        if !state.may_become(next) {
            let detail = format!("the migration is {}, it cannot become {next}", *state);
            return Err(Error::new(ErrorKind::Cancelled, Phase::Active, detail));
        }
        *state = next;
        Ok(())
    }

    /// The guest has moved. Whatever else happened meanwhile, a cancel above all, came too late.
    pub(crate) fn complete(&self) {
        *self.lock_state() = MigrationState::Completed;
    }

    /// The switch has tripped: cancelled if somebody wanted that, else failed.
    pub(crate) fn note_end_of_failed(&self) {
        let mut state = self.lock_state();
        if *state == MigrationState::Cancelling {
            *state = MigrationState::Cancelled;
        } else if state.may_become(MigrationState::Failed) {
            *state = MigrationState::Failed;
        }
    }

    fn lock_state(&self) -> std::sync::MutexGuard<'_, MigrationState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_channels(&self) -> std::sync::MutexGuard<'_, Vec<Arc<Channel>>> {
        self.channels.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Counters {
    /// Pages that have come or gone, in whatever form.
    pub(crate) fn pages(&self) -> u64 {
        [&self.pages_normal, &self.pages_zero, &self.pages_xbzrle]
            .iter()
            .map(|counter| counter.load(Ordering::Relaxed))
            .sum()
    }

    pub(crate) fn add(counter: &AtomicU64, count: usize) {
        counter.fetch_add(count as u64, Ordering::Relaxed);
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

impl Canceller {
    pub(crate) fn new(session: &Arc<Session>) -> Self {
        Self(Arc::clone(session))
    }

    /// Cancels. Has no effect on a migration that has ended.
    pub fn cancel(&self) {
        // Not an error: what is over cannot be cancelled.
        let _ = self.0.enter(MigrationState::Cancelling);
        self.0.stop.trip(Error::new(ErrorKind::Cancelled, Phase::Active, "cancelled by the caller"));
    }
}
