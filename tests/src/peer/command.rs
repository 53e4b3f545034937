//! Our command as a user runs it, with a scripted peer at the other end.

use std::path::{Path, PathBuf};
use std::sync::mpsc::channel;
use std::thread;
use std::time::Duration;

use multifd_transports::Endpoint;
use serde_json::Value;

use super::{Heard, Player, Recording};
use crate::process::Signal;
use crate::{During, Failure, Multifd, Outcome, Process, Scratch, Usage};

/// For what should be quick.
const SOON: Duration = Duration::from_secs(20);

/// `multifd receive`, listening.
#[derive(Debug)]
pub struct ReceiveTrial {
    process: Process,
    endpoint: Endpoint,
    scratch: Scratch,
}

/// How a command ended.
#[derive(Debug)]
pub struct Ended {
    /// Its exit code.
    pub code: i32,
    /// What it said on stderr.
    pub stderr: String,
    /// The object on stdout.
    pub json: Value,
    /// What it has cost.
    pub usage: Usage,
}

impl ReceiveTrial {
    /// Starts the command; `arguments` come after the usual ones.
    ///
    /// # Errors
    /// When it does not listen.
    pub fn start(arguments: &[&str]) -> Outcome<Self> {
        let scratch = Scratch::new()?;
        let uri = scratch.unix_uri("socket");
        let out = scratch.path("checkpoint").display().to_string();
        let usual = ["receive", &uri, "--out", &out, "--json"];
        let process = Multifd::spawn("receive", usual.iter().chain(arguments))?;
        process
            .stderr()
            .wait_for("listening on ", 0, SOON)
            .map_err(|failure| process.explain_end(failure))?;
        let endpoint = uri.parse().during(uri)?;
        Ok(Self { process, endpoint, scratch })
    }

    /// Plays `recording` to it while `meanwhile` does something else, and waits for its end.
    ///
    /// # Errors
    /// When it does not end.
    pub fn play(
        &mut self,
        recording: &Recording,
        meanwhile: impl FnOnce(&Process) -> Outcome,
    ) -> Outcome<(Ended, Heard)> {
        let (done, over) = channel();
        let endpoint = &self.endpoint;
        thread::scope(|scope| {
            let player = scope.spawn(move || Player::new(endpoint).play(recording, &over));
            let ended = meanwhile(&self.process).and_then(|()| ended(&mut self.process));
            drop(done);
            let heard = player.join().map_err(|_| Failure::new("the player panicked"))?;
            Ok((ended?, heard))
        })
    }

    /// Where the checkpoint is to be.
    pub fn checkpoint(&self) -> PathBuf {
        self.scratch.path("checkpoint")
    }

    /// What is left in the folder, hidden files included.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn left(&self) -> Outcome<Vec<String>> {
        names(self.scratch.dir())
    }
}

/// Waits for the end of a command that was started with `--json`.
///
/// # Errors
/// When it does not end, was killed, or left no JSON.
pub fn ended(process: &mut Process) -> Outcome<Ended> {
    let (status, usage) = process.wait_end(SOON)?;
    let code = status.code().ok_or_else(|| process.explain(status))?;
    process.stderr().settle(SOON);
    process.stdout()?.settle(SOON);
    let (stdout, stderr) = (process.stdout()?.text(), process.stderr().text());
    let json =
        serde_json::from_str(&stdout).map_err(|error| process.explain_end(format!("{error}: {stdout:?}")))?;
    Ok(Ended { code, stderr, json, usage })
}

/// Cancels a command as Ctrl-C does.
///
/// # Errors
/// When it has ended already.
pub fn interrupt(process: &Process) -> Outcome {
    process.signal(Signal::INT)
}

/// Names in a folder.
///
/// # Errors
/// When it cannot be read.
pub fn names(folder: &Path) -> Outcome<Vec<String>> {
    let entries = std::fs::read_dir(folder).during(folder.display())?;
    entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
}
