//! The return path, from our end: what the destination tells the source.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, TryLockError};
use std::time::{Duration, Instant};

use multifd_transports::Channel;
use multifd_wire::{BlockName, Failure, ReturnMessage};

use crate::error::{Error, ErrorKind, Phase, Result};
use crate::run::stop::lock;

/// Status in SHUT: the guest has arrived.
const SHUT_SUCCESS: u32 = 0;
/// Status in SHUT: it has not, and never will on this connection.
const SHUT_FAILED: u32 = 1;

/// What closes the bitmap of a block. Spec: docs/wire.md §11.
const BITMAP_END: u64 = 0x0123_4567_89ab_cdef;

/// How long a SHUT of 8 bytes may wait for room in the socket, when everybody waits for the end.
const LAST_MESSAGE: Duration = Duration::from_millis(100);

/// Speaks on the reverse direction of the main channel, once the source has opened it.
#[derive(Clone)]
pub(crate) struct ReturnPath {
    channel: Arc<Channel>,
    state: Arc<Mutex<State>>,
    /// The source is multifd, too.
    dialect: Arc<AtomicBool>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    /// The source has not asked for it: nothing may be sent.
    Closed,
    Open,
    /// SHUT was sent, the last message.
    Shut,
    /// The channel leads one way: whatever the source asks for, nothing is said.
    OneWay,
}

impl ReturnPath {
    pub(crate) fn new(channel: Arc<Channel>) -> Self {
        let state = if channel.is_two_way() { State::Closed } else { State::OneWay };
        Self { channel, state: Arc::new(Mutex::new(state)), dialect: Arc::default() }
    }

    /// The source takes messages of the dialect.
    pub(crate) fn speak_dialect(&self) {
        self.dialect.store(true, Ordering::Relaxed);
    }

    /// The return path over a `channel` that replaces one which broke: it is open, and what the
    /// source takes is known.
    pub(super) fn over(&self, channel: Arc<Channel>) -> Self {
        let this = Self { dialect: Arc::clone(&self.dialect), ..Self::new(channel) };
        this.open();
        this
    }

    /// The source sent OPEN_RETURN_PATH. Repeats are harmless.
    pub(crate) fn open(&self) {
        let mut state = lock(&self.state);
        if *state == State::Closed {
            *state = State::Open;
        }
    }

    fn name(&self) -> String {
        format!("return path ({})", self.channel.peer())
    }

    /// The address of the other end.
    pub(crate) fn peer(&self) -> &str {
        self.channel.peer()
    }

    /// Whether a source at the other end could hear anything.
    pub(crate) fn leads_back(&self) -> bool {
        *lock(&self.state) != State::OneWay
    }

    pub(crate) fn is_open(&self) -> bool {
        *lock(&self.state) == State::Open
    }

    pub(crate) fn send(&self, phase: Phase, message: &ReturnMessage) -> Result<()> {
        self.send_all(phase, std::slice::from_ref(message))
    }

    /// Sends these messages in one piece.
    pub(crate) fn send_all(&self, phase: Phase, messages: &[ReturnMessage]) -> Result<()> {
        let Some(first) = messages.first() else { return Ok(()) };
        let state = lock(&self.state);
        match *state {
            State::Open => {}
            // The migration was stopped meanwhile.
            State::Shut => return Err(Error::stopped(phase)),
            State::Closed | State::OneWay => {
                return Err(Error::bug(phase, format_args!("{first:?} to a source that does not listen")));
            }
        }
        self.write(messages)
            .map_err(|error| Error::io(phase, format_args!("sending {first:?}"), error).on(self.name()))
    }

    /// Tells the source which pages of the block are here. `received`: a bit a page, from the
    /// lowest bit of each byte on.
    pub(crate) fn send_bitmap(&self, block: &BlockName, received: &[u8]) -> Result<()> {
        let state = lock(&self.state);
        if *state != State::Open {
            return Err(Error::stopped(Phase::Active));
        }
        let mut bytes = Vec::with_capacity(received.len() + 300);
        ReturnMessage::RecvBitmap(block.clone()).encode(&mut bytes);
        bytes.extend((received.len() as u64).to_be_bytes());
        bytes.extend_from_slice(received);
        bytes.extend(BITMAP_END.to_be_bytes());
        self.channel.send_all(&bytes).map_err(|error| {
            let doing = format_args!("sending which pages of RAM block {block} are here").to_string();
            Error::io(Phase::Active, doing, error).on(self.name())
        })
    }

    /// Tells a source that understands it that this end is alive. False: it does not, or it has
    /// been told of the end.
    pub(super) fn say_alive(&self) -> Result<bool> {
        let state = lock(&self.state);
        if *state != State::Open || !self.dialect.load(Ordering::Relaxed) {
            return Ok(false);
        }
        let said = self.write(&[ReturnMessage::Alive]);
        said.map_err(|error| Error::io(Phase::Device, "telling the source to wait", error).on(self.name()))?;
        Ok(true)
    }

    /// Tells the source that the guest has arrived; from here on it must not run there. `load`: how
    /// long the embedder took to load it.
    pub(crate) fn shut(&self, load: Duration) -> Result<()> {
        let load = ReturnMessage::Loaded(u64::try_from(load.as_micros()).unwrap_or(u64::MAX));
        self.finish(&mut lock(&self.state), SHUT_SUCCESS, Some(load)).map_err(|error| {
            Error::io(Phase::Commit, "sending SHUT", error).on(self.name()).after_hand_over()
        })
    }

    /// Lets a command behind the channel, which had to pass on our answer first, end by itself. One
    /// that runs on for longer than `limit` has done all that it was needed for; one that fails may
    /// not have passed the answer on.
    pub(crate) fn settle(&self, limit: Duration) -> Result<()> {
        if self.channel.is_connection() {
            return Ok(());
        }
        match self.channel.settle(limit) {
            Err(error) if error.kind() == std::io::ErrorKind::TimedOut => {
                tracing::warn!(%error, "after the guest has arrived");
                Ok(())
            }
            ended => ended.map_err(|error| {
                Error::io(Phase::Commit, "after the guest has arrived", error)
                    .on(self.name())
                    .after_hand_over()
            }),
        }
    }

    /// Checks that the source still waits for the word, as far as that can be seen.
    pub(crate) fn check_source_listens(&self) -> Result<()> {
        if !self.is_open() {
            return Ok(());
        }
        self.channel.check_peer_is_there().map_err(|error| {
            let detail = "the source has ended the connection instead of waiting for the outcome";
            Error::new(ErrorKind::Transport, Phase::Device, detail).on(self.name()).because(error)
        })
    }

    /// Waits, for as long as `limit`, for the source to end the connection after SHUT.
    ///
    /// An error if it did that without having read SHUT: it has failed, and may run its guest.
    pub(crate) fn confirm(&self, limit: Duration) -> Result<()> {
        if *lock(&self.state) != State::Shut {
            return Ok(());
        }
        self.channel.confirm_received(limit).map_err(|error| {
            let detail =
                "the source hung up without having read that its guest has arrived: it may run it, too";
            Error::new(ErrorKind::Transport, Phase::Commit, detail)
                .on(self.name())
                .because(error)
                .after_hand_over()
        })
    }

    /// Tells the source that its guest did not arrive, and why, if it still listens; never waits
    /// for it. An error of this has no one left to be told.
    pub(crate) fn abort(&self, why: Option<Failure>) {
        let Some(mut state) = self.lock_within(LAST_MESSAGE) else { return };
        let told = self
            .channel
            .set_timeout(Some(LAST_MESSAGE))
            .and_then(|()| self.finish(&mut state, SHUT_FAILED, why.map(ReturnMessage::Failure)));
        if let Err(error) = told {
            tracing::debug!(%error, "the source could not be told of the failure");
        }
    }

    /// Says nothing any more, and ends the connection: the source finds that its link is gone.
    pub(crate) fn hang_up(&self) {
        self.channel.closer().close();
    }

    /// A message that is being sent is out at once, unless the source takes nothing: then it would
    /// not take SHUT either.
    fn lock_within(&self, limit: Duration) -> Option<MutexGuard<'_, State>> {
        const POLL: Duration = Duration::from_micros(100);
        let deadline = Instant::now() + limit;
        loop {
            match self.state.try_lock() {
                Ok(state) => return Some(state),
                Err(TryLockError::Poisoned(state)) => return Some(state.into_inner()),
                Err(TryLockError::WouldBlock) if Instant::now() >= deadline => return None,
                Err(TryLockError::WouldBlock) => std::thread::park_timeout(POLL),
            }
        }
    }

    /// SHUT; before it, to a source that understands it, `more`.
    fn finish(&self, state: &mut State, status: u32, more: Option<ReturnMessage>) -> std::io::Result<()> {
        if *state != State::Open {
            return Ok(());
        }
        *state = State::Shut;
        let more = more.filter(|_| self.dialect.load(Ordering::Relaxed));
        let messages: Vec<_> = more.into_iter().chain([ReturnMessage::Shut(status)]).collect();
        self.write(&messages)
    }

    fn write(&self, messages: &[ReturnMessage]) -> std::io::Result<()> {
        let mut bytes = Vec::with_capacity(16);
        messages.iter().for_each(|message| message.encode(&mut bytes));
        self.channel.send_all(&bytes)
    }
}
