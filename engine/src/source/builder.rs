//! Settings of a source, and how it connects.

use std::num::NonZeroU64;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use multifd_codecs::{Codec, Uncompressed};
use multifd_transports::{Channel, DialOptions, Endpoint, Pacer, Stopper, blocking};
use multifd_wire::{Configuration, HELLO_PING};

use super::channel::SendWorker;
use super::main_stream::MainStream;
use super::outgoing::{OutgoingRam, ZeroPages};
use super::return_path::ReturnPathReader;
use super::rounds::Rounds;
use super::shared::Shared;
use super::{Migration, Precopy, SyncPoints};
use crate::error::{Error, ErrorKind, Phase, Result};
use crate::ram::RamBlock;
use crate::session::{Canceller, Counters, DEFAULT_TIMEOUT, ProgressReader, Session};
use crate::workers::Crew;

/// Most parallel channels: QEMU's limit.
const MAX_CHANNELS: usize = 255;

/// The sending end of a migration that has not been connected yet.
pub struct Source {
    settings: SourceBuilder,
    session: Arc<Session>,
}

/// Settings of a [`Source`]. Made by [`Source::builder`].
pub struct SourceBuilder {
    ram: Vec<RamBlock>,
    configuration: Configuration,
    uuid: [u8; 16],
    codec: Arc<dyn Codec>,
    channels: usize,
    max_bandwidth: Option<NonZeroU64>,
    zero_pages: Option<ZeroPages>,
    return_path: bool,
    switchover_start: bool,
    timeout: Duration,
}

impl Source {
    /// A source for `ram`, in the order in which the blocks are announced, of a machine as `configuration` names it.
    pub fn builder(ram: Vec<RamBlock>, configuration: Configuration) -> SourceBuilder {
        SourceBuilder {
            ram,
            configuration,
            uuid: [0; 16],
            codec: Arc::new(Uncompressed),
            channels: 0,
            max_bandwidth: None,
            zero_pages: None,
            return_path: true,
            switchover_start: false,
            timeout: DEFAULT_TIMEOUT,
        }
    }

    /// Ends the migration from another thread, the dialling included.
    pub fn canceller(&self) -> Canceller {
        Canceller::new(&self.session)
    }

    /// Tells how far it has come, from any thread.
    pub fn progress(&self) -> ProgressReader {
        ProgressReader::new(&self.session)
    }

    /// Connects main and every channel, announces the RAM blocks. The destination may not be listening yet: dialling goes on
    /// for the timeout.
    ///
    /// # Errors
    /// `Transport` if there is no connection, or what broke the setup. Nothing has left the guest.
    pub fn connect(self, endpoint: &Endpoint) -> Result<Precopy> {
        let crew = Crew::new(self.session.stop.clone());
        let result = self.open(endpoint, &crew);
        match result {
            Ok((main, shared, return_path)) => {
                let settings = self.settings;
                let sync_points = match settings.configuration.machine_version() {
                    Some(version) if version <= (8, 0) => SyncPoints::AtSectionEnd,
                    _ => SyncPoints::AtFlush,
                };
                let mut migration = Migration {
                    main,
                    shared,
                    crew,
                    return_path,
                    sync_points,
                    switchover_start: settings.switchover_start,
                    setup: Duration::ZERO,
                };
                let result = migration.set_up(&settings.configuration, HELLO_PING);
                migration.caused(result)?;
                Ok(Precopy { session: migration })
            }
            Err(error) => {
                crew.stop().trip(error);
                crew.join();
                Err(crew.stop().cause_or(Error::new(ErrorKind::Cancelled, Phase::Connect, "stopped")))
            }
        }
    }

    fn open(
        &self,
        endpoint: &Endpoint,
        crew: &Crew,
    ) -> Result<(MainStream, Arc<Shared>, Option<ReturnPathReader>)> {
        let settings = &self.settings;
        let default_zero = ZeroPages::for_machine(&settings.configuration);
        let zero_pages = settings.zero_pages.unwrap_or(default_zero);
        let ram = OutgoingRam::new(settings.ram.clone(), zero_pages, settings.channels > 0)?;
        self.session.counters.ram_bytes.store(ram.total_bytes(), Ordering::Relaxed);
        let pacer = Arc::new(Pacer::new(settings.max_bandwidth));
        let paced = Arc::clone(&pacer);
        self.session.stop.on_trip(move || paced.stop());
        let shared = Arc::new(Shared {
            session: Arc::clone(&self.session),
            ram,
            codec: Arc::clone(&settings.codec),
            uuid: settings.uuid,
            rounds: Rounds::new(&self.session.stop, settings.channels),
            pacer,
            packets: AtomicU64::new(0),
        });
        let main = self.dial(endpoint, "main")?;
        for id in 0..settings.channels {
            let channel = self.dial(endpoint, &format!("channel {id}"))?;
            Counters::add(&self.session.counters.channels, 1);
            SendWorker::start(channel, u8::try_from(id).unwrap_or(u8::MAX), &shared, crew)?;
        }
        let return_path = match settings.return_path {
            true => Some(ReturnPathReader::start(Arc::clone(&main), crew)?),
            false => None,
        };
        Ok((MainStream::new(main), shared, return_path))
    }

    fn dial(&self, endpoint: &Endpoint, name: &str) -> Result<Arc<Channel>> {
        let stopper = Stopper::new();
        let options = DialOptions {
            deadline: self.session.timeout,
            stopper: stopper.clone(),
            ..DialOptions::default()
        };
        self.session.stop.on_trip(move || stopper.stop());
        let channel = blocking::dial(endpoint, &options)
            .map_err(|error| Error::transport(Phase::Connect, error).on(name.to_owned()))?;
        let channel = self.session.adopt(channel, Phase::Connect)?;
        self.session.close_on_stop(&channel);
        Ok(channel)
    }
}

impl SourceBuilder {
    /// The guest's uuid, which a QEMU destination compares with its own. Default: all zero, a guest without one.
    #[must_use]
    pub fn uuid(mut self, uuid: [u8; 16]) -> Self {
        self.uuid = uuid;
        self
    }

    /// How the parallel channels compress. Default: not at all. The destination must be set to the same.
    #[must_use]
    pub fn codec(mut self, codec: Arc<dyn Codec>) -> Self {
        self.codec = codec;
        self
    }

    /// Parallel channels, each a socket and a thread: 1..=255, and about 2 MiB of buffers each with a codec. 0, the default:
    /// everything goes on the main channel. A QEMU destination must be set to the same number.
    #[must_use]
    pub fn channels(mut self, channels: usize) -> Self {
        self.channels = channels;
        self
    }

    /// Bytes per second over all channels. Default: no limit.
    #[must_use]
    pub fn max_bandwidth(mut self, bytes_per_second: Option<NonZeroU64>) -> Self {
        self.max_bandwidth = bytes_per_second;
        self
    }

    /// How zero pages go. Default: as QEMU does for the machine type, [`ZeroPages::for_machine`].
    #[must_use]
    pub fn zero_pages(mut self, zero_pages: ZeroPages) -> Self {
        self.zero_pages = Some(zero_pages);
        self
    }

    /// Has the destination confirm that the guest has arrived. Default: yes. Without it, nobody knows whether it did.
    #[must_use]
    pub fn return_path(mut self, return_path: bool) -> Self {
        self.return_path = return_path;
        self
    }

    /// Announces the switch-over to the destination's devices: QEMU 10.0 with machine types from 10.0 on. Default: no.
    #[must_use]
    pub fn switchover_start(mut self, switchover_start: bool) -> Self {
        self.switchover_start = switchover_start;
        self
    }

    /// How long to wait for the destination: to listen, to take the next byte, to confirm. Default: 60 s.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Checks the settings. Nothing is connected yet.
    ///
    /// # Errors
    /// `ApiMisuse` that names the setting.
    pub fn build(self) -> Result<Source> {
        let misuse = |detail: String| Err(Error::new(ErrorKind::ApiMisuse, Phase::Setup, detail));
        if self.channels > MAX_CHANNELS {
            return misuse(format!("{} channels, expected 0..={MAX_CHANNELS}", self.channels));
        }
        if self.channels == 0 && self.codec.id() != multifd_codecs::CodecId::NONE {
            return misuse(format!(
                "codec {} without parallel channels, which alone are compressed",
                self.codec.name()
            ));
        }
        if self.timeout.is_zero() {
            return misuse("timeout is 0, expected more".to_owned());
        }
        let session = Session::new(self.timeout);
        Ok(Source { settings: self, session })
    }
}
