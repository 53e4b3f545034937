//! The return path, from the source's end.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use multifd_transports::Channel;
use multifd_wire::ReturnMessage;

use crate::error::{Error, ErrorKind, Phase, Result};
use crate::run::stop::{Monitor, StopSwitch};
use crate::run::workers::Crew;

/// Reads the return path on a thread of its own until SHUT, the destination's last message.
pub(super) struct ReturnPathReader {
    received: Monitor<Received>,
    stop: StopSwitch,
    name: String,
}

/// What has come over the return path.
#[derive(Default)]
struct Received {
    /// SHUT(0).
    arrived: bool,
    /// SHUT(0) may come: the guest is being handed over.
    may_arrive: bool,
    /// The status of another SHUT.
    refused: Option<u32>,
    /// The largest value of a PONG.
    pong: u32,
}

impl Received {
    /// Where the migration is, as far as the return path knows.
    fn phase(&self) -> Phase {
        if self.may_arrive { Phase::Commit } else { Phase::Active }
    }
}

impl ReturnPathReader {
    /// `features` is set when the destination says HELLO.
    pub(super) fn start(channel: Arc<Channel>, features: Arc<AtomicU64>, crew: &Crew) -> Result<Self> {
        let received = Monitor::new(Received::default(), crew.stop());
        let name = format!("return path ({})", channel.peer());
        let reader = Self { received: received.clone(), stop: crew.stop().clone(), name: name.clone() };
        let stop = crew.stop().clone();
        crew.spawn("mig-return", Phase::Setup, move || {
            read(&channel, &received, &features, &stop).map_err(|error| error.on(name))
        })?;
        Ok(reader)
    }

    /// Waits for the answer to PING(`value`), or to a later one with a larger value: the destination has done all that came
    /// before it.
    pub(super) fn wait_for_pong(&self, value: u32, timeout: Duration) -> Result<()> {
        self.received
            .wait(&self.stop, Some(timeout), |received| (received.pong >= value).then_some(()))
            .ok_or_else(|| {
                let detail = format!("no PONG({value:#x}) within {timeout:?}");
                Error::new(ErrorKind::Deadline, Phase::Active, detail).on(self.name.clone())
            })
    }

    /// From here on the destination may say that it has the guest.
    pub(super) fn expect_shut(&self) {
        self.received.modify_silently(|received| received.may_arrive = true);
    }

    /// The destination's refusal, if one has come.
    pub(super) fn refusal(&self) -> Option<Error> {
        let (refused, phase) = self.received.read(|received| (received.refused, received.phase()));
        refused.map(|status| refusal(phase, status).on(self.name.clone()))
    }

    /// Waits for SHUT(0). An error if something else ends the migration, or nothing does within `timeout`.
    pub(super) fn wait_for_shut(&self, timeout: Duration) -> Result<()> {
        self.received.wait(&self.stop, Some(timeout), |received| received.arrived.then_some(())).ok_or_else(
            || {
                let detail = format!(
                    "the destination did not confirm within {timeout:?}; it may run the guest or not"
                );
                Error::new(ErrorKind::Deadline, Phase::Commit, detail).on(self.name.clone())
            },
        )
    }
}

fn read(
    channel: &Channel,
    received: &Monitor<Received>,
    features: &AtomicU64,
    stop: &StopSwitch,
) -> Result<()> {
    let mut bytes = Vec::new();
    loop {
        while let Some((message, used)) =
            ReturnMessage::parse(&bytes).map_err(|invalid| match bytes.first_chunk() {
                Some(TLS_ALERT) => Error::unexpected_tls(Phase::Active, "destination"),
                _ => Error::invalid(Phase::Active, invalid),
            })?
        {
            bytes.drain(..used);
            if on_message(&message, received, features)? {
                return Ok(());
            }
        }
        let mut chunk = [0; 1024];
        match channel.recv(&mut chunk) {
            Ok(0) => {
                let detail = "the destination closed the return path without SHUT: the guest did not arrive";
                return Err(Error::new(ErrorKind::Transport, received.read(Received::phase), detail));
            }
            Ok(received) => bytes.extend_from_slice(chunk.get(..received).unwrap_or_default()),
            // A destination sends only when it has something to report.
            Err(error) if error.kind() == io::ErrorKind::TimedOut && !stop.tripped() => {}
            Err(error) => return Err(Error::io(received.read(Received::phase), "reading", error)),
        }
    }
}

/// How an alert in the clear begins: type 21, version 3.x. No message begins so.
const TLS_ALERT: &[u8; 2] = &[21, 3];

/// True for the last message, SHUT(0).
fn on_message(message: &ReturnMessage, received: &Monitor<Received>, features: &AtomicU64) -> Result<bool> {
    tracing::debug!(?message, "return path");
    match message {
        ReturnMessage::Shut(0) => {
            let arrived = received.modify_and_notify(|received| {
                received.arrived = received.may_arrive;
                received.arrived
            });
            let early =
                || Error::misbehaved(Phase::Active, "SHUT(0), success, before the guest was handed over");
            arrived.then_some(true).ok_or_else(early)
        }
        ReturnMessage::Shut(status) => {
            received.modify_and_notify(|received| received.refused = Some(*status));
            Err(refusal(received.read(Received::phase), *status))
        }
        ReturnMessage::Hello(hello) => {
            features.store(hello.features, Ordering::Relaxed);
            Ok(false)
        }
        ReturnMessage::Pong(value) => {
            received.modify_and_notify(|received| received.pong = received.pong.max(*value));
            Ok(false)
        }
        ReturnMessage::SwitchoverAck => Ok(false),
        other => Err(Error::incompatible(Phase::Active, format!("{other:?}: postcopy is not supported"))),
    }
}

fn refusal(phase: Phase, status: u32) -> Error {
    let detail = format!("the destination failed and reported status {status}");
    Error::new(ErrorKind::PeerAborted(status), phase, detail)
}
