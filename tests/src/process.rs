//! A child process that never outlives its test.

use std::{
    ffi::OsStr,
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::process::CommandExt as _,
    },
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    process::{Pid, PidfdFlags, getpid, getppid, kill_process, pidfd_open, set_parent_process_death_signal},
};

pub use rustix::process::Signal;

use crate::{During, Failure, Outcome, Transcript, Usage};

/// A running program. Killed and reaped on drop; killed by the kernel when the thread that made it
/// ends, which for a test's own thread is the end of the test: do not make one on a thread that
/// ends earlier.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    ended: OwnedFd,
    stdout: Option<Transcript>,
    stderr: Transcript,
}

impl Process {
    /// Starts `command`. What it says on stderr is kept; what it says on stdout too if the
    /// command's stdout is piped.
    ///
    /// # Errors
    /// When the program cannot be started.
    pub fn spawn(name: impl Into<String>, command: &mut Command) -> Outcome<Self> {
        let name = name.into();
        die_with_parent(command);
        let program = command.get_program().to_string_lossy().into_owned();
        let mut child =
            command.stderr(Stdio::piped()).spawn().during(format_args!("{name}: starting {program}"))?;
        let stdout = child.stdout.take();
        let stdout = stdout.map(|pipe| Transcript::follow(format!("{name}'s stdout"), pipe)).transpose()?;
        let stderr = child.stderr.take().ok_or_else(|| Failure::new("stderr is not piped"))?;
        let stderr = Transcript::follow(format!("{name}'s stderr"), stderr)?;
        let ended = pidfd_open(Pid::from_child(&child), PidfdFlags::empty())?;
        Ok(Self { name, child, ended, stdout, stderr })
    }

    /// Waits for the process to end by itself.
    ///
    /// # Errors
    /// When it still runs after `within`; the failure quotes its stderr.
    pub fn wait(&mut self, within: Duration) -> Outcome<ExitStatus> {
        if self.ends(within)? {
            return Ok(self.child.wait()?);
        }
        Err(self.explain(format_args!("still running after {within:?}")))
    }

    /// Waits for the process to end by itself, with exit code 0.
    ///
    /// # Errors
    /// When it still runs after `within`, or reports a failure; the failure quotes its stderr.
    pub fn wait_success(&mut self, within: Duration) -> Outcome {
        let status = self.wait(within)?;
        if status.success() { Ok(()) } else { Err(self.explain_end(status)) }
    }

    /// As [`Process::wait_success`], and gives what the process has cost.
    ///
    /// # Errors
    /// As there.
    pub fn wait_usage(&mut self, within: Duration) -> Outcome<Usage> {
        let (status, usage) = self.wait_end(within)?;
        if status.success() { Ok(usage) } else { Err(self.explain_end(status)) }
    }

    /// Waits for the process to end by itself, however it ends, and gives the kernel's account of
    /// it, too.
    ///
    /// # Errors
    /// When it still runs after `within`; the failure quotes its stderr.
    pub fn wait_end(&mut self, within: Duration) -> Outcome<(ExitStatus, Usage)> {
        // Before it is reaped: afterwards there is no account.
        let usage = if self.ends(within)? { Some(Usage::of(self.ended.as_fd())?) } else { None };
        let status = self.wait(Duration::ZERO)?;
        Ok((status, usage.ok_or_else(|| self.explain("ended unnoticed"))?))
    }

    /// Sends a signal, such as a user's Ctrl-C ([`Signal::INT`]).
    ///
    /// # Errors
    /// When the process has been waited for already.
    pub fn signal(&self, signal: Signal) -> Outcome {
        Ok(kill_process(Pid::from_child(&self.child), signal)?)
    }

    /// Kills the process and reaps it.
    pub fn kill(&mut self) {
        // Both fail only for a process that has been reaped already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// The process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// What it said on stdout, if that is piped.
    ///
    /// # Errors
    /// When its stdout goes elsewhere.
    pub fn stdout(&self) -> Outcome<&Transcript> {
        self.stdout.as_ref().ok_or_else(|| Failure::new(format!("{}: stdout is not piped", self.name)))
    }

    /// What it said on stderr.
    pub fn stderr(&self) -> &Transcript {
        &self.stderr
    }

    /// A failure of this process: its name, `what`, and what it said on stderr.
    pub fn explain(&self, what: impl std::fmt::Display) -> Failure {
        let said = self.stderr.tail();
        let stderr = if said.is_empty() { String::new() } else { format!("\nits stderr: {said}") };
        Failure::new(format!("{}: {what}{stderr}", self.name))
    }

    /// As [`Process::explain`], for a process that is ending: waits briefly for its last output.
    pub fn explain_end(&self, what: impl std::fmt::Display) -> Failure {
        const LAST_WORDS: Duration = Duration::from_secs(1);
        if self.ends(LAST_WORDS).unwrap_or(false) {
            self.stderr.settle(LAST_WORDS);
        }
        self.explain(what)
    }

    fn ends(&self, within: Duration) -> Outcome<bool> {
        let deadline = Instant::now() + within;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = Timespec::try_from(left)?;
            match poll(&mut [PollFd::new(&self.ended, PollFlags::IN)], Some(&timeout)) {
                Ok(events) => return Ok(events > 0),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// The command that runs `program` by `wrapper`, if there is one.
pub(crate) fn wrapped(wrapper: &[impl AsRef<OsStr>], program: impl AsRef<OsStr>) -> Command {
    let Some((first, others)) = wrapper.split_first() else { return Command::new(program) };
    let mut command = Command::new(first);
    command.args(others).arg(program);
    command
}

#[expect(unsafe_code, reason = "asking for the parent-death signal must happen between fork and exec")]
fn die_with_parent(command: &mut Command) {
    let parent = getpid();
    let ask = move || {
        set_parent_process_death_signal(Some(Signal::KILL))?;
        // The parent may have died before the request was made.
        if getppid() == Some(parent) { Ok(()) } else { Err(Errno::CHILD.into()) }
    };
    // SAFETY: the closure runs in the forked child; it makes two system calls, allocates nothing
    // and takes no lock.
    unsafe { command.pre_exec(ask) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_exit_quotes_the_stderr() {
        let mut shell =
            Process::spawn("shell", Command::new("sh").args(["-c", "echo oh no >&2; exit 3"])).unwrap();
        let failure = shell.wait_success(Duration::from_secs(10)).unwrap_err().to_string();
        assert!(failure.contains("status: 3") && failure.contains("oh no"), "{failure}");
    }

    #[test]
    fn the_account_is_there_before_the_process_is_reaped() {
        let mut shell = Process::spawn("shell", Command::new("sh").args(["-c", "exit 0"])).unwrap();
        let usage = shell.wait_usage(Duration::from_secs(10)).unwrap();
        assert!(usage.minor_faults > 10 && usage.peak_resident_bytes > 100 << 10, "{usage:?}");
    }

    #[test]
    fn waiting_has_a_deadline_and_drop_kills() {
        let mut sleeper = Process::spawn("sleeper", Command::new("sleep").arg("1000")).unwrap();
        let failure = sleeper.wait(Duration::from_millis(10)).unwrap_err().to_string();
        assert!(failure.contains("still running"), "{failure}");
        let pid = Pid::from_child(&sleeper.child);
        drop(sleeper);
        assert!(kill_process(pid, Signal::KILL).is_err());
    }
}
