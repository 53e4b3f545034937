//! Chromium without a window, driven over its DevTools protocol: one JSON object and a zero byte a
//! message.

use std::{
    collections::VecDeque,
    io::{ErrorKind, Read as _, Write as _},
    os::{fd::OwnedFd, unix::net::UnixStream},
    path::Path,
    process::{Command, Stdio},
    sync::OnceLock,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use crate::{Failure, Outcome, Process, Scratch};

/// Debian's name of it.
const PROGRAM: &str = "chromium";

/// How long the browser may take for one thing: it takes a second to start on an idle machine.
const ANSWER: Duration = Duration::from_secs(60);

/// Nothing of a user's, nothing that goes out by itself. Tests run as root in containers, where
/// Chromium's own sandbox does not start; it only opens pages that the tests have made.
const FLAGS: [&str; 14] = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-extensions",
    "--disable-sync",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
    "about:blank",
];

/// A screen.
#[derive(Clone, Copy, Debug)]
pub struct Screen {
    /// Pixels of the style sheet.
    pub width: u32,
    /// The same.
    pub height: u32,
    /// With a viewport as phones have it.
    pub phone: bool,
    /// The user wants dark pages.
    pub dark: bool,
}

/// A browser with one page.
#[derive(Debug)]
pub struct Browser {
    process: Process,
    pipe: UnixStream,
    /// What was read and is not yet a whole message.
    partial: Vec<u8>,
    /// What the browser said unasked, oldest first.
    events: VecDeque<Value>,
    session: String,
    last_id: u64,
    /// Its user's folder; empty at its start.
    _profile: Scratch,
}

impl Browser {
    /// Starts one.
    ///
    /// # Errors
    /// When it does not start; the failure quotes its stderr.
    pub fn spawn() -> Outcome<Self> {
        let profile = Scratch::new()?;
        let (pipe, theirs) = UnixStream::pair()?;
        // It wants its commands on descriptor 3, and answers on 4.
        let mut command = Command::new("sh");
        command.args(["-c", "exec \"$@\" 3<&0 4>&1 </dev/null >/dev/null", "sh", PROGRAM]).args(FLAGS);
        command.arg(format!("--user-data-dir={}", profile.dir().display()));
        let (input, output) = (OwnedFd::from(theirs.try_clone()?), OwnedFd::from(theirs));
        let process = Process::spawn(PROGRAM, command.stdin(Stdio::from(input)).stdout(Stdio::from(output)))?;
        drop(command);
        let (partial, events, session) = (Vec::new(), VecDeque::new(), String::new());
        let mut browser = Self { process, pipe, partial, events, session, last_id: 0, _profile: profile };
        browser.attach().map_err(|failure| browser.process.explain_end(failure))?;
        Ok(browser)
    }

    /// Opens the page of a file on this screen and waits until it is there.
    ///
    /// # Errors
    /// When it is not in time.
    pub fn open(&mut self, page: &Path, screen: Screen) -> Outcome {
        let Screen { width, height, phone, dark } = screen;
        let metrics = json!({ "width": width, "height": height, "deviceScaleFactor": 1, "mobile": phone });
        self.execute("Emulation.setDeviceMetricsOverride", metrics)?;
        let scheme = json!({ "name": "prefers-color-scheme", "value": if dark { "dark" } else { "light" } });
        self.execute("Emulation.setEmulatedMedia", json!({ "features": [scheme] }))?;
        let address = format!("file://{}", page.canonicalize()?.display());
        self.events.clear();
        let opened = self.execute("Page.navigate", json!({ "url": address }))?;
        if let Some(error) = opened.get("errorText") {
            return Err(Failure::new(format!("{address}: {error}")));
        }
        let deadline = Instant::now() + ANSWER;
        while !self.events.iter().any(|event| method(event) == "Page.loadEventFired") {
            let event = self.message(deadline)?;
            self.events.push_back(event);
        }
        Ok(())
    }

    /// What this expression is in the page; of a promise, what it comes to.
    ///
    /// # Errors
    /// When it throws.
    pub fn evaluate(&mut self, expression: &str) -> Outcome<Value> {
        let wanted = json!({ "expression": expression, "returnByValue": true, "awaitPromise": true });
        let mut answer = self.execute("Runtime.evaluate", wanted)?;
        if let Some(thrown) = answer.get("exceptionDetails") {
            return Err(Failure::new(format!("thrown in the page: {thrown}")));
        }
        Ok(answer.pointer_mut("/result/value").map(Value::take).unwrap_or_default())
    }

    /// What went wrong in the page since it was opened: messages of its console, exceptions, and
    /// what the browser itself said.
    pub fn complaints(&self) -> Vec<String> {
        let complains = |event: &&Value| {
            ["Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"].contains(&method(event))
        };
        self.events.iter().filter(complains).map(ToString::to_string).collect()
    }

    /// What was asked for since then, whether it came or not.
    pub fn requests(&self) -> Vec<&str> {
        let sent = |event: &&Value| method(event) == "Network.requestWillBeSent";
        let address = |event| Value::pointer(event, "/params/request/url").and_then(Value::as_str);
        self.events.iter().filter(sent).filter_map(address).collect()
    }

    fn attach(&mut self) -> Outcome {
        let targets = self.execute("Target.getTargets", json!({}))?;
        let all = targets.get("targetInfos").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
        let page = all.iter().find(|target| target.get("type").and_then(Value::as_str) == Some("page"));
        let target = match page.and_then(|page| page.get("targetId")) {
            Some(id) => id.clone(),
            None => self
                .execute("Target.createTarget", json!({ "url": "about:blank" }))?
                .get("targetId")
                .cloned()
                .unwrap_or_default(),
        };
        let attached =
            self.execute("Target.attachToTarget", json!({ "targetId": target, "flatten": true }))?;
        let session = attached.get("sessionId").and_then(Value::as_str);
        self.session = session.ok_or_else(|| Failure::new(format!("no session in {attached}")))?.to_owned();
        for domain in ["Page", "Runtime", "Log", "Network"] {
            self.execute(&format!("{domain}.enable"), json!({}))?;
        }
        Ok(())
    }

    fn execute(&mut self, method: &str, params: Value) -> Outcome<Value> {
        self.last_id += 1;
        let id = self.last_id;
        let mut command = json!({ "id": id, "method": method, "params": params });
        if let (false, Some(command)) = (self.session.is_empty(), command.as_object_mut()) {
            command.insert("sessionId".into(), json!(self.session));
        }
        let mut bytes = command.to_string().into_bytes();
        bytes.push(0);
        let failed = |what: &dyn std::fmt::Display| Failure::new(format!("{method}: {what}"));
        self.pipe.write_all(&bytes).map_err(|error| failed(&error))?;
        let deadline = Instant::now() + ANSWER;
        loop {
            let mut message = self.message(deadline).map_err(|error| failed(&error))?;
            if message.get("id").and_then(Value::as_u64) != Some(id) {
                self.events.push_back(message);
            } else if let Some(error) = message.get("error") {
                return Err(failed(error));
            } else {
                return Ok(message.get_mut("result").map(Value::take).unwrap_or_default());
            }
        }
    }

    fn message(&mut self, deadline: Instant) -> Outcome<Value> {
        loop {
            if let Some(end) = self.partial.iter().position(|byte| *byte == 0) {
                let message: Vec<u8> = self.partial.drain(..=end).take(end).collect();
                return Ok(serde_json::from_slice(&message)?);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Failure::new("nothing came in time"));
            }
            self.pipe.set_read_timeout(Some(left))?;
            let mut piece = [0; 65536];
            match self.pipe.read(&mut piece) {
                Ok(0) => return Err(self.process.explain_end("closed its pipe")),
                Ok(read) => self.partial.extend(piece.iter().take(read)),
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl Drop for Browser {
    /// Killed, it would leave processes behind that still write into its user's folder, which is
    /// about to be removed.
    fn drop(&mut self) {
        self.session.clear();
        if self.execute("Browser.close", json!({})).is_ok() {
            // Otherwise it is killed.
            let _ = self.process.wait(ANSWER);
        }
    }
}

/// Why there is no browser to test with, if so. Asked once.
pub fn missing() -> Option<&'static str> {
    static MISSING: OnceLock<Option<String>> = OnceLock::new();
    let look = || match Command::new(PROGRAM).arg("--version").output() {
        Ok(output) if output.status.success() => None,
        Ok(output) => Some(format!("{PROGRAM} --version: {} (tests/peers/install gets it)", output.status)),
        Err(error) => Some(format!("{PROGRAM}: {error} (tests/peers/install gets it)")),
    };
    MISSING.get_or_init(look).as_deref()
}

fn method(event: &Value) -> &str {
    event.get("method").and_then(Value::as_str).unwrap_or_default()
}
