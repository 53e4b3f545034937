//! Our own destination against a recording, in this process.

use std::path::PathBuf;
use std::sync::mpsc::channel;
use std::thread;
use std::time::{Duration, Instant};

use multifd_engine::{
    Arrived, CheckpointWriter, Destination, DestinationBuilder, EarlySections, ErrorKind, Report, Result,
};
use multifd_transports::Endpoint;
use multifd_wire::ReturnMessage;

use super::command::names;
use super::{Memory, Player, Recording};
use crate::{Failure, Outcome, Scratch};

/// The timeout of destinations that should fail.
pub const TIMEOUT: Duration = Duration::from_millis(300);

/// Nothing that fails may take longer: every wait of a destination ends with its timeout, two of
/// them may come one after the other, and the machine may be busy with others.
const LIMIT: Duration = Duration::from_secs(8);

/// A place for a destination: a folder with its socket, and with its checkpoint if it makes one.
#[derive(Debug)]
pub struct Trial {
    scratch: Scratch,
    endpoint: Endpoint,
    timeout: Duration,
}

/// How a destination ended.
#[derive(Debug)]
pub struct Verdict<T = Report> {
    /// What it returned.
    pub result: Result<T>,
    /// What it told the source.
    pub replies: Vec<ReturnMessage>,
    /// How long it took.
    pub took: Duration,
}

impl Trial {
    /// A destination on a unix socket.
    ///
    /// # Errors
    /// When there is no room for its folder.
    pub fn unix() -> Outcome<Self> {
        let scratch = Scratch::new()?;
        let endpoint = Endpoint::Unix(scratch.path("socket"));
        Ok(Self { scratch, endpoint, timeout: TIMEOUT })
    }

    /// A destination on a local TCP port.
    ///
    /// # Errors
    /// When there is no room for its folder.
    pub fn tcp() -> Outcome<Self> {
        let endpoint = Endpoint::Tcp { host: "127.0.0.1".to_owned(), port: 0 };
        Ok(Self { scratch: Scratch::new()?, endpoint, timeout: TIMEOUT })
    }

    /// Gives the destination another timeout, for a peer that does no wrong on a machine that is
    /// slow.
    #[must_use]
    pub fn patient(self, timeout: Duration) -> Self {
        Self { timeout, ..self }
    }

    /// Where the checkpoint will be.
    pub fn checkpoint(&self) -> PathBuf {
        self.scratch.path("checkpoint")
    }

    /// Plays `recording` to a destination; `then` says what becomes of the guest.
    ///
    /// # Errors
    /// When the destination cannot listen, panics, or does not end.
    pub fn run<T>(
        &self,
        recording: &Recording,
        destination: DestinationBuilder,
        then: impl FnOnce(Arrived) -> Result<T>,
    ) -> Outcome<Verdict<T>> {
        let destination = destination.listen(&self.endpoint)?;
        let (endpoint, canceller) = (destination.endpoint(), destination.canceller());
        let (done, over) = channel();
        let begun = Instant::now();
        let (result, heard) = thread::scope(|scope| {
            let endpoint = &endpoint;
            let player = scope.spawn(move || {
                let heard = Player::new(endpoint).play(recording, &over);
                // A thread that waits for a destination that hangs has to be woken to say so.
                canceller.cancel();
                heard
            });
            let result = destination.receive().and_then(then);
            drop(done);
            (result, player.join())
        });
        let took = begun.elapsed();
        let heard = heard.map_err(|_| Failure::new("the player panicked"))?;
        if heard.hung {
            return Err(Failure::new(format!("the destination hung: {result:?}", result = result.err())));
        }
        match &result {
            Err(error) if error.kind() == ErrorKind::Panicked => Err(Failure::new(error.chain())),
            Err(error) if took > LIMIT => Err(Failure::new(format!("{took:?} for {}", error.chain()))),
            _ => Ok(Verdict { result, replies: heard.replies, took }),
        }
    }

    /// Plays `recording` to a destination with memory of its own, full of garbage; gives the
    /// memory, too.
    ///
    /// # Errors
    /// As [`Trial::run`].
    pub fn receive(&self, recording: &Recording, memory: &Memory) -> Outcome<(Verdict, Received)> {
        let blocks = memory.provide(0xa5)?;
        let destination = Destination::builder(blocks.clone()).timeout(self.timeout).device_packets(true);
        let mut received = Received {
            blocks,
            early: EarlySections::default(),
            tail: Vec::new(),
            described: false,
            packets: Vec::new(),
        };
        let verdict = self.run(recording, destination, |arrived| {
            received.early = arrived.early_sections().clone();
            received.tail = arrived.device_state().to_vec();
            received.described = arrived.description().is_some();
            received.packets = arrived.device_packets().to_vec();
            arrived.accept()
        })?;
        Ok((verdict, received))
    }

    /// Plays `recording` to a destination that writes a checkpoint.
    ///
    /// # Errors
    /// As [`Trial::run`]; and when a migration that failed leaves a file.
    pub fn write_checkpoint(&self, recording: &Recording) -> Outcome<Verdict> {
        self.write_checkpoint_with(recording, |builder| builder)
    }

    /// As [`Trial::write_checkpoint`], with settings.
    ///
    /// # Errors
    /// As [`Trial::write_checkpoint`].
    pub fn write_checkpoint_with(
        &self,
        recording: &Recording,
        settings: impl FnOnce(DestinationBuilder) -> DestinationBuilder,
    ) -> Outcome<Verdict> {
        let writer = CheckpointWriter::create(&self.checkpoint())?;
        let destination = settings(Destination::builder(writer.ram()).timeout(self.timeout));
        let mut writer = Some(writer);
        let verdict = self.run(recording, destination, |arrived| {
            if let Some(writer) = writer.take() {
                writer.finish(&arrived)?;
            }
            arrived.accept()
        });
        drop(writer);
        let verdict = verdict?;
        if let Err(error) = &verdict.result {
            let left = self.left()?;
            if !left.is_empty() {
                return Err(Failure::new(format!("{left:?} left after {}", error.chain())));
            }
        }
        Ok(verdict)
    }

    /// The error of a destination that must refuse `recording`; no trace of a checkpoint is left.
    ///
    /// # Errors
    /// When it does not refuse, or does not say each of `says`.
    pub fn refuses(&self, recording: &Recording, says: &[&str]) -> Outcome<multifd_engine::Error> {
        self.refuses_with(recording, says, |builder| builder)
    }

    /// As [`Trial::refuses`], with settings.
    ///
    /// # Errors
    /// As [`Trial::refuses`].
    pub fn refuses_with(
        &self,
        recording: &Recording,
        says: &[&str],
        settings: impl FnOnce(DestinationBuilder) -> DestinationBuilder,
    ) -> Outcome<multifd_engine::Error> {
        let verdict = self.write_checkpoint_with(recording, settings)?;
        let Err(error) = verdict.result else {
            return Err(Failure::new(format!("accepted, but should say {says:?}")));
        };
        let chain = error.chain();
        match says.iter().find(|part| !chain.contains(*part)) {
            Some(missing) => Err(Failure::new(format!("{chain:?} does not say {missing:?}"))),
            None => Ok(error),
        }
    }

    /// Files in the folder, the socket apart.
    fn left(&self) -> Outcome<Vec<String>> {
        Ok(names(self.scratch.dir())?.into_iter().filter(|name| name != "socket").collect())
    }
}

/// What a destination with memory of its own has at the end.
#[derive(Debug)]
pub struct Received {
    /// RAM.
    pub blocks: Vec<multifd_engine::RamBlock>,
    /// Device sections before the end of RAM.
    pub early: EarlySections,
    /// Device sections to the end of the stream.
    pub tail: Vec<u8>,
    /// There was a vmdescription.
    pub described: bool,
    /// Device state from channels.
    pub packets: Vec<multifd_engine::DevicePacket>,
}
