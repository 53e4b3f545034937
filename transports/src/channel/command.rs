//! The command behind `exec:`.

use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use rustix::event::PollFlags;
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, kill_process_group, pidfd_open, waitid,
};

use crate::os::wake::Wake;

/// How long a command that was killed may take to be gone. Longer takes only one that hangs in the kernel.
const DEATH: Duration = Duration::from_secs(2);

/// A running `/bin/sh -c`, the leader of a process group of its own; dropping it ends the whole group.
#[derive(Debug)]
pub(crate) struct Shell {
    command: String,
    pid: Pid,
    /// Becomes readable when the shell ends.
    ended: OwnedFd,
    /// Taken by whoever ends it. Until then it is not reaped, so that its number stays its own.
    child: Mutex<Option<Child>>,
}

impl Shell {
    /// Starts it; its standard error is ours.
    pub(crate) fn spawn(command: &str) -> io::Result<(Self, ChildStdin, ChildStdout)> {
        let mut child = Command::new("/bin/sh")
            .args(["-c", command])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .process_group(0)
            .spawn()?;
        let ends = child.stdin.take().zip(child.stdout.take());
        let pid = Pid::from_child(&child);
        let ended = pidfd_open(pid, PidfdFlags::empty());
        let (Ok(ended), Some((stdin, stdout))) = (ended, ends) else {
            let _ = child.kill().and_then(|()| child.wait());
            return Err(io::Error::new(ErrorKind::Unsupported, "no descriptor of the command's process"));
        };
        let shell = Self { command: command.to_owned(), pid, ended, child: Mutex::new(Some(child)) };
        Ok((shell, stdin, stdout))
    }

    /// Waits until it has ended, for at most `limit`. `None`: it runs on, or `wake` came first.
    pub(crate) fn wait(&self, wake: &Wake, limit: Duration) -> io::Result<Option<ExitStatus>> {
        match wake.wait(self.ended.as_fd(), PollFlags::IN, Some(limit)) {
            Ok(true) => self.status().map(Some),
            Ok(false) => Ok(None),
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// What its end means for the stream, if it was not a good one.
    pub(crate) fn failure(&self, status: ExitStatus) -> Option<io::Error> {
        (!status.success()).then(|| io::Error::other(self.ended_with(status)))
    }

    /// "the command "false" ended with exit status: 1"
    pub(crate) fn ended_with(&self, status: ExitStatus) -> String {
        format!("the command {:?} ended with {status}", self.command)
    }

    pub(crate) fn runs_on(&self, limit: Duration) -> io::Error {
        let text = format!("the command {:?} did not end within {limit:?}", self.command);
        io::Error::new(ErrorKind::TimedOut, text)
    }

    /// Kills whatever is left of the process group, and reaps the shell.
    pub(crate) fn end(&self) {
        let Some(mut child) = self.child.lock().unwrap_or_else(PoisonError::into_inner).take() else {
            return;
        };
        // Somebody else in this process has reaped it: its number may be another's by now.
        if self.status().is_err() {
            return;
        }
        // Fails only if the whole group is gone already.
        let _ = kill_process_group(self.pid, Signal::KILL);
        let gone = Wake::new().and_then(|wake| self.wait(&wake, DEATH));
        match gone {
            Ok(Some(_)) => drop(child.wait()),
            _ => tracing::warn!(command = self.command, "the command was killed, but is not gone yet"),
        }
    }

    /// The status of a shell that has ended. It stays to be reaped, unless this process ignores SIGCHLD or reaps whatever
    /// ends.
    fn status(&self) -> io::Result<ExitStatus> {
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        let taken =
            |_| io::Error::other(format!("how the command {:?} ended is known to others only", self.command));
        let raw = match waitid(WaitId::Pid(self.pid), options).map_err(taken)? {
            None => 0,
            Some(status) => match (status.exit_status(), status.terminating_signal()) {
                (Some(code), _) => (code & 0xff) << 8,
                (None, Some(signal)) => signal,
                (None, None) => 0,
            },
        };
        Ok(ExitStatus::from_raw(raw))
    }
}

impl Drop for Shell {
    fn drop(&mut self) {
        self.end();
    }
}
