//! How a source connects: what may go over what, the channels, their workers.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use crossbeam_utils::CachePadded;
use multifd_transports::{Channel, DialOptions, Endpoint, Stopper, dial};

use super::builder::Source;
use super::carrier::{Carrier, Channels, File, SyncPoints};
use super::main_writer::MainWriter;
use super::migration::Migration;
use super::outgoing::{OutgoingRam, ZeroPages};
use super::page_cache::PageCache;
use super::precopy::Precopy;
use super::return_path::ReturnPathReader;
use super::shared::SourceShared;
use crate::config::{Opened, Surroundings};
use crate::convergence::Convergence;
use crate::dirty::LogSet;
use crate::error::{Error, ErrorKind, Phase, Result};
use crate::run::state::MigrationState;
use crate::run::workers::Crew;
use crate::stream::mapped_layout::CAPABILITY;

/// What connecting makes.
struct Parts {
    main: MainWriter,
    carrier: Carrier,
    shared: Arc<SourceShared>,
    return_path: Option<ReturnPathReader>,
    logs: LogSet,
}

impl Source {
    /// Starts the dirty logs, connects main and every channel, announces the RAM blocks. The destination may not be listening
    /// yet: dialling goes on for the timeout.
    ///
    /// # Errors
    /// `ApiMisuse` for RAM that may be written and that no dirty log covers. `Transport` if there is no connection, or what broke the setup. Nothing has left the guest.
    pub fn connect(mut self, endpoint: &Endpoint) -> Result<Precopy> {
        self.session.enter(MigrationState::Setup)?;
        let crew = Crew::new(self.session.stop.clone());
        let convergence = Convergence::new(self.config.auto_converge);
        match self.open(endpoint, &crew) {
            Ok(parts) => {
                let mut migration = self.migration(parts, crew);
                let result = migration.set_up(&self.guest.configuration);
                migration.caused(result)?;
                Ok(Precopy::new(migration, convergence))
            }
            Err(error) => Err(self.session.fail(error, &crew)),
        }
    }

    fn migration(&self, parts: Parts, crew: Crew) -> Migration {
        let Parts { main, carrier, shared, return_path, logs } = parts;
        Migration {
            main,
            carrier,
            shared,
            control: self.control.clone(),
            crew,
            return_path,
            early: self.guest.early.clone(),
            switchover_start: self.config.switchover_start,
            pause_before_switchover: self.config.pause_before_switchover,
            logs,
            setup: Duration::ZERO,
            rounds: 0,
        }
    }

    fn open(&mut self, endpoint: &Endpoint, crew: &Crew) -> Result<Parts> {
        self.check(endpoint, None)?;
        self.name_capabilities();
        let default_zero = ZeroPages::for_machine(&self.guest.configuration);
        let zero_pages = self.config.zero_pages.unwrap_or(default_zero);
        // The logs first: what is read from now on may change, and they note it.
        let logs =
            LogSet::start(std::mem::take(&mut self.guest.logs), &self.guest.ram, &self.guest.unwritten)?;
        let parallel = self.config.channels > 0;
        let ram = OutgoingRam::new(std::mem::take(&mut self.guest.ram), zero_pages, parallel)?;
        self.session.counters.ram_bytes.store(ram.total_bytes(), Ordering::Relaxed);
        let main = self.dial(endpoint, "main")?;
        self.session.counters.main.count_bytes_of(&main);
        // The one place that asks whether main is a file.
        let file = main.file_handle();
        let opened = Opened { file: file.is_some(), two_way: main.is_two_way() };
        self.check(endpoint, Some(opened)).map_err(|error| error.on(main.peer()))?;
        let config = &self.config;
        let shared = Arc::new(SourceShared {
            session: Arc::clone(&self.session),
            ram,
            codec: Arc::clone(&self.codec),
            uuid: self.guest.uuid,
            pacer: Arc::clone(self.control.pacer()),
            packets: CachePadded::default(),
            cache: config.xbzrle_cache.map(PageCache::new),
            peer_features: AtomicU64::new(0),
            zero_copy: config.zero_copy,
            urgent: OnceLock::new(),
        });
        // Before the others are dialled: a destination that refuses us says so here, and nothing listens there any more.
        let return_path = if self.wants_return_path(endpoint, opened) {
            Some(ReturnPathReader::start(Arc::clone(&main), Arc::clone(&shared), crew)?)
        } else {
            None
        };
        let carrier = match file {
            Some(file) if config.mapped_ram => {
                let main = Arc::clone(&main);
                Carrier::File(File::mapped(file, main, config.direct_io, config.channels, &shared, crew)?)
            }
            Some(file) => Carrier::File(File::plain(file, Arc::clone(&main))),
            None if config.channels == 0 => Carrier::Main,
            None => Carrier::Channels(self.connect_channels(endpoint, &shared, crew)?),
        };
        Ok(Parts { main: MainWriter::new(main, opened.file), carrier, shared, return_path, logs })
    }

    fn connect_channels(
        &self,
        endpoint: &Endpoint,
        shared: &Arc<SourceShared>,
        crew: &Crew,
    ) -> Result<Channels> {
        let (count, other) = (self.config.channels, &self.config.channel_endpoints);
        let channels = Channels::new(count, SyncPoints::for_machine(&self.guest.configuration), crew);
        let endpoints = other.iter().cycle().chain(std::iter::repeat(endpoint));
        for (id, endpoint) in (0..=u8::MAX).zip(endpoints).take(count) {
            let channel = self.dial(endpoint, &format!("channel {id}"))?;
            channels.start(channel, id, shared, crew)?;
        }
        Ok(channels)
    }

    fn check(&self, endpoint: &Endpoint, opened: Option<Opened>) -> Result<()> {
        let tls = self.tls.is_some();
        let around = Surroundings { codec: &*self.codec, tls, endpoint: Some(endpoint), opened };
        self.config.check(around).map_err(|problem| Error::new(ErrorKind::ApiMisuse, Phase::Connect, problem))
    }

    /// Mapped-ram belongs to the file that the guest goes to, not to the one that it may come from.
    fn name_capabilities(&mut self) {
        let capabilities = &mut self.guest.configuration.capabilities;
        capabilities.retain(|capability| capability != CAPABILITY);
        capabilities.extend(self.config.mapped_ram.then(|| CAPABILITY.to_owned()));
    }

    fn wants_return_path(&self, endpoint: &Endpoint, main: Opened) -> bool {
        // Most commands store or pass on, and answer nothing.
        let answers = main.two_way && !matches!(endpoint, Endpoint::Exec(_));
        self.config.return_path.unwrap_or(answers)
    }

    fn dial(&self, endpoint: &Endpoint, name: &str) -> Result<Arc<Channel>> {
        let stopper = Stopper::new();
        let options = DialOptions {
            deadline: self.session.timeout,
            stopper: stopper.clone(),
            socket: self.session.socket_options(&self.config.socket),
            tls: self.tls.clone(),
        };
        self.session.stop.on_trip(move || stopper.stop());
        let channel = dial(endpoint, &options)
            .map_err(|error| Error::transport(Phase::Connect, error).on(name.to_owned()))?;
        let channel = self.session.adopt(channel, Phase::Connect)?;
        self.session.close_on_stop(&channel);
        Ok(channel)
    }
}
