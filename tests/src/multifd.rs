//! Our own command, as a user runs it.

use std::{
    ffi::OsStr,
    fmt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::OnceLock,
    time::Duration,
};

use serde_json::Value;

use crate::{Failure, Outcome, Process, Settings, process::wrapped};

/// When this variable is set, it is the command that the tests run; otherwise they build it.
const BINARY: &str = "MULTIFD_BIN";

/// The `multifd` command.
#[derive(Debug)]
pub enum Multifd {}

impl Multifd {
    /// Starts `multifd` with these arguments; stdout and stderr are kept. `name` is what failures
    /// call it.
    ///
    /// # Errors
    /// When it cannot be built or started.
    pub fn spawn<A: AsRef<OsStr>>(name: &str, arguments: impl IntoIterator<Item = A>) -> Outcome<Process> {
        let mut command = Command::new(Self::binary()?);
        Process::spawn(name, command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()))
    }

    /// The same with a standard input, for `fd:0`.
    ///
    /// # Errors
    /// As [`Multifd::spawn`].
    pub fn spawn_reading<A: AsRef<OsStr>>(
        name: &str,
        input: impl Into<Stdio>,
        arguments: impl IntoIterator<Item = A>,
    ) -> Outcome<Process> {
        let mut command = Command::new(Self::binary()?);
        Process::spawn(name, command.args(arguments).stdin(input).stdout(Stdio::piped()))
    }

    /// Starts `multifd send`: the checkpoint goes to `uri`, the way that `settings` say.
    ///
    /// # Errors
    /// When it cannot be built or started.
    pub fn send(checkpoint: &Path, uri: &str, settings: &Settings) -> Outcome<Process> {
        Self::send_with(checkpoint, uri, settings, &[])
    }

    /// The same with more flags.
    ///
    /// # Errors
    /// As [`Multifd::send`].
    pub fn send_with(checkpoint: &Path, uri: &str, settings: &Settings, flags: &[&str]) -> Outcome<Process> {
        Self::send_in(&[], checkpoint, uri, settings, flags)
    }

    /// The same by this command: `ip netns exec NAME`, for example.
    ///
    /// # Errors
    /// As [`Multifd::spawn`].
    pub fn send_in(
        wrapper: &[&str],
        checkpoint: &Path,
        uri: &str,
        settings: &Settings,
        flags: &[&str],
    ) -> Outcome<Process> {
        let mut arguments = vec!["send".to_owned(), checkpoint.display().to_string(), uri.to_owned()];
        arguments.push("--json".into());
        if let Some(channels) = settings.channels {
            let codec = settings.compression.to_string();
            arguments.extend(["--channels".into(), channels.to_string(), "--codec".into(), codec]);
        }
        if settings.max_bandwidth > 0 {
            arguments.extend(["--max-bandwidth".into(), format!("{}B/s", settings.max_bandwidth)]);
        }
        if !settings.return_path {
            arguments.push("--no-return-path".into());
        }
        if let Some(zero_pages) = settings.zero_pages {
            arguments.extend(["--zero-page-detection".into(), zero_pages.name().into()]);
        }
        arguments.extend(flags.iter().map(|flag| (*flag).to_owned()));
        let mut command = wrapped(wrapper, Self::binary()?);
        Process::spawn("send", command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()))
    }

    /// The program. Built once per test program, in the profile of the test, so that it is never
    /// older than the sources.
    ///
    /// # Errors
    /// When it cannot be built.
    pub fn binary() -> Outcome<PathBuf> {
        static BUILT: OnceLock<Result<PathBuf, String>> = OnceLock::new();
        let find = || match std::env::var_os(BINARY) {
            Some(path) => Ok(PathBuf::from(path)),
            None => build().map_err(|failure| failure.to_string()),
        };
        BUILT.get_or_init(find).clone().map_err(Failure::new)
    }
}

/// A `multifd receive` that listens.
#[derive(Debug)]
pub struct Receive {
    process: Process,
    uri: String,
}

impl Receive {
    /// Starts it, and waits until it listens on `uri`. The checkpoint will be at `out`.
    ///
    /// # Errors
    /// When it cannot be built or started, or does not listen.
    pub fn listen(uri: &str, out: &Path) -> Outcome<Self> {
        Self::listen_with(uri, out, &[])
    }

    /// The same with more flags.
    ///
    /// # Errors
    /// As [`Receive::listen`].
    pub fn listen_with(uri: &str, out: &Path, flags: &[&str]) -> Outcome<Self> {
        Self::listen_in(&[], uri, out, flags)
    }

    /// The same with a standard input, for `fd:0`.
    ///
    /// # Errors
    /// As [`Receive::listen`].
    pub fn listen_reading(uri: &str, out: &Path, input: impl Into<Stdio>) -> Outcome<Self> {
        let out = out.display().to_string();
        Self::listening(Multifd::spawn_reading("receive", input, ["receive", uri, "--out", &out, "--json"])?)
    }

    /// The same by this command: `ip netns exec NAME`, for example.
    ///
    /// # Errors
    /// As [`Receive::listen`].
    pub fn listen_in(wrapper: &[&str], uri: &str, out: &Path, flags: &[&str]) -> Outcome<Self> {
        let out = out.display().to_string();
        let mut command = wrapped(wrapper, Multifd::binary()?);
        command.args(["receive", uri, "--out", &out, "--json"]).args(flags);
        Self::listening(Process::spawn("receive", command.stdin(Stdio::null()).stdout(Stdio::piped()))?)
    }

    fn listening(process: Process) -> Outcome<Self> {
        let listening = |said: &[u8]| {
            let said = std::str::from_utf8(said).ok()?.strip_suffix('\n')?;
            said.lines().find_map(|line| line.strip_prefix("listening on ")).map(str::to_owned)
        };
        let uri = process.stderr().wait_until("the address", LISTEN, listening)?;
        Ok(Self { process, uri })
    }

    /// What to connect to: for `tcp:127.0.0.1:0` with the port that was free.
    pub fn uri(&self) -> &str {
        &self.uri
    }

    /// The process: its stderr, its end.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// The process alone.
    pub fn into_process(self) -> Process {
        self.process
    }

    /// Waits until the guest has arrived and is stored on disk.
    ///
    /// # Errors
    /// When it has not in time.
    pub fn wait_success(&mut self, within: Duration) -> Outcome<CommandReport> {
        self.process.wait_success(within)?;
        CommandReport::by(&self.process)
    }
}

/// The JSON object that a command has printed at its end.
#[derive(Clone, Debug)]
pub struct CommandReport(Value);

impl CommandReport {
    /// What `process`, which has ended, has printed.
    ///
    /// # Errors
    /// When that is no JSON object.
    pub fn by(process: &Process) -> Outcome<Self> {
        let stdout = process.stdout()?;
        stdout.settle(LAST_WORDS);
        let said: Value = serde_json::from_str(&stdout.text()).map_err(|error| process.explain(error))?;
        if said.is_object() { Ok(Self(said)) } else { Err(process.explain(format_args!("printed {said}"))) }
    }

    /// The number under this key.
    ///
    /// # Errors
    /// When there is none.
    pub fn number(&self, key: &str) -> Outcome<u64> {
        self.find(key, Value::as_u64)
    }

    /// The text under this key.
    ///
    /// # Errors
    /// When there is none.
    pub fn text(&self, key: &str) -> Outcome<&str> {
        self.find(key, Value::as_str)
    }

    /// All of it.
    pub fn object(&self) -> &Value {
        &self.0
    }

    fn find<'a, T>(&'a self, key: &str, read: impl FnOnce(&'a Value) -> Option<T>) -> Outcome<T> {
        self.0.get(key).and_then(read).ok_or_else(|| Failure::new(format!("no {key} in {self}")))
    }
}

impl fmt::Display for CommandReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// How long a command may take to listen. It takes milliseconds on an idle machine.
const LISTEN: Duration = Duration::from_secs(30);

/// How long the output of a command that has ended may be on its way.
const LAST_WORDS: Duration = Duration::from_secs(10);

fn build() -> Outcome<PathBuf> {
    let mut cargo = Command::new(env!("CARGO"));
    cargo.current_dir(env!("CARGO_MANIFEST_DIR"));
    cargo.args([
        "build",
        "--package",
        "multifd",
        "--bin",
        "multifd",
        "--message-format",
        "json-render-diagnostics",
    ]);
    if !cfg!(debug_assertions) {
        cargo.arg("--release");
    }
    let output = cargo.output()?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(Failure::new(format!("building multifd: {}\n{said}", output.status)));
    }
    let said = String::from_utf8_lossy(&output.stdout);
    let messages = said.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let executable = |message: Value| message.get("executable")?.as_str().map(PathBuf::from);
    messages.filter_map(executable).next_back().ok_or_else(|| Failure::new("cargo names no executable"))
}
