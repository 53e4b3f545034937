//! A pre-copy whose link broke goes on over another. Spec: docs/wire.md §27.11.
//!
//! ```text
//!  a call fails ─ the link's threads end ─┬─ dial ─ who are you ─ what has come ─ channels ─ stream ─> the call goes on
//!                                         └──<── another break, until the time is over ──┘
//! ```

mod greeting;

use std::sync::Arc;
use std::time::{Duration, Instant};

use multifd_transports::{Channel, Endpoint};
use multifd_wire::{Command, Configuration};

use self::greeting::{Standing, greet};
use super::alive::KeepAlive;
use super::carrier::{Carrier, Channels, SyncPoints};
use super::dialer::Dialer;
use super::main_writer::MainWriter;
use super::migration::{Migration, ping_of_round};
use super::page_cache::PageCache;
use super::postcopy::UrgentChannels;
use super::return_path::{LastWords, ReturnPathReader};
use super::shared::SourceShared;
use crate::config::SourceConfig;
use crate::dirty::LogSet;
use crate::error::{Error, ErrorKind, Phase, Result};
use crate::guest::PAGE;
use crate::run::counters::Counters;
use crate::run::secret::{KeyPair, Secret};
use crate::run::session::{HandOver, Session};
use crate::run::stop::Monitor;
use crate::run::workers::Crew;
use crate::stream::dialect::FEATURE_RESUMPTION;

/// Time between two tries where a destination is dialled and does not go on.
const TRY_AGAIN: Duration = Duration::from_millis(200);

/// How long a channel with an address of its own is dialled, when main is there already: a network
/// that is gone has no channel, and the others go on.
const OWN_ADDRESS: Duration = Duration::from_secs(2);

/// What it takes to replace a link.
pub(super) struct Resumption {
    /// How long there may be no link.
    within: Duration,
    /// A destination that knows nothing gets everything.
    anew: bool,
    endpoint: Endpoint,
    channel_endpoints: Vec<Endpoint>,
    channels: usize,
    sync_points: SyncPoints,
    cache: Option<usize>,
    configuration: Configuration,
    keys: KeyPair,
    /// Known from the first break on.
    secret: Option<Secret>,
    /// Pages have arrived since the outage before.
    progressed: bool,
    /// When the last outage began.
    since: Instant,
}

/// What a new link is made of.
struct Parts {
    main: MainWriter,
    carrier: Carrier,
    shared: Arc<SourceShared>,
    return_path: ReturnPathReader,
    alive: KeepAlive,
}

impl Resumption {
    /// `None`: a link that breaks ends the migration.
    pub(super) fn new(
        config: &SourceConfig,
        configuration: &Configuration,
        dialer: &Dialer,
    ) -> Result<Option<Self>> {
        let Some(within) = config.resume_for else { return Ok(None) };
        let none = || Error::bug(Phase::Connect, "a new link for connections that were not dialled");
        Ok(Some(Self {
            within,
            anew: config.resume_anew,
            endpoint: dialer.endpoint.clone().ok_or_else(none)?,
            channel_endpoints: config.channel_endpoints.clone(),
            channels: config.channels,
            sync_points: SyncPoints::for_machine(configuration),
            cache: config.xbzrle_cache,
            configuration: configuration.clone(),
            keys: KeyPair::new()?,
            secret: None,
            progressed: true,
            since: Instant::now(),
        }))
    }

    /// What is left of the time without a link. An outage that moved nothing goes on.
    fn begin_outage(&mut self) {
        if std::mem::take(&mut self.progressed) {
            self.since = Instant::now();
        }
    }

    fn left(&self) -> Option<Duration> {
        self.within.checked_sub(self.since.elapsed()).filter(|left| !left.is_zero())
    }

    /// Connects the parallel channels: those with an address of their own may be fewer than before.
    fn connect_channels(
        &self,
        dialer: &Dialer,
        within: Duration,
        shared: &Arc<SourceShared>,
        crew: &Crew,
    ) -> Result<Channels> {
        let (stop, mut connected) = (crew.stop(), Vec::new());
        for id in 0..self.channels {
            let name = format!("channel {id}");
            match self.channel_endpoints.iter().cycle().nth(id) {
                None => connected.push(dialer.dial_within(&self.endpoint, &name, stop, within)?),
                Some(own) => match dialer.dial_within(own, &name, stop, within.min(OWN_ADDRESS)) {
                    Ok(channel) => connected.push(channel),
                    Err(error) if id + 1 == self.channels && connected.is_empty() => return Err(error),
                    Err(error) => tracing::warn!("{}; the others go on without it", error.chain()),
                },
            }
        }
        let channels = Channels::new(connected.len(), self.sync_points, crew);
        for (id, channel) in (0..=u8::MAX).zip(connected) {
            channels.start(dialer.adopt(channel, stop)?, id, shared, crew)?;
        }
        Ok(channels)
    }
}

impl Migration {
    /// Offers a destination that waits for a new link when this one breaks to go on with it.
    pub(super) fn offer_resumption(&mut self) -> Result<()> {
        let Some(resumption) = self.resumption.as_ref().filter(|resumption| resumption.secret.is_none())
        else {
            return Ok(());
        };
        if !self.shared.peer_can(FEATURE_RESUMPTION) {
            tracing::warn!(
                "the destination does not wait for a new link: one that breaks ends the migration"
            );
            return Ok(());
        }
        self.main.command(Command::Resumable(resumption.keys.public()))?;
        // Before its half of the secret has come, no link could be replaced, and a page that goes
        // before would not be known there to be one that is kept.
        let return_path = self.return_path.as_ref().ok_or_else(none)?;
        let (shared, timeout) = (&self.shared, self.shared.session.timeout);
        if return_path.wait_until(timeout, || shared.resume_key.get().is_some()) {
            return Ok(());
        }
        let detail = format!("no answer to the offer to go on over another link within {timeout:?}");
        Err(Error::new(ErrorKind::Deadline, Phase::Active, detail))
    }

    /// All pages of the last round have arrived.
    pub(super) fn note_arrival(&mut self) {
        if let Some(resumption) = &mut self.resumption {
            self.shared.ram.note_arrival();
            resumption.progressed = true;
        }
    }

    /// `None`: what failed did so because its link broke, and another one is there: it is to be
    /// done again.
    ///
    /// # Errors
    /// The first cause, or the last if no new link came: the migration has ended.
    pub(super) fn or_resumed<T>(&mut self, result: Result<T>) -> Result<Option<T>> {
        match result {
            Ok(value) => Ok(Some(value)),
            Err(error) => self.resume(error).map(|()| None),
        }
    }

    /// Also where the last bytes of the stream have left and no answer came: a destination that
    /// still waits for a new link has not got them, and does not run the guest. Without its word
    /// the error stays one behind the hand-over.
    fn resume(&mut self, error: Error) -> Result<()> {
        if !self.knows_secret()? {
            return Err(self.fail(error));
        }
        let handed_over = !error.source_may_resume();
        let session = Arc::clone(&self.shared.session);
        session.end_link(error, &self.crew);
        let refused = self.return_path.as_ref().is_some_and(|return_path| return_path.refusal().is_some());
        let whole = Arc::clone(session.whole());
        let broke = session.stop.look_at_cause(Error::is_of_the_link) == Some(true);
        if !broke || refused || whole.stop.tripped() {
            return Err(self.fail_as(Error::stopped(Phase::Active), handed_over));
        }
        let cause = session.stop.cause_or(Error::stopped(Phase::Active));
        session.stop.release();
        match self.replace_link(&whole, cause, handed_over) {
            Ok(()) => {
                whole.set_hand_over(HandOver::Before);
                Ok(())
            }
            Err(error) => Err(self.give_up(&whole, error, handed_over)),
        }
    }

    /// Whether the destination would know this end again.
    fn knows_secret(&mut self) -> Result<bool> {
        let Some(resumption) = &mut self.resumption else { return Ok(false) };
        if let (None, Some(key), Some(id)) =
            (&resumption.secret, self.shared.resume_key.get(), self.shared.id.get())
        {
            resumption.secret = Some(resumption.keys.secret(*key, *id)?);
        }
        Ok(resumption.secret.is_some())
    }

    /// Dials until there is a new link, or the time is over.
    fn replace_link(&mut self, whole: &Arc<Session>, cause: Error, handed_over: bool) -> Result<()> {
        let resumption = self.resumption.as_mut().ok_or_else(none)?;
        resumption.begin_outage();
        let within = resumption.within;
        tracing::warn!("the link broke: {}; dialling for {within:?}", cause.chain());
        let (first, mut last) = (cause.chain(), None::<Error>);
        let pause = Monitor::new((), &whole.stop);
        loop {
            let Some(left) = self.resumption.as_ref().ok_or_else(none)?.left() else {
                let detail = format!("no new link within {within:?} after the last one broke: {first}");
                let error = Error::new(ErrorKind::Transport, Phase::Active, detail);
                return Err(match last {
                    Some(last) => error.because(last),
                    None => error,
                });
            };
            match self.try_link(whole, left, handed_over) {
                Err(error) if error.is_of_the_link() && !whole.stop.tripped() => {
                    tracing::debug!("no new link yet: {}", error.chain());
                    last = Some(error);
                }
                tried => return tried,
            }
            // A destination that takes the connection and ends it again is not to be flooded.
            pause.wait(&whole.stop, Some(left.min(TRY_AGAIN)), |()| None::<()>);
        }
    }

    fn try_link(&mut self, whole: &Arc<Session>, within: Duration, handed_over: bool) -> Result<()> {
        let session = whole.link();
        let crew = Crew::new(session.stop.clone()).with_hook(self.dialer.hook.clone());
        let opened = self.open_link(&session, within, handed_over, &crew).and_then(|parts| {
            let Parts { main, carrier, shared, return_path, alive } = parts;
            (self.main, self.carrier, self.shared, self.alive) = (main, carrier, shared, alive);
            self.return_path = Some(return_path);
            self.urgent_channels = UrgentChannels::default();
            let configuration = self.resumption.as_ref().ok_or_else(none)?.configuration.clone();
            self.begin_stream(&configuration)
        });
        if let Err(error) = opened {
            let phase = error.phase();
            session.end_link(error, &crew);
            return Err(session.stop.cause_or(Error::stopped(phase)));
        }
        self.crew = crew;
        self.main.enter(Phase::Active);
        Counters::add(&session.counters.resumptions, 1);
        tracing::info!("the migration goes on over a new link");
        Ok(())
    }

    fn open_link(
        &mut self,
        session: &Arc<Session>,
        within: Duration,
        handed_over: bool,
        crew: &Crew,
    ) -> Result<Parts> {
        let mut main = self.dial_main(session, within)?;
        // Without a secret it has begun anew before, and got no further.
        if let Some(secret) = &self.resumption.as_ref().ok_or_else(none)?.secret {
            if let Some(standing) = greet(&main, secret, &self.shared.ram)? {
                self.take_back(&standing)?;
            } else {
                self.begin_anew(handed_over)?;
                main.closer().close();
                main = self.dial_main(session, within)?;
            }
        }
        let shared = self.new_shared(session)?;
        let resumption = self.resumption.as_ref().ok_or_else(none)?;
        let words = LastWords::default();
        let return_path = ReturnPathReader::start(Arc::clone(&main), Arc::clone(&shared), crew, &words)?;
        let carrier = match resumption.channels {
            0 => Carrier::Main,
            _ => Carrier::Channels(resumption.connect_channels(&self.dialer, within, &shared, crew)?),
        };
        let alive = KeepAlive::start(&main, true, None, crew)?;
        Ok(Parts { main: MainWriter::new(main, None), carrier, shared, return_path, alive })
    }

    fn dial_main(&self, session: &Session, within: Duration) -> Result<Arc<Channel>> {
        let endpoint = &self.resumption.as_ref().ok_or_else(none)?.endpoint;
        let main = self.dialer.dial_within(endpoint, "main", &session.stop, within)?;
        let main = self.dialer.adopt(main, &session.stop)?;
        session.counters.main.count_bytes_of(&main);
        Ok(main)
    }

    fn new_shared(&self, session: &Arc<Session>) -> Result<Arc<SourceShared>> {
        let resumption = self.resumption.as_ref().ok_or_else(none)?;
        let cache = resumption.cache;
        let known = resumption.secret.is_some();
        Ok(self.shared.for_link(session, cache.map(PageCache::new), known))
    }

    /// What was on its way and has not arrived is dirty again.
    fn take_back(&mut self, standing: &Standing) -> Result<()> {
        let (settled, last) = (standing.settled, ping_of_round(self.rounds));
        if settled > last {
            let detail = format!("the destination has answered PING({settled:#x}), {last:#x} was the last");
            return Err(Error::misbehaved(Phase::Setup, detail));
        }
        let ram = &self.shared.ram;
        let all = settled == last;
        let kept = ram.take_back(|block, word| if all { u64::MAX } else { standing.word(block, word) });
        // Holes were looked for before what was written meanwhile.
        ram.forget_holes();
        let there = ram.total_bytes().saturating_sub((ram.dirty_pages() * PAGE) as u64);
        Counters::add(
            &self.shared.session.counters.bytes_not_repeated,
            usize::try_from(there).unwrap_or(usize::MAX),
        );
        if let Some(resumption) = &mut self.resumption {
            resumption.progressed |= kept > 0 || all;
        }
        tracing::debug!(kept, dirty = ram.dirty_pages(), "what has arrived over the last link");
        Ok(())
    }

    /// The destination knows nothing of this migration: its process is another.
    fn begin_anew(&mut self, handed_over: bool) -> Result<()> {
        let resumption = self.resumption.as_mut().ok_or_else(none)?;
        if !resumption.anew || handed_over {
            let detail = "the destination knows nothing of this migration: it is another process than before; nothing can be \
                          resumed, and to begin anew was not allowed";
            return Err(Error::new(ErrorKind::Incompatible, Phase::Setup, detail));
        }
        tracing::warn!("the destination knows nothing of this migration: it begins anew");
        (resumption.secret, resumption.keys) = (None, KeyPair::new()?);
        self.shared.ram.begin_anew();
        self.shared.ram.forget_holes();
        Ok(())
    }

    /// No new link came: the guest runs on here, if it was not about to be handed over.
    fn give_up(&mut self, whole: &Arc<Session>, error: Error, handed_over: bool) -> Error {
        let error = whole.fail(error, &self.crew);
        self.logs = LogSet::default();
        if handed_over {
            return error.after_hand_over();
        }
        whole.set_hand_over(HandOver::Before);
        error
    }
}

fn none() -> Error {
    Error::bug(Phase::Setup, "a link is replaced that cannot be")
}
