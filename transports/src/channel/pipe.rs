//! A channel over pipes: one way, or there and back through a command.
//!
//! A pipe has no timeouts and nobody can shut it down, so our ends are non-blocking, and whoever waits waits for the
//! pipe and for a [`Wake`].

use std::io::{self, ErrorKind, IoSlice};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::event::PollFlags;
use rustix::fs::{Mode, OFlags, fcntl_getfl, fcntl_setfl, open};
use rustix::io::Errno;

use crate::channel::command::Shell;
use crate::os::broken_pipe;
use crate::os::wake::Wake;

/// Bytes that a pipe should hold, where the kernel lets it: 1 MiB, the most that it lets everybody have.
const CAPACITY: usize = 1 << 20;

/// How long a command may take to end after it has closed its end of a pipe: then its status tells why it did.
const LAST_BREATH: Duration = Duration::from_secs(1);

#[derive(Debug)]
pub(crate) struct Pipe {
    incoming: End,
    outgoing: End,
    closed: AtomicBool,
    wake: Wake,
    silence: Mutex<Option<Duration>>,
    /// Last, so that its pipes are closed before it is ended.
    shell: Option<Shell>,
}

/// An end of a pipe, until it is closed; whoever uses it holds the lock.
#[derive(Debug, Default)]
struct End(Mutex<Option<OwnedFd>>);

impl Pipe {
    /// Receives only.
    pub(crate) fn incoming(end: OwnedFd) -> io::Result<Self> {
        Self::new(End::new(end, OFlags::RDONLY)?, End::default(), None)
    }

    /// Sends only.
    pub(crate) fn outgoing(end: OwnedFd) -> io::Result<Self> {
        Self::new(End::default(), End::new(end, OFlags::WRONLY)?, None)
    }

    /// Sends to the command, and receives what it prints.
    pub(crate) fn through(command: &str) -> io::Result<Self> {
        let (shell, stdin, stdout) = Shell::spawn(command)?;
        Self::new(
            End::new(stdout.into(), OFlags::RDONLY)?,
            End::new(stdin.into(), OFlags::WRONLY)?,
            Some(shell),
        )
    }

    fn new(incoming: End, outgoing: End, shell: Option<Shell>) -> io::Result<Self> {
        let (closed, silence) = (AtomicBool::new(false), Mutex::new(None));
        Ok(Self { incoming, outgoing, closed, wake: Wake::new()?, silence, shell })
    }

    pub(crate) fn is_two_way(&self) -> bool {
        self.shell.is_some()
    }

    /// A duplicate of the end on which bytes come in.
    pub(crate) fn readable_end(&self) -> io::Result<OwnedFd> {
        self.incoming.lock().as_ref().ok_or(ErrorKind::BrokenPipe)?.try_clone()
    }

    pub(crate) fn send_vectored(&self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        let mut end = self.outgoing.lock();
        loop {
            if self.closed.load(Ordering::Relaxed) {
                *end = None;
            }
            let Some(pipe) = &*end else {
                return Err(io::Error::new(ErrorKind::BrokenPipe, "nothing can be sent on this end"));
            };
            match broken_pipe::as_error(|| rustix::io::writev(pipe, bufs)) {
                Ok(sent) => return Ok(sent),
                Err(Errno::AGAIN) => self.wait(pipe, PollFlags::OUT)?,
                Err(Errno::INTR) => {}
                Err(Errno::PIPE) => return Err(self.not_read()),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// 0 is the end, as well as [`close`](Self::close).
    pub(crate) fn recv(&self, buf: &mut [u8]) -> io::Result<usize> {
        let mut end = self.incoming.lock();
        loop {
            if self.closed.load(Ordering::Relaxed) {
                *end = None;
                return Ok(0);
            }
            let Some(pipe) = &*end else {
                return Err(io::Error::new(ErrorKind::BrokenPipe, "nothing can be received on this end"));
            };
            match rustix::io::read(pipe, &mut *buf) {
                Ok(0) => return self.at_end(),
                Ok(received) => return Ok(received),
                Err(Errno::AGAIN) => self.wait(pipe, PollFlags::IN)?,
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Closes both ends, now or as soon as whoever uses one has woken up; kills the command.
    pub(crate) fn close(&self) {
        self.closed.store(true, Ordering::Relaxed);
        self.wake.fire();
        self.outgoing.close();
        self.incoming.close();
        self.shell.iter().for_each(Shell::end);
    }

    pub(crate) fn finish_sending(&self) {
        self.outgoing.lock().take();
    }

    /// Ends what the command reads, and waits for its end; its failure is ours. Without one there is nothing to wait for.
    pub(crate) fn settle(&self, limit: Duration) -> io::Result<()> {
        let Some(shell) = &self.shell else { return Ok(()) };
        self.finish_sending();
        match shell.wait(&self.wake, limit)? {
            Some(status) => shell.failure(status).map_or(Ok(()), Err),
            None => Err(shell.runs_on(limit)),
        }
    }

    pub(crate) fn set_silence_limit(&self, limit: Option<Duration>) {
        *self.silence.lock().unwrap_or_else(PoisonError::into_inner) = limit;
    }

    pub(crate) fn silence_limit(&self) -> Option<Duration> {
        *self.silence.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until it is worth trying again, be it to find the pipe closed.
    fn wait(&self, end: &OwnedFd, ready: PollFlags) -> io::Result<()> {
        self.wake.wait(end.as_fd(), ready, self.silence_limit()).map(drop)
    }

    /// The other end is closed: is that all, or did the command break off?
    fn at_end(&self) -> io::Result<usize> {
        let Some(shell) = &self.shell else { return Ok(0) };
        match shell.wait(&self.wake, LAST_BREATH)? {
            Some(status) => shell.failure(status).map_or(Ok(0), Err),
            None => Ok(0),
        }
    }

    /// Why nobody reads what is sent.
    fn not_read(&self) -> io::Error {
        let status = self
            .shell
            .as_ref()
            .and_then(|shell| Some(shell.ended_with(shell.wait(&self.wake, LAST_BREATH).ok().flatten()?)));
        let who = status.unwrap_or_else(|| "the other end of the pipe was closed".to_owned());
        io::Error::new(ErrorKind::BrokenPipe, format!("{who}, and not everything was read"))
    }
}

impl End {
    /// `access` is how the end is open.
    fn new(end: OwnedFd, access: OFlags) -> io::Result<Self> {
        let end = own_description(end, access)?;
        // It works with any capacity; this many bytes a call cost less.
        let _ = rustix::pipe::fcntl_setpipe_size(&end, CAPACITY);
        Ok(Self(Mutex::new(Some(end))))
    }

    fn lock(&self) -> MutexGuard<'_, Option<OwnedFd>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Never waits: whoever has the lock is woken, and closes it.
    fn close(&self) {
        if let Ok(mut end) = self.0.try_lock() {
            end.take();
        }
    }
}

/// Makes an end non-blocking, without changing that for others who inherited it too: non-blocking is the open file
/// description, which they share.
fn own_description(end: OwnedFd, access: OFlags) -> io::Result<OwnedFd> {
    let path = format!("/proc/self/fd/{}", end.as_raw_fd());
    match open(path, access | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty()) {
        Ok(own) => Ok(own),
        // No /proc, another user's pipe, or nobody reads it (which the first write tells better): do without.
        Err(_) => {
            fcntl_setfl(&end, fcntl_getfl(&end)? | OFlags::NONBLOCK)?;
            Ok(end)
        }
    }
}

#[cfg(test)]
mod tests;
