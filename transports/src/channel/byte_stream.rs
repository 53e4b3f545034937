//! Streams that are no descriptors, behind a socket pair.
//!
//! ```text
//!  Channel <── socket pair ──> mig-stream-out: reads the pair, writes the stream
//!                              mig-stream-in:  reads the stream, writes the pair
//!                              mig-stream-end: closes the stream once the channel is closed
//! ```

use std::fmt;
use std::io::{self, ErrorKind, Read};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::Builder;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use socket2::Socket;

use super::Channel;
use crate::ThreadHook;
use crate::channel::stream::Stream;

/// A byte stream in both directions that is no descriptor: a websocket, a QUIC stream, encryption
/// of the embedder's own. One thread reads while another writes and a third may close.
pub trait ByteStream: Send + Sync + 'static {
    /// Reads what is there, waiting for at least a byte; 0 is the end of what the peer sends.
    ///
    /// # Errors
    /// The stream's own. It is not read again, unless the error is `Interrupted`.
    fn read(&self, buf: &mut [u8]) -> io::Result<usize>;

    /// Writes some of `buf`, at least a byte.
    ///
    /// # Errors
    /// The stream's own. It is not written again, unless the error is `Interrupted`.
    fn write(&self, buf: &[u8]) -> io::Result<usize>;

    /// Ends what is written, and returns when all of it is on its way: nothing may be lost if the
    /// process ends then. Reading goes on.
    ///
    /// # Errors
    /// The stream's own.
    fn finish(&self) -> io::Result<()>;

    /// Ends both directions: [`read`](Self::read), [`write`](Self::write) and
    /// [`finish`](Self::finish) return, also where another thread is blocked in one of them.
    fn close(&self);
}

/// Bytes that are copied at a time: 256 KiB, a socket pair's default buffer.
const PIECE: usize = 256 << 10;

/// How long a stream may take to send what a channel has sent before it was closed, as the kernel
/// goes on sending for a socket that is closed.
const LINGER: Duration = Duration::from_secs(10);

/// How far the copying has come.
#[derive(Debug, Default)]
pub(crate) struct Copying {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    failed: Option<(ErrorKind, String)>,
    /// All that the channel has sent is on its way, and ended.
    finished: bool,
}

impl Copying {
    /// Why the stream has failed, if it has.
    pub(crate) fn failure(&self) -> Option<io::Error> {
        self.lock().failed.as_ref().map(|(kind, text)| io::Error::new(*kind, text.clone()))
    }

    /// Waits until all that was sent is on its way.
    pub(crate) fn settle(&self, limit: Duration) -> io::Result<()> {
        if self.wait_finished(limit) {
            return self.failure().map_or(Ok(()), Err);
        }
        let text = format!("the stream has not sent all of it within {limit:?}");
        Err(io::Error::new(ErrorKind::TimedOut, text))
    }

    /// False: it goes on.
    fn wait_finished(&self, limit: Duration) -> bool {
        let goes_on = |state: &mut State| !state.finished && state.failed.is_none();
        let waited = self.changed.wait_timeout_while(self.lock(), limit, goes_on);
        !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }

    fn note(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.lock());
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Channel {
    /// A channel over a stream that is no descriptor; `peer` names its other end in errors. Three
    /// threads copy between the stream and a socket pair (`mig-stream-out`, `mig-stream-in`,
    /// `mig-stream-end`, which call `hook`): each byte is copied twice more than on a socket. They
    /// end when the channel is closed and the stream has sent what the channel had, or has failed
    /// to for 10 s.
    ///
    /// # Errors
    /// The process has no descriptors or threads left; the stream is closed then.
    pub fn over_stream(stream: impl ByteStream, peer: String, hook: &ThreadHook) -> io::Result<Self> {
        let (ours, theirs) = UnixStream::pair()?;
        let mut channel = Self::over(Stream::Socket(ours.into()), peer);
        let copying = Arc::new(Copying::default());
        channel.copying = Some(Arc::clone(&copying));
        let pump = Arc::new(Pump { stream: Box::new(stream), socket: theirs.into(), copying });
        // First the one that closes the stream, whatever becomes of the others.
        let threads: [(&str, Body); 3] = [
            ("mig-stream-end", Pump::close_when_done),
            ("mig-stream-out", Pump::copy_out),
            ("mig-stream-in", Pump::copy_in),
        ];
        for (name, run) in threads {
            let (ending, hook) = (Ending(Arc::clone(&pump)), hook.clone());
            let started = Builder::new().name(name.to_owned()).spawn(move || {
                hook.call(name);
                run(&ending.0);
            });
            if let Err(error) = started {
                pump.fail(&error);
                pump.stream.close();
                return Err(error);
            }
        }
        Ok(channel)
    }
}

/// What a thread does.
type Body = fn(&Pump);

/// The stream, and the end of the pair that is not the channel's.
struct Pump {
    stream: Box<dyn ByteStream>,
    socket: Socket,
    copying: Arc<Copying>,
}

impl Pump {
    fn copy_out(&self) {
        match self.copy_out_to_the_end() {
            Ok(()) => self.copying.note(|state| state.finished = true),
            Err(error) => self.fail(&error),
        }
    }

    fn copy_out_to_the_end(&self) -> io::Result<()> {
        let mut piece = vec![0; PIECE];
        loop {
            let count = again(|| (&self.socket).read(&mut piece))?;
            let mut left = piece.get(..count).unwrap_or_default();
            if left.is_empty() {
                return again(|| self.stream.finish());
            }
            while !left.is_empty() {
                match again(|| self.stream.write(left))? {
                    0 => return Err(ErrorKind::WriteZero.into()),
                    written => left = left.get(written..).unwrap_or_default(),
                }
            }
        }
    }

    fn copy_in(&self) {
        let mut piece = vec![0; PIECE];
        loop {
            match again(|| self.stream.read(&mut piece)) {
                Ok(0) => return drop(self.socket.shutdown(Shutdown::Write)),
                Ok(count) => {
                    let mut left = piece.get(..count).unwrap_or_default();
                    while !left.is_empty() {
                        // No SIGPIPE: the process belongs to the embedder.
                        match again(|| self.socket.send_with_flags(left, libc::MSG_NOSIGNAL)) {
                            Ok(sent) => left = left.get(sent..).unwrap_or_default(),
                            // The channel is closed: no one wants it.
                            Err(_) => return,
                        }
                    }
                }
                Err(error) => return self.fail(&error),
            }
        }
    }

    /// Both directions of the pair have ended when the kernel reports a hang-up.
    fn close_when_done(&self) {
        while let Ok(0) | Err(Errno::INTR) = poll(&mut [PollFd::new(&self.socket, PollFlags::empty())], None)
        {
        }
        self.copying.wait_finished(LINGER);
        self.stream.close();
    }

    /// Ends the pair, so that the channel finds the reason.
    fn fail(&self, error: &io::Error) {
        let text = format!("the stream below has failed: {error}");
        self.copying.note(|state| {
            state.failed.get_or_insert((error.kind(), text));
        });
        // Fails only if it has ended already.
        drop(self.socket.shutdown(Shutdown::Both));
    }
}

/// Ends the pair when a thread panics, in the hook or in the stream.
struct Ending(Arc<Pump>);

impl Drop for Ending {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.fail(&io::Error::other("its thread panicked"));
            self.0.stream.close();
        }
    }
}

fn again<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            outcome => return outcome,
        }
    }
}

impl fmt::Debug for Pump {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pump").field("socket", &self.socket).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
