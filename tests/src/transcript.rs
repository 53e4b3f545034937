//! What a process or a guest has said so far, and waiting for more of it.

use std::{
    fs::File,
    io::Read as _,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
};

use crate::{Failure, Outcome};

/// Everything that was read from a pipe or a socket, kept by a thread that ends with the stream.
#[derive(Debug)]
pub struct Transcript {
    name: String,
    shared: Arc<Shared>,
    reader: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    /// The same stream as in the state, to wait on without the lock.
    stream: OwnedFd,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    source: File,
    bytes: Vec<u8>,
    ended: bool,
}

impl Transcript {
    /// Reads `source` to its end on a thread of its own; `name` is what failures call it.
    ///
    /// # Errors
    /// When the thread cannot be made.
    pub fn follow(name: impl Into<String>, source: impl Into<OwnedFd>) -> Outcome<Self> {
        let name = name.into();
        let source = File::from(source.into());
        let stream = source.as_fd().try_clone_to_owned()?;
        let state = Mutex::new(State { source, bytes: Vec::new(), ended: false });
        let shared = Arc::new(Shared { stream, state, changed: Condvar::new() });
        let theirs = Arc::clone(&shared);
        let reader = thread::Builder::new().name(name.clone()).spawn(move || {
            while !theirs.caught_up().ended {
                wait_readable(theirs.stream.as_fd(), None);
            }
        })?;
        Ok(Self { name, shared, reader: Some(reader) })
    }

    /// What was said so far. Bytes that are no UTF-8 are replaced.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.shared.caught_up().bytes).into_owned()
    }

    /// Bytes said so far: a place to wait from.
    pub fn mark(&self) -> usize {
        self.shared.caught_up().bytes.len()
    }

    /// Waits until `needle` was said at or after `from` (see [`Transcript::mark`]); gives the place
    /// behind it.
    ///
    /// # Errors
    /// When the time is over or the stream ends without it.
    pub fn wait_for(&self, needle: &str, from: usize, within: Duration) -> Outcome<usize> {
        self.wait_until(format_args!("{needle:?}"), within, |said| find(said.get(from..)?, needle.as_bytes()))
            .map(|found| from + found + needle.len())
    }

    /// Waits until there are `count` whole lines at or after `from`.
    ///
    /// # Errors
    /// When the time is over or the stream ends before that.
    pub fn wait_lines(&self, count: usize, from: usize, within: Duration) -> Outcome {
        self.wait_until(format_args!("{count} lines"), within, |said| {
            let lines = said.get(from..)?.iter().filter(|byte| **byte == b'\n').count();
            (lines >= count).then_some(())
        })
    }

    /// Waits until `accept` finds what it looks for in all that was said; `what` is its name in
    /// failures.
    ///
    /// # Errors
    /// When the time is over or the stream ends without it.
    pub fn wait_until<T>(
        &self,
        what: impl std::fmt::Display,
        within: Duration,
        mut accept: impl FnMut(&[u8]) -> Option<T>,
    ) -> Outcome<T> {
        let deadline = Instant::now() + within;
        let mut state = self.shared.caught_up();
        loop {
            if let Some(found) = accept(&state.bytes) {
                return Ok(found);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if state.ended || left.is_zero() {
                let why = if state.ended { "before its end".into() } else { format!("within {within:?}") };
                let last = last_part(&state.bytes);
                return Err(Failure::new(format!("{}: no {what} {why}; last said: {last:?}", self.name)));
            }
            let waited = self.shared.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Waits for the end of the stream and gives everything that was said.
    ///
    /// # Errors
    /// When the stream is still open after `within`.
    pub fn wait_end(mut self, within: Duration) -> Outcome<String> {
        if !self.settle(within) {
            return Err(Failure::new(format!("{}: still open after {within:?}", self.name)));
        }
        if let Some(reader) = self.reader.take() {
            reader.join().map_err(|_| Failure::new(format!("{}: the reader panicked", self.name)))?;
        }
        Ok(self.text())
    }

    /// Waits for the end of the stream; says whether it came in time.
    pub fn settle(&self, within: Duration) -> bool {
        let state = self.shared.caught_up();
        let waited = self.shared.changed.wait_timeout_while(state, within, |state| !state.ended);
        waited.unwrap_or_else(PoisonError::into_inner).0.ended
    }

    /// The end of what was said, for an error's text.
    pub fn tail(&self) -> String {
        last_part(&self.shared.caught_up().bytes)
    }
}

impl Shared {
    /// The state after reading all that is there, without waiting. The reader's thread does the
    /// same, but on a busy machine it may lag behind, and what a process said before it answered
    /// must not be missed.
    fn caught_up(&self) -> MutexGuard<'_, State> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let mut piece = [0; 4096];
        let before = state.bytes.len();
        // The bound lets others have the lock when the other end never stops sending.
        while !state.ended
            && state.bytes.len() < before + (1 << 20)
            && wait_readable(self.stream.as_fd(), Some(&Timespec::default()))
        {
            let read = state.source.read(&mut piece).unwrap_or(0);
            state.bytes.extend(piece.iter().take(read));
            state.ended = read == 0;
        }
        if state.ended || state.bytes.len() > before {
            self.changed.notify_all();
        }
        state
    }
}

/// Whether a read would not wait, within this time or (none) for ever. The end of the stream and an
/// error are readable too.
fn wait_readable(stream: BorrowedFd<'_>, within: Option<&Timespec>) -> bool {
    loop {
        match poll(&mut [PollFd::from_borrowed_fd(stream, PollFlags::IN)], within) {
            Err(Errno::INTR) => {}
            ready => return ready != Ok(0),
        }
    }
}

/// Bytes of a transcript that go into an error: about a screen.
const TAIL_BYTES: usize = 2 << 10;

fn last_part(bytes: &[u8]) -> String {
    let from = bytes.len().saturating_sub(TAIL_BYTES);
    String::from_utf8_lossy(bytes.get(from..).unwrap_or_default()).trim().to_owned()
}

fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    haystack.windows(needle.len().max(1)).position(|window| window == needle)
}

#[cfg(test)]
mod tests {
    use std::{io::Write, os::unix::net::UnixStream};

    use super::*;

    const SOON: Duration = Duration::from_secs(10);

    #[test]
    fn waits_for_words_and_lines_behind_a_mark() {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        let transcript = Transcript::follow("peer", theirs).unwrap();
        ours.write_all(b"one\ntwo\n").unwrap();
        let mark = transcript.wait_for("two", 0, SOON).unwrap();
        assert_eq!(mark, 7);
        ours.write_all(b"three\nfour\n").unwrap();
        transcript.wait_lines(3, mark, SOON).unwrap();
        drop(ours);
        assert_eq!(transcript.wait_end(SOON).unwrap(), "one\ntwo\nthree\nfour\n");
    }

    #[test]
    fn the_end_and_the_deadline_are_failures_that_quote_the_last_words() {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        let transcript = Transcript::follow("peer", theirs).unwrap();
        ours.write_all(b"alas").unwrap();
        transcript.wait_for("alas", 0, SOON).unwrap();
        let late = transcript.wait_for("joy", 0, Duration::from_millis(1)).unwrap_err().to_string();
        assert!(late.contains("within 1ms") && late.contains("alas"), "{late}");
        drop(ours);
        let over = transcript.wait_for("joy", 0, SOON).unwrap_err().to_string();
        assert!(over.contains("before its end"), "{over}");
    }
}
