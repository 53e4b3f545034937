//! The receiving end: any QEMU or multifd source moves its guest in here.
//!
//! ```text
//!  channels/
//!    accept ──────── accepts connections in any order, tells main from channels
//!    worker ×N ───── packets into guest memory                    one thread each, `mig-recv`
//!    sync ────────── where SYNC on channels meets FLUSH on main
//!  driver ────────── reads main, on the caller's thread, and does what the machine decides
//!    machine ─────── what each thing on main means: no I/O, no thread, no clock
//!    ram_reader ──── pages on main
//!    early, tail ─── device sections before the end of RAM, and behind it
//!  postcopy/ ─────── a guest that runs here before its RAM is here
//!  verify ×N ─────── RAM that was placed, read again              one thread each, `mig-verify-N`
//!  mapped ×N ─────── pages at fixed places of a file              one thread each, `mig-recv-N`
//!  alive ─────────── says that this end is alive while the embedder has the guest   `mig-alive`
//!  place/ ────────── the blocks, and how a page is written or cleared
//! ```

mod alive;
mod arrival;
mod arrived;
mod builder;
mod channels;
mod deadline;
mod driver;
mod early;
mod hold;
mod machine;
mod mapped;
mod place;
mod postcopy;
mod ram_reader;
mod refusals;
mod resume;
mod return_path;
mod shared;
pub(crate) mod sharing;
mod stream_end;
mod switchover;
mod tail;
mod verify;

use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::Duration;

use multifd_codecs::Codecs;
use multifd_transports::{Channel, Endpoint, Listener, ThreadHook, TlsServer};

pub use arrived::Arrived;
pub use builder::DestinationBuilder;
pub use place::{DigestsDiffer, FreshRam, IncomingRam};
pub use shared::DevicePacket;
pub use switchover::SwitchoverAck;
pub use verify::ChangedPages;

use crate::config::DestinationConfig;
use crate::error::{Error, ErrorKind, Phase, Result};
use crate::run::session::{Canceller, ProgressReader, Session};
use crate::run::state::MigrationState;
use crate::run::stop::Monitor;
use crate::run::workers::Crew;
use crate::stream::{MainReader, dialect};
use alive::Alive;
use channels::accept::{Accepting, Main, opening_len};
use deadline::Deadline;
use driver::{Driver, Switched};
use mapped::PageReaders;
use postcopy::Guest;
use postcopy::at_rest::{AtRest, Recovering};
use postcopy::recover::Relisten;
pub use postcopy::running::{PostcopyEnd, PostcopyGuest};
use resume::{OpenAlready, Resumption};
use return_path::ReturnPath;
use shared::DestinationShared;
use sharing::Sharing;

/// Listens for one migration.
pub struct Destination {
    listener: Arc<Listener>,
    session: Arc<Session>,
    config: DestinationConfig,
    /// Taken when the source comes.
    ram: Option<Box<dyn IncomingRam>>,
    codecs: Codecs,
    tls: Option<TlsServer>,
    hook: ThreadHook,
    sharing: Option<Arc<dyn Sharing>>,
}

/// A guest up to where it may run here.
#[derive(Debug)]
pub enum Incoming {
    /// All of it is here: load the device state, then [`Arrived::accept`].
    Arrived(Arrived),
    /// All of it but RAM, which follows.
    Postcopy(PostcopyGuest),
}

/// What a source has sent while its guest could still run there.
enum Begun {
    Arrived(Arrived),
    Switched(Box<Driver>, Arc<Crew>),
}

/// How a link has ended.
enum LinkEnd {
    /// Another one may go on.
    Broken(Error),
    /// The migration has.
    Final(Error),
}

/// Between two tries to listen where something else listens still.
const BIND_AGAIN: Duration = Duration::from_millis(100);

impl Destination {
    /// Where it listens, with the port that the system chose if 0 was asked for. Over connections
    /// of the caller's: the descriptor of main.
    pub fn endpoint(&self) -> Endpoint {
        self.listener.endpoint()
    }

    /// Ends the migration from another thread.
    pub fn canceller(&self) -> Canceller {
        Canceller::new(&self.session)
    }

    /// Tells how far it has come, from any thread.
    pub fn progress(&self) -> ProgressReader {
        ProgressReader::new(&self.session)
    }

    /// Every state that the migration enters from now on, in its order (QEMU's capability
    /// `events`).
    pub fn state_changes(&self) -> Receiver<MigrationState> {
        self.session.state_changes()
    }

    /// Waits for the source and receives the whole guest. All of RAM has landed when this returns;
    /// the source waits for [`Arrived::accept`].
    ///
    /// With [`DestinationBuilder::postcopy`], also when the source switches to post-copy: then the
    /// guest can no longer run at the source ([`Error::source_may_resume`] is false of all errors
    /// from there on), and this returns when its last page is here.
    ///
    /// # Errors
    /// Anything that keeps the guest from arriving whole. The source has been told then, if it
    /// listens.
    pub fn receive(self) -> Result<Arrived> {
        let guest = if self.config.postcopy { Guest::AtRest } else { Guest::NoPostcopy };
        let recover =
            Recovering { limit: self.config.recover, relisten: self.relisten(), at: self.endpoint() };
        match self.begin(guest)? {
            Begun::Arrived(arrived) => Ok(arrived),
            Begun::Switched(driver, crew) => AtRest::start(driver, &crew)
                .and_then(|at_rest| at_rest.receive(&recover))
                .map_err(Error::after_hand_over),
        }
    }

    /// Waits for the source and receives the guest, up to where it may run here: that is when all
    /// of RAM is here, or, with [`DestinationBuilder::postcopy`], when the source has switched to
    /// post-copy. See docs/postcopy.md.
    ///
    /// # Errors
    /// As [`Destination::receive`]; and a source that may switch is refused by name when pages
    /// cannot follow the guest into the memory that is there.
    pub fn receive_live(self) -> Result<Incoming> {
        let guest = if self.config.postcopy { Guest::Here } else { Guest::NoPostcopy };
        match self.begin(guest)? {
            Begun::Arrived(arrived) => Ok(Incoming::Arrived(arrived)),
            Begun::Switched(driver, crew) => PostcopyGuest::start(driver, &crew).map(Incoming::Postcopy),
        }
    }

    fn begin(mut self, guest: Guest) -> Result<Begun> {
        self.session.enter(MigrationState::Setup)?;
        // Where the source can dial again.
        let resume_for = self.config.resume_for.filter(|_| self.listener.takes_strangers());
        let resumption = resume_for.map(Resumption::new).transpose()?;
        let mut listener = Arc::clone(&self.listener);
        loop {
            let session = if resumption.is_some() { self.session.link() } else { Arc::clone(&self.session) };
            let crew = Arc::new(Crew::new(session.stop.clone()).with_hook(self.hook.clone()));
            let (codecs, config) = (self.codecs.clone(), &self.config);
            let sharing = self.sharing.clone().filter(|_| guest == Guest::Here);
            let shared =
                DestinationShared::new(&session, codecs, config, &listener, sharing, resumption.as_ref());
            let cause = match self.run_link(&listener, guest, &shared, &crew) {
                Ok(begun) => return Ok(begun),
                Err(LinkEnd::Final(error)) => return Err(error),
                Err(LinkEnd::Broken(cause)) => cause,
            };
            let none = || Error::bug(Phase::Accept, "a link is replaced that cannot be");
            let resumption = resumption.as_ref().ok_or_else(none)?;
            resumption.begin_outage(&cause, self.session.counters.pages());
            session.stop.release();
            let again = self.listen_again(resumption, &cause);
            listener = again.map_err(|error| {
                let cause = self.session.fail(error, &crew);
                shared.end_sharing();
                shared.refusals.explain(cause)
            })?;
        }
    }

    /// One link: from its connections to where the guest may run here.
    fn run_link(
        &mut self,
        listener: &Arc<Listener>,
        guest: Guest,
        shared: &Arc<DestinationShared>,
        crew: &Arc<Crew>,
    ) -> Result<Begun, LinkEnd> {
        let session = &shared.session;
        let accepting = Accepting::new(shared, crew);
        let main = accepting.main();
        let (stopped, served) = (Arc::clone(listener), Arc::clone(listener));
        session.stop.on_trip(move || shared::stop_accepting(&stopped));
        let result = crew
            .spawn("mig-accept", Phase::Accept, move || accepting.run(&served))
            .and_then(|()| self.wait_for_main(&main, shared))
            .and_then(|main| self.run_main(main, guest, shared, crew));
        // Nothing that comes now can be of use: no channel may join, and no page be stored, once
        // this has returned. But the source of a post-copy may still connect for urgent pages.
        let running = matches!(&result, Ok((Switched::Running(_), _)));
        let over = || {
            shared.stop_accepting();
            main.wait(&session.stop, None, |main| main.over.then_some(())).is_some()
        };
        let goes_on = running || over();
        let result = match result {
            Ok(switched) if goes_on => {
                if !running {
                    shared.channels.finish();
                }
                self.begun(switched, shared, crew)
            }
            ended => Err(ended.err().unwrap_or_else(|| Error::stopped(Phase::Active))),
        };
        result.map_err(|error| {
            let end = self.end_link(error, shared, crew);
            // A main channel that came too late to be taken; a command behind it is ended now.
            drop(main.modify_silently(|main| main.channel.take()));
            end
        })
    }

    fn end_link(&self, error: Error, shared: &DestinationShared, crew: &Crew) -> LinkEnd {
        let session = &shared.session;
        let cause = match &shared.resumption {
            None => session.fail(error, crew),
            Some(resumption) => {
                session.end_link(error, crew);
                let late = self.config.deadline.is_some_and(|deadline| session.elapsed() >= deadline);
                let ended = self.session.stop.tripped() || late;
                let goes_on = session.stop.look_at_cause(|cause| resumption.goes_on_after(cause));
                if goes_on == Some(true) && !ended {
                    return LinkEnd::Broken(session.stop.cause_or(Error::stopped(Phase::Active)));
                }
                session.fail(Error::stopped(Phase::Active), crew)
            }
        };
        shared.end_sharing();
        LinkEnd::Final(shared.refusals.explain(cause))
    }

    /// Listens for the source whose link broke.
    fn listen_again(&self, resumption: &Resumption, cause: &Error) -> Result<Arc<Listener>> {
        let (at, relisten) = (self.endpoint(), self.relisten());
        tracing::warn!(
            "the link broke: {}; waiting for its source on {at} for {:?}",
            cause.chain(),
            resumption.limit()
        );
        let pause = Monitor::new((), &self.session.stop);
        loop {
            let left = resumption.left()?;
            match Listener::bind_with(&at, &relisten.options) {
                Ok(listener) => {
                    let listener = listener.tls(relisten.tls).opening_len(opening_len);
                    return Ok(Arc::new(listener));
                }
                Err(error) => tracing::debug!(%error, "listening again"),
            }
            pause.wait(&self.session.stop, Some(left.min(BIND_AGAIN)), |()| None::<()>);
            if self.session.stop.tripped() {
                return Err(Error::stopped(Phase::Accept));
            }
        }
    }

    fn begun(
        &self,
        (switched, return_path): (Switched, ReturnPath),
        shared: &Arc<DestinationShared>,
        crew: &Arc<Crew>,
    ) -> Result<Begun> {
        match switched {
            Switched::Arrived(stream) => {
                shared.end_sharing();
                let alive = Alive::start(&return_path, crew)?;
                let audit = match self.config.verify {
                    true => Some(verify::verify(&*shared.sinks()?, crew)?),
                    false => None,
                };
                let (shared, crew) = (Arc::clone(shared), Arc::clone(crew));
                let arrived = Arrived::new(stream, return_path, shared, crew, alive);
                Ok(Begun::Arrived(arrived.verified(audit)))
            }
            Switched::Running(driver) => {
                if self.config.verify {
                    tracing::warn!("the source has switched to post-copy: what follows is not read again");
                }
                self.session.enter(MigrationState::PostcopyActive).inspect_err(|_| driver.give_back())?;
                Ok(Begun::Switched(driver, Arc::clone(crew)))
            }
        }
    }

    fn relisten(&self) -> Relisten {
        Relisten { options: self.session.socket_options(&self.config.socket), tls: self.tls.clone() }
    }

    fn wait_for_main(&self, main: &Monitor<Main>, shared: &DestinationShared) -> Result<Channel> {
        let timeout = match shared.resumption.as_ref().filter(|_| shared.resumed) {
            Some(resumption) => resumption.left()?,
            None => self.session.timeout,
        };
        main.wait(&shared.session.stop, Some(timeout), |main| main.channel.take()).ok_or_else(|| {
            let detail = format!("no main channel on {} within {timeout:?}", self.listener.endpoint());
            let error = Error::new(ErrorKind::Deadline, Phase::Accept, detail);
            match shared.channels.unidentified() {
                0 => error,
                silent => {
                    error.noting(format_args!("connections that have not said what they are: {silent}"))
                }
            }
        })
    }

    fn run_main(
        &mut self,
        channel: Channel,
        guest: Guest,
        shared: &Arc<DestinationShared>,
        crew: &Arc<Crew>,
    ) -> Result<(Switched, ReturnPath)> {
        let session = &shared.session;
        let channel = session.adopt(channel, Phase::Setup)?;
        shared.note_source(&channel);
        session.counters.main.count_bytes_of(&channel);
        if !shared.resumed {
            session.enter(MigrationState::Active)?;
            session.begin();
        }
        let deadline = Deadline::start(self.config.deadline, session.elapsed(), crew)?;
        let return_path = ReturnPath::new(Arc::clone(&channel));
        self.close_main_on_stop(&channel, &return_path, shared);
        let (ack, direct) = (self.config.switchover_ack, self.config.direct_io);
        let readers = PageReaders { crew: Arc::clone(crew), count: self.config.channels, direct };
        let reader = MainReader::of_main(channel, session);
        let none = || Error::bug(Phase::Setup, "memory is provided twice");
        let ram = match &shared.resumption {
            Some(resumption) if shared.resumed => {
                return_path.open();
                resumption.tell_standing(&return_path)?;
                Box::new(OpenAlready(Arc::clone(resumption)))
            }
            _ => self.ram.take().ok_or_else(none)?,
        };
        let driver = Driver::new(reader, shared, return_path.clone(), ack, readers, ram, guest);
        let switched = driver.run()?;
        drop(deadline);
        Ok((switched, return_path))
    }

    /// The source is told why this end fails; of a link that broke it makes another, and is told
    /// nothing.
    fn close_main_on_stop(&self, channel: &Channel, return_path: &ReturnPath, shared: &DestinationShared) {
        let (last_message, closer) = (return_path.clone(), channel.closer());
        let (stop, resumption) = (shared.session.stop.clone(), shared.resumption.clone());
        shared.session.stop.on_trip(move || {
            let goes_on = |cause: &Error| resumption.as_ref().is_some_and(|kept| kept.goes_on_after(cause));
            if stop.look_at_cause(goes_on) != Some(true) {
                last_message.abort(stop.look_at_cause(dialect::failure));
            }
            closer.close();
        });
    }
}

#[cfg(test)]
mod tests;
