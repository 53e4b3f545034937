//! How a source connects: what may go over what, the channels, their workers.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use multifd_transports::{Channel, DialOptions, Endpoint, Stopper, dial};

use super::builder::{Source, SourceBuilder};
use super::channel::SendWorker;
use super::main_stream::MainStream;
use super::mapped::{self, MappedFile};
use super::migration::{Migration, SyncPoints};
use super::outgoing::{OutgoingRam, ZeroPages};
use super::page_cache::PageCache;
use super::precopy::Precopy;
use super::return_path::ReturnPathReader;
use super::rounds::Rounds;
use super::shared::Shared;
use super::zero_copy::ZeroCopySend;
use crate::convergence::Convergence;
use crate::dirty::LogSet;
use crate::error::{Error, ErrorKind, Phase, Result};
use crate::mapped::CAPABILITY;
use crate::session::Counters;
use crate::state::MigrationState;
use crate::workers::Crew;

/// What connecting makes.
struct Parts {
    main: Arc<Channel>,
    shared: Arc<Shared>,
    return_path: Option<ReturnPathReader>,
    logs: LogSet,
}

impl Source {
    /// Starts the dirty logs, connects main and every channel, announces the RAM blocks. The destination may not be listening
    /// yet: dialling goes on for the timeout.
    ///
    /// # Errors
    /// `Transport` if there is no connection, or what broke the setup. Nothing has left the guest.
    pub fn connect(mut self, endpoint: &Endpoint) -> Result<Precopy> {
        self.session.enter(MigrationState::Setup)?;
        let crew = Crew::new(self.session.stop.clone());
        let convergence = Convergence::new(self.settings.auto_converge);
        match self.open(endpoint, &crew) {
            Ok(parts) => {
                let mut migration = self.migration(parts, crew);
                let result = migration.set_up(&self.settings.configuration);
                migration.caused(result)?;
                Ok(Precopy::new(migration, convergence))
            }
            Err(error) => {
                crew.stop().trip(error);
                self.session.note_end_of_failed();
                crew.join();
                Err(crew.stop().cause_or(Error::new(ErrorKind::Cancelled, Phase::Connect, "stopped")))
            }
        }
    }

    fn migration(&self, parts: Parts, crew: Crew) -> Migration {
        let Parts { main, shared, return_path, logs } = parts;
        Migration {
            main: MainStream::new(main),
            shared,
            control: self.control.clone(),
            crew,
            return_path,
            sync_points: SyncPoints::for_machine(&self.settings.configuration),
            switchover_start: self.settings.switchover_start,
            pause_before_switchover: self.settings.pause_before_switchover,
            logs,
            setup: Duration::ZERO,
            rounds: 0,
        }
    }

    fn open(&mut self, endpoint: &Endpoint, crew: &Crew) -> Result<Parts> {
        self.settings.check_endpoints(endpoint)?;
        let settings = &mut self.settings;
        settings.name_capabilities();
        let default_zero = ZeroPages::for_machine(&settings.configuration);
        let zero_pages = settings.zero_pages.unwrap_or(default_zero);
        // The logs first: what is read from now on may change, and they note it.
        let logs = LogSet::start(std::mem::take(&mut settings.logs), &settings.ram)?;
        let ram = OutgoingRam::new(std::mem::take(&mut settings.ram), zero_pages, settings.channels > 0)?;
        self.session.counters.ram_bytes.store(ram.total_bytes(), Ordering::Relaxed);
        let main = self.dial(endpoint, "main")?;
        let settings = &self.settings;
        settings.check_carrier(main.file().is_some())?;
        let mapped =
            settings.mapped_ram.then(|| MappedFile::new(&main, &ram, settings.direct_io)).transpose()?;
        let shared = Arc::new(Shared {
            session: Arc::clone(&self.session),
            ram,
            codec: Arc::clone(&settings.codec),
            uuid: settings.uuid,
            rounds: Rounds::new(&self.session.stop, settings.channels),
            mapped,
            pacer: Arc::clone(self.control.pacer()),
            packets: AtomicU64::new(0),
            cache: settings.xbzrle_cache.map(PageCache::new),
            peer_features: Arc::default(),
            zero_copy: settings.zero_copy,
        });
        // Before the others are dialled: a destination that refuses us says so here, and then nobody listens there any more.
        let return_path = match settings.wants_return_path(endpoint, &main)? {
            true => {
                Some(ReturnPathReader::start(Arc::clone(&main), Arc::clone(&shared.peer_features), crew)?)
            }
            false => None,
        };
        self.start_workers(endpoint, &shared, crew)?;
        Ok(Parts { main, shared, return_path, logs })
    }

    /// One for each parallel channel, or for each share of the pages in a file.
    fn start_workers(&self, endpoint: &Endpoint, shared: &Arc<Shared>, crew: &Crew) -> Result<()> {
        let settings = &self.settings;
        let endpoints = settings.channel_endpoints.iter().cycle().chain(std::iter::repeat(endpoint));
        for (id, endpoint) in endpoints.take(settings.channels).enumerate() {
            if settings.mapped_ram {
                MappedFile::start_worker(id, shared, crew)?;
            } else {
                let channel = self.dial(endpoint, &format!("channel {id}"))?;
                SendWorker::start(channel, u8::try_from(id).unwrap_or(u8::MAX), shared, crew)?;
            }
            Counters::add(&self.session.counters.channels, 1);
        }
        Ok(())
    }

    fn dial(&self, endpoint: &Endpoint, name: &str) -> Result<Arc<Channel>> {
        let stopper = Stopper::new();
        let options = DialOptions {
            deadline: self.session.timeout,
            stopper: stopper.clone(),
            socket: self.session.socket_options(&self.settings.socket),
            tls: self.settings.tls.clone(),
        };
        self.session.stop.on_trip(move || stopper.stop());
        let channel = dial(endpoint, &options)
            .map_err(|error| Error::transport(Phase::Connect, error).on(name.to_owned()))?;
        let channel = self.session.adopt(channel, Phase::Connect)?;
        self.session.close_on_stop(&channel);
        Ok(channel)
    }
}

impl SourceBuilder {
    fn check_carrier(&self, file: bool) -> Result<()> {
        mapped::check_settings(self.mapped_ram, file, self.channels)
    }

    /// Mapped-ram belongs to the file that the guest goes to, not to the one that it may come from.
    fn name_capabilities(&mut self) {
        let capabilities = &mut self.configuration.capabilities;
        capabilities.retain(|capability| capability != CAPABILITY);
        capabilities.extend(self.mapped_ram.then(|| CAPABILITY.to_owned()));
    }

    /// What can be said before there is a connection.
    fn check_endpoints(&self, main: &Endpoint) -> Result<()> {
        match main {
            Endpoint::File { .. } => self.check_carrier(true)?,
            // It shows when it is open.
            Endpoint::Fd(_) | Endpoint::FdFrom(_) => {}
            _ => self.check_carrier(false)?,
        }
        let misuse = |detail| Err(Error::new(ErrorKind::ApiMisuse, Phase::Connect, detail));
        if self.return_path == Some(true) && matches!(main, Endpoint::File { .. }) {
            return misuse(NOTHING_COMES_BACK.to_owned());
        }
        let all = || std::iter::once(main).chain(&self.channel_endpoints);
        if self.channels > 0
            && !self.mapped_ram
            && let Some(single) = all().find(|endpoint| !endpoint.takes_several())
        {
            return misuse(format!(
                "{} parallel channels over {single}, which is one channel; they go over tcp, unix or vsock",
                self.channels
            ));
        }
        if self.tls.is_some()
            && let Some(other) = all().find(|endpoint| !endpoint.takes_several())
        {
            return misuse(format!("TLS over {other}, expected tcp, unix or vsock"));
        }
        let plain_tcp = |endpoint: &Endpoint| self.tls.is_none() && matches!(endpoint, Endpoint::Tcp { .. });
        match all().find(|endpoint| !plain_tcp(endpoint)).filter(|_| self.zero_copy != ZeroCopySend::Off) {
            Some(other) => misuse(format!("zero-copy send over {other}, expected plain TCP")),
            None => Ok(()),
        }
    }

    fn wants_return_path(&self, endpoint: &Endpoint, main: &Channel) -> Result<bool> {
        if self.return_path == Some(true) && !main.is_two_way() {
            return Err(Error::new(ErrorKind::ApiMisuse, Phase::Connect, NOTHING_COMES_BACK).on(main.peer()));
        }
        // Most commands store or pass on, and say nothing.
        let answers = main.is_two_way() && !matches!(endpoint, Endpoint::Exec(_));
        Ok(self.return_path.unwrap_or(answers))
    }
}

const NOTHING_COMES_BACK: &str =
    "a return path was asked for, but nothing comes back over a pipe or from a file";
