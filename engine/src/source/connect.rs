//! How a source connects: what may go over what, the channels, their workers.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use crossbeam_utils::CachePadded;
use multifd_transports::{Channel, Endpoint, encrypt};

use super::alive::KeepAlive;
use super::builder::Source;
use super::carrier::{Carrier, Channels, File, SyncPoints};
use super::dialer::Dialer;
use super::main_writer::MainWriter;
use super::migration::Migration;
use super::outgoing::{OutgoingRam, ZeroPages};
use super::page_cache::PageCache;
use super::postcopy::{PostcopySettings, PreemptStyle, UrgentChannels};
use super::precopy::Precopy;
use super::resume::Resumption;
use super::return_path::{LastWords, ReturnPathReader};
use super::shared::SourceShared;
use crate::config::{Opened, Surroundings, own};
use crate::convergence::Convergence;
use crate::dirty::LogSet;
use crate::error::{Error, ErrorKind, Phase, Result};
use crate::io::MainFile;
use crate::run::counters::Estimate;
use crate::run::session::NoteEnd;
use crate::run::state::MigrationState;
use crate::run::workers::Crew;
use crate::stream::mapped_layout::CAPABILITY;

/// Where a source's connections come from.
enum Connections<'a> {
    /// They are dialled, main to this endpoint.
    Dialled(&'a Endpoint),
    /// The caller has made them: main, then the parallel channels.
    Own(std::vec::IntoIter<Channel>),
}

/// What connecting makes.
struct Parts {
    main: MainWriter,
    carrier: Carrier,
    shared: Arc<SourceShared>,
    return_path: Option<ReturnPathReader>,
    alive: KeepAlive,
    logs: LogSet,
}

impl Source {
    /// Starts the dirty logs, connects main and every channel, announces the RAM blocks. The
    /// destination may not be listening yet: dialling goes on for the timeout.
    ///
    /// # Errors
    /// `ApiMisuse` for RAM that may be written and that no dirty log covers. `Transport` if there
    /// is no connection, or what broke the setup. Nothing has left the guest.
    pub fn connect(self, endpoint: &Endpoint) -> Result<Precopy> {
        self.begin(Connections::Dialled(endpoint))
    }

    /// The same over connections that the caller has made: main and one for each parallel channel,
    /// in the order of their numbers. They are sockets of any family, or one pipe or file for main
    /// alone; [`Channel`] is made from any of them, close-on-exec or not. Socket options are left
    /// as they are. With TLS they are plain sockets, on each of which this end shakes hands as the
    /// client; the certificate must be for [`TlsClient::hostname`](crate::TlsClient::hostname).
    ///
    /// # Errors
    /// As [`connect`](Self::connect), and `ApiMisuse` for channel addresses, which are about
    /// dialling, or another number of channels.
    pub fn connect_over(self, main: Channel, channels: Vec<Channel>) -> Result<Precopy> {
        let all: Vec<_> = std::iter::once(main).chain(channels).collect();
        self.begin(Connections::Own(all.into_iter()))
    }

    fn begin(mut self, connections: Connections<'_>) -> Result<Precopy> {
        self.session.enter(MigrationState::Setup)?;
        if self.config.resume_for.is_some() {
            self.session = self.session.link();
        }
        let crew = Crew::new(self.session.stop.clone()).with_hook(self.hook.clone());
        let convergence = Convergence::new(self.config.auto_converge);
        let dialer = Dialer {
            session: Arc::clone(&self.session),
            socket: self.config.socket.clone(),
            tls: self.tls.clone(),
            hook: self.hook.clone(),
            endpoint: connections.endpoint().cloned(),
        };
        match self.open(connections, &dialer, &crew) {
            Ok(parts) => {
                let mut migration = self.migration(parts, dialer, crew)?;
                let busy = migration.alive.busy();
                let result = migration.set_up(&self.guest.configuration);
                migration.caused(result)?;
                drop(busy);
                Ok(Precopy::new(migration, convergence))
            }
            Err(error) => Err(self.session.fail(error, &crew)),
        }
    }

    fn migration(&self, parts: Parts, dialer: Dialer, crew: Crew) -> Result<Migration> {
        let Parts { main, carrier, shared, return_path, alive, logs } = parts;
        let resumption = Resumption::new(&self.config, &self.guest.configuration, &dialer)?;
        Ok(Migration {
            main,
            carrier,
            shared,
            control: self.control.clone(),
            crew,
            return_path,
            early: self.guest.early.clone(),
            dialer,
            postcopy: self.config.postcopy.then_some(PostcopySettings {
                preempt: self.config.postcopy_preempt,
                preempt_style: PreemptStyle::for_machine(&self.guest.configuration),
                urgent_channels: self.config.postcopy_urgent_channels,
            }),
            urgent_channels: UrgentChannels::default(),
            switchover_start: self.config.switchover_start,
            pause_before_switchover: self.config.pause_before_switchover,
            logs,
            setup: Duration::ZERO,
            rounds: 0,
            audit: None,
            wishes: self.config.wishes(&*self.codec),
            alive,
            resumption,
            _note_end: NoteEnd(Arc::clone(&self.session)),
        })
    }

    fn open(&mut self, mut connections: Connections<'_>, dialer: &Dialer, crew: &Crew) -> Result<Parts> {
        self.count_channels(&connections)?;
        let endpoint = connections.endpoint();
        self.check(endpoint, None)?;
        self.name_capabilities();
        let default_zero = ZeroPages::for_machine(&self.guest.configuration);
        let zero_pages = self.config.zero_pages.unwrap_or(default_zero);
        // The logs first: what is read from now on may change, and they note it.
        let logs =
            LogSet::start(std::mem::take(&mut self.guest.logs), &self.guest.ram, &self.guest.unwritten)?;
        let parallel = self.config.channels > 0;
        let ram =
            OutgoingRam::new(std::mem::take(&mut self.guest.ram), &self.guest.notes, zero_pages, parallel)?;
        let ram = if self.config.postcopy { ram.for_postcopy()? } else { ram };
        let ram = if self.config.resume_for.is_some() { ram.noting_claims() } else { ram };
        self.session.counters.ram_bytes.store(ram.total_bytes(), Ordering::Relaxed);
        self.session.counters.expect(Estimate { remaining_bytes: ram.total_bytes(), ..Estimate::default() });
        let last_words = LastWords::default();
        let main = dialer.adopt_main(self.next_connection(&mut connections, dialer, None)?, &last_words)?;
        self.session.counters.main.count_bytes_of(&main);
        let file = MainFile::of(&main);
        let opened = Opened { file: file.is_some(), two_way: main.is_two_way() };
        self.check(endpoint, Some(opened)).map_err(|error| error.on(main.peer()))?;
        let config = &self.config;
        let shared = Arc::new(SourceShared {
            session: Arc::clone(&self.session),
            ram: Arc::new(ram),
            codec: Arc::clone(&self.codec),
            uuid: self.guest.uuid,
            pacer: Arc::clone(self.control.pacer()),
            packets: CachePadded::default(),
            cache: config.xbzrle_cache.map(PageCache::new),
            peer_features: AtomicU64::new(0),
            auto_codec: config.auto_codec,
            decided: Mutex::default(),
            agreed: OnceLock::new(),
            id: OnceLock::new(),
            resume_key: OnceLock::new(),
            zero_copy: config.zero_copy,
            urgent: OnceLock::new(),
            neighbours: OnceLock::new(),
        });
        // Before the others are dialled: a destination that refuses us says so here, and nothing
        // listens there any more.
        let return_path = if self.wants_return_path(endpoint, opened) {
            Some(ReturnPathReader::start(Arc::clone(&main), Arc::clone(&shared), crew, &last_words)?)
        } else {
            None
        };
        let carrier = match file.clone() {
            Some(file) if config.mapped_ram => {
                Carrier::File(File::mapped(file, config.direct_io, config.channels, &shared, crew)?)
            }
            Some(file) => Carrier::File(File::plain(file)),
            None if config.channels == 0 => Carrier::Main,
            None => Carrier::Channels(self.connect_channels(&mut connections, dialer, &shared, crew)?),
        };
        let piece_of_ram = carrier.takes_empty_pieces().then(MainWriter::empty_piece_of_ram);
        let alive = KeepAlive::start(&main, return_path.is_some(), piece_of_ram, crew)?;
        Ok(Parts { main: MainWriter::new(main, file), carrier, shared, return_path, alive, logs })
    }

    fn connect_channels(
        &self,
        connections: &mut Connections<'_>,
        dialer: &Dialer,
        shared: &Arc<SourceShared>,
        crew: &Crew,
    ) -> Result<Channels> {
        let count = self.config.channels;
        let channels = Channels::new(count, SyncPoints::for_machine(&self.guest.configuration), crew);
        for id in (0..=u8::MAX).take(count) {
            let channel = self.next_connection(connections, dialer, Some(id))?;
            let channel = dialer.adopt(channel, &self.session.stop)?;
            channels.start(channel, id, shared, crew)?;
        }
        Ok(channels)
    }

    /// Connections of the caller's say how many channels there are.
    fn count_channels(&mut self, connections: &Connections<'_>) -> Result<()> {
        let Connections::Own(all) = connections else { return Ok(()) };
        let (main, channels) =
            all.as_slice().split_first().ok_or_else(|| Error::bug(Phase::Connect, "no main connection"))?;
        let configured = (self.config.channels > 0).then_some(self.config.channels);
        let counted = if !self.config.channel_endpoints.is_empty() {
            Err("channel addresses beside connections of the caller's".to_owned())
        } else {
            own::count(configured, main, channels, self.tls.is_some())
        };
        let counted = counted.map_err(|problem| Error::new(ErrorKind::ApiMisuse, Phase::Connect, problem))?;
        self.config.channels = counted.unwrap_or(0);
        Ok(())
    }

    fn check(&self, endpoint: Option<&Endpoint>, opened: Option<Opened>) -> Result<()> {
        let tls = self.tls.is_some();
        let around = Surroundings { codec: &*self.codec, tls, endpoint, opened };
        self.config.check(around).map_err(|problem| Error::new(ErrorKind::ApiMisuse, Phase::Connect, problem))
    }

    /// Mapped-ram belongs to the file that the guest goes to, not to the one that it may come from.
    fn name_capabilities(&mut self) {
        let capabilities = &mut self.guest.configuration.capabilities;
        capabilities.retain(|capability| capability != CAPABILITY);
        capabilities.extend(self.config.mapped_ram.then(|| CAPABILITY.to_owned()));
    }

    fn wants_return_path(&self, endpoint: Option<&Endpoint>, main: Opened) -> bool {
        // Most commands store or pass on, and answer nothing.
        let answers = main.two_way && !matches!(endpoint, Some(Endpoint::Exec(_)));
        self.config.return_path.unwrap_or(answers || self.config.postcopy)
    }

    /// Main, or the parallel channel `id`.
    fn next_connection(
        &self,
        connections: &mut Connections<'_>,
        dialer: &Dialer,
        id: Option<u8>,
    ) -> Result<Channel> {
        let name = id.map_or_else(|| "main".to_owned(), |id| format!("channel {id}"));
        match connections {
            Connections::Own(channels) => {
                let none = || Error::bug(Phase::Connect, format_args!("no connection for {name}"));
                let connection = channels.next().ok_or_else(none)?;
                encrypt(connection, &dialer.options(self.session.timeout, &self.session.stop))
                    .map_err(|error| Error::io(Phase::Connect, "shaking hands", error).on(&name))
            }
            Connections::Dialled(main) => {
                let own = id.and_then(|id| self.config.channel_endpoints.iter().cycle().nth(id.into()));
                dialer.dial(own.unwrap_or(main), &name, &self.session.stop)
            }
        }
    }
}

impl<'a> Connections<'a> {
    /// Where main is dialled to.
    fn endpoint(&self) -> Option<&'a Endpoint> {
        match self {
            Self::Dialled(endpoint) => Some(endpoint),
            Self::Own(_) => None,
        }
    }
}
