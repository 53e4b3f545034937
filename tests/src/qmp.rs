//! A small client of QEMU's control protocol (QMP): one JSON object a line.

use std::{
    collections::VecDeque,
    io::{ErrorKind, IoSlice, Read as _, Write as _},
    mem::MaybeUninit,
    os::{fd::BorrowedFd, unix::net::UnixStream},
    time::{Duration, Instant},
};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::{Value, json};

use crate::{Failure, Outcome};

/// How long QEMU may take to answer a command. It answers in milliseconds; on a machine that is
/// busy with many QEMUs it may wait for a core.
const ANSWER: Duration = Duration::from_secs(30);

/// A control connection: commands out, answers and events in.
#[derive(Debug)]
pub struct Qmp {
    stream: UnixStream,
    /// What was read and is not yet a whole line.
    partial: Vec<u8>,
    /// Events that arrived and were not asked for yet, oldest first.
    events: VecDeque<Value>,
    closed: bool,
}

impl Qmp {
    /// Waits for QEMU's greeting on a connected socket and enters command mode.
    ///
    /// # Errors
    /// When QEMU closes the connection (its stderr says why) or does not greet within `within`.
    pub fn greet(stream: UnixStream, within: Duration) -> Outcome<Self> {
        let mut qmp = Self { stream, partial: Vec::new(), events: VecDeque::new(), closed: false };
        let greeting = qmp.message(Instant::now() + within)?;
        if greeting.get("QMP").is_none() {
            return Err(Failure::new(format!("qmp: expected the greeting, got {greeting}")));
        }
        qmp.execute("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// Runs a command and gives what it returns.
    ///
    /// # Errors
    /// QEMU's own words when it refuses, or the connection's failure.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Outcome<Value> {
        let mut line = json!({ "execute": command, "arguments": arguments }).to_string();
        line.push('\n');
        let failed = |what: &dyn std::fmt::Display| Failure::new(format!("qmp {command}: {what}"));
        self.stream.write_all(line.as_bytes()).map_err(|error| failed(&error))?;
        let deadline = Instant::now() + ANSWER;
        loop {
            let mut message = self.message(deadline).map_err(|error| failed(&error))?;
            if let Some(value) = message.get_mut("return") {
                return Ok(value.take());
            }
            if let Some(error) = message.get("error") {
                return Err(failed(&error.pointer("/desc").and_then(Value::as_str).unwrap_or_default()));
            }
            self.events.push_back(message);
        }
    }

    /// Hands QEMU a descriptor, which `fd:name` then stands for.
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub fn getfd(&mut self, name: &str, descriptor: BorrowedFd<'_>) -> Outcome {
        // QEMU keeps it until the next command that wants one. It comes with the first byte of that
        // command's line.
        send_descriptor(&self.stream, b" ", descriptor)?;
        self.execute("getfd", json!({ "fdname": name })).map(drop)
    }

    /// Waits for the first event that `accept` takes. Older ones are forgotten, newer ones kept.
    /// `what` is its name in failures.
    ///
    /// # Errors
    /// When the time is over or the connection ends without it.
    pub fn wait_event(
        &mut self,
        what: impl std::fmt::Display,
        within: Duration,
        mut accept: impl FnMut(&Value) -> bool,
    ) -> Outcome<Value> {
        let deadline = Instant::now() + within;
        loop {
            let next = self.events.pop_front().map_or_else(|| self.message(deadline), Ok);
            let event = next.map_err(|error| Failure::new(format!("waiting for {what}: {error}")))?;
            if accept(&event) {
                return Ok(event);
            }
        }
    }

    /// Waits for one more event and keeps it; or only for the time to pass: something to do between
    /// two looks at a state that has no event.
    ///
    /// # Errors
    /// When the connection ends.
    pub fn gather(&mut self, within: Duration) -> Outcome {
        match self.message(Instant::now() + within) {
            Ok(event) => self.events.push_back(event),
            Err(failure) if self.closed => return Err(failure),
            Err(_) => {}
        }
        Ok(())
    }

    /// Forgets the unsolicited events.
    pub fn forget_events(&mut self) {
        self.events.clear();
    }

    /// Whether QEMU closed the connection: it is ending.
    pub fn closed(&self) -> bool {
        self.closed
    }

    fn message(&mut self, deadline: Instant) -> Outcome<Value> {
        loop {
            if let Some(end) = self.partial.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.partial.drain(..=end).collect();
                return Ok(serde_json::from_slice(&line)?);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Failure::new("qmp: nothing came in time"));
            }
            self.stream.set_read_timeout(Some(left))?;
            let mut piece = [0; 4096];
            match self.stream.read(&mut piece) {
                Ok(0) => {
                    self.closed = true;
                    return Err(Failure::new("qmp: QEMU closed the connection"));
                }
                Ok(read) => self.partial.extend(piece.iter().take(read)),
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// Sends `bytes`, and a descriptor beside them.
///
/// # Errors
/// When the other side is gone.
pub fn send_descriptor(stream: &UnixStream, bytes: &[u8], descriptor: BorrowedFd<'_>) -> Outcome {
    let handed = [descriptor];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !control.push(SendAncillaryMessage::ScmRights(&handed)) {
        return Err(Failure::new("no room for a descriptor"));
    }
    let sent = sendmsg(stream, &[IoSlice::new(bytes)], &mut control, SendFlags::empty())?;
    if sent == bytes.len() {
        Ok(())
    } else {
        Err(Failure::new(format!("sent {sent} bytes of {}", bytes.len())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_between_command_and_answer_are_kept_in_order() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs
            .write_all(
                b"{\"QMP\": {}}\r\n{\"return\": {}}\r\n{\"event\": \"A\"}\r\n{\"event\": \"B\"}\r\n\
                  {\"return\": 7}\r\n{\"error\": {\"class\": \"GenericError\", \"desc\": \"no such thing\"}}\r\n",
            )
            .unwrap();
        let mut qmp = Qmp::greet(ours, Duration::from_secs(10)).unwrap();
        assert_eq!(qmp.execute("x", json!({})).unwrap(), json!(7));
        let refused = qmp.execute("y", json!({})).unwrap_err().to_string();
        assert_eq!(refused, "qmp y: no such thing");
        let event = qmp.wait_event("B", Duration::from_secs(10), |event| event["event"] == "B").unwrap();
        assert_eq!(event["event"], "B");
        let late = qmp.wait_event("C", Duration::from_millis(1), |_| true).unwrap_err().to_string();
        assert!(late.contains("waiting for C"), "{late}");
    }
}
