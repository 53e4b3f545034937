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

/// Timeout for a killed command to end. Only one that hangs in the kernel takes longer.
const KILL_TIMEOUT: Duration = Duration::from_secs(2);

/// A running `/bin/sh -c`, the leader of a process group of its own; dropping it ends the whole
/// group.
#[derive(Debug)]
pub(crate) struct RunningCommand {
    command: String,
    pid: Pid,
    /// A pidfd, readable when the command has ended.
    ended: OwnedFd,
    /// Taken when the command is ended. Until then it is not reaped, so that its pid is not reused.
    child: Mutex<Option<Child>>,
}

impl RunningCommand {
    /// Starts a command; it inherits the standard error.
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
        let running = Self { command: command.to_owned(), pid, ended, child: Mutex::new(Some(child)) };
        Ok((running, stdin, stdout))
    }

    /// Waits for the command to end, at most `limit`. `None`: it still runs, or `wake` came first.
    pub(crate) fn wait(&self, wake: &Wake, limit: Duration) -> io::Result<Option<ExitStatus>> {
        match wake.wait(self.ended.as_fd(), PollFlags::IN, Some(limit)) {
            Ok(true) => self.status().map(Some),
            Ok(false) => Ok(None),
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The error of a command that ended with a status other than 0.
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

    /// Kills the process group, and reaps the command.
    pub(crate) fn end(&self) {
        let Some(mut child) = self.child.lock().unwrap_or_else(PoisonError::into_inner).take() else {
            return;
        };
        // Other code of this process has reaped it: its pid may have been reused.
        if self.status().is_err() {
            return;
        }
        // Fails only if the whole group is gone already.
        let _ = kill_process_group(self.pid, Signal::KILL);
        let gone = Wake::new().and_then(|wake| self.wait(&wake, KILL_TIMEOUT));
        match gone {
            Ok(Some(_)) => drop(child.wait()),
            _ => tracing::warn!(command = self.command, "the command was killed, but is not gone yet"),
        }
    }

    /// The status of a command that has ended. It is not reaped by this, unless this process
    /// ignores SIGCHLD or reaps all of its children.
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

impl Drop for RunningCommand {
    fn drop(&mut self) {
        self.end();
    }
}
