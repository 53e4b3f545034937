//! Our own command, as a user runs it.

use std::{
    ffi::OsStr,
    path::PathBuf,
    process::{Command, Stdio},
    sync::OnceLock,
};

use serde_json::Value;

use crate::{Failure, Outcome, Process};

/// When this variable is set, it is the command that the tests run; otherwise they build it.
const BINARY: &str = "MULTIFD_BIN";

/// The `multifd` command.
#[derive(Debug)]
pub enum Multifd {}

impl Multifd {
    /// Starts `multifd` with these arguments; stdout and stderr are kept. `name` is what failures call it.
    ///
    /// # Errors
    /// When it cannot be built or started.
    pub fn spawn<A: AsRef<OsStr>>(name: &str, arguments: impl IntoIterator<Item = A>) -> Outcome<Process> {
        let mut command = Command::new(Self::binary()?);
        Process::spawn(name, command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()))
    }

    /// The program. Built once per test program, in the profile of the test, so that it is never older than
    /// the sources.
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
