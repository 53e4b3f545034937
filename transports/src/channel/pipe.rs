//! A channel over pipes: in one direction, or in both through a command.
//!
//! A pipe has no timeouts and cannot be shut down, so our ends are non-blocking, and each
//! wait is for the pipe and for a [`Wake`].

use std::io::{self, ErrorKind, IoSlice};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::event::PollFlags;
use rustix::fs::{Mode, OFlags, fcntl_getfl, fcntl_setfl, open};
use rustix::io::Errno;

use crate::channel::command::RunningCommand;
use crate::os::broken_pipe;
use crate::os::wake::Wake;

/// Bytes that a pipe should hold, where the kernel lets it: 1 MiB, the most that it allows without
/// privileges.
const CAPACITY: usize = 1 << 20;

/// Timeout for a command to end after it closed its end of a pipe; its status tells why it did.
const EXIT_TIMEOUT: Duration = Duration::from_secs(1);

#[derive(Debug)]
pub(crate) struct Pipe {
    incoming: End,
    outgoing: End,
    closed: AtomicBool,
    wake: Wake,
    timeout: Mutex<Option<Duration>>,
    /// Last, so that its pipes are closed before it is ended.
    command: Option<RunningCommand>,
}

/// An end of a pipe, until it is closed; the thread that uses it holds the lock.
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
        let (command, stdin, stdout) = RunningCommand::spawn(command)?;
        Self::new(
            End::new(stdout.into(), OFlags::RDONLY)?,
            End::new(stdin.into(), OFlags::WRONLY)?,
            Some(command),
        )
    }

    fn new(incoming: End, outgoing: End, command: Option<RunningCommand>) -> io::Result<Self> {
        let (closed, timeout) = (AtomicBool::new(false), Mutex::new(None));
        Ok(Self { incoming, outgoing, closed, wake: Wake::new()?, timeout, command })
    }

    pub(crate) fn is_two_way(&self) -> bool {
        self.command.is_some()
    }

    /// A duplicate of the end on which bytes come in.
    pub(crate) fn readable_end(&self) -> io::Result<OwnedFd> {
        self.incoming.lock().as_ref().ok_or(ErrorKind::BrokenPipe)?.try_clone()
    }

    /// That of the end on which bytes come in, else of the other.
    pub(crate) fn descriptor_number(&self) -> Option<i32> {
        let number = |end: &End| end.lock().as_ref().map(AsRawFd::as_raw_fd);
        number(&self.incoming).or_else(|| number(&self.outgoing))
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

    /// Closes both ends, now or as soon as the thread that uses one has woken up; kills the
    /// command.
    pub(crate) fn close(&self) {
        self.closed.store(true, Ordering::Relaxed);
        self.wake.fire();
        self.outgoing.close();
        self.incoming.close();
        self.command.iter().for_each(RunningCommand::end);
    }

    pub(crate) fn finish_sending(&self) {
        self.outgoing.lock().take();
    }

    /// Ends what the command reads, and waits for its end; its failure is ours. Without one there
    /// is nothing to wait for.
    pub(crate) fn settle(&self, limit: Duration) -> io::Result<()> {
        let Some(command) = &self.command else { return Ok(()) };
        self.finish_sending();
        match command.wait(&self.wake, limit)? {
            Some(status) => command.failure(status).map_or(Ok(()), Err),
            None => Err(command.runs_on(limit)),
        }
    }

    pub(crate) fn set_timeout(&self, limit: Option<Duration>) {
        *self.timeout.lock().unwrap_or_else(PoisonError::into_inner) = limit;
    }

    pub(crate) fn timeout(&self) -> Option<Duration> {
        *self.timeout.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until it is worth trying again, be it to find the pipe closed.
    fn wait(&self, end: &OwnedFd, ready: PollFlags) -> io::Result<()> {
        self.wake.wait(end.as_fd(), ready, self.timeout()).map(drop)
    }

    /// The end of a pipe whose other end is closed: an error if the command failed.
    fn at_end(&self) -> io::Result<usize> {
        let Some(command) = &self.command else { return Ok(0) };
        match command.wait(&self.wake, EXIT_TIMEOUT)? {
            Some(status) => command.failure(status).map_or(Ok(0), Err),
            None => Ok(0),
        }
    }

    /// The error of a pipe whose reading end is closed.
    fn not_read(&self) -> io::Error {
        let status = self.command.as_ref().and_then(|command| {
            Some(command.ended_with(command.wait(&self.wake, EXIT_TIMEOUT).ok().flatten()?))
        });
        let cause = status.unwrap_or_else(|| "the other end of the pipe was closed".to_owned());
        io::Error::new(ErrorKind::BrokenPipe, format!("{cause}, and not everything was read"))
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

    /// Never blocks: a thread that holds the lock has been woken, and closes the end itself.
    fn close(&self) {
        if let Ok(mut end) = self.0.try_lock() {
            end.take();
        }
    }
}

/// Makes an end non-blocking, without changing that for others who inherited it too: non-blocking
/// is the open file description, which they share.
fn own_description(end: OwnedFd, access: OFlags) -> io::Result<OwnedFd> {
    let path = format!("/proc/self/fd/{}", end.as_raw_fd());
    match open(path, access | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty()) {
        Ok(own) => Ok(own),
        // No /proc, another user's pipe, or one without a reader (which the first write reports
        // better): do without.
        Err(_) => {
            fcntl_setfl(&end, fcntl_getfl(&end)? | OFlags::NONBLOCK)?;
            Ok(end)
        }
    }
}

#[cfg(test)]
mod tests;
