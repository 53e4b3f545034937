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
mod return_path;
mod shared;
pub(crate) mod sharing;
mod stream_end;
mod switchover;
mod tail;
mod verify;

use std::sync::Arc;
use std::sync::mpsc::Receiver;

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
use crate::run::workers::Crew;
use crate::stream::{MainReader, dialect};
use alive::Alive;
use channels::accept::{Accepting, Main};
use deadline::Deadline;
use driver::{Driver, Switched};
use mapped::PageReaders;
use postcopy::Guest;
use postcopy::at_rest::{AtRest, Recovering};
use postcopy::recover::Relisten;
pub use postcopy::running::{PostcopyEnd, PostcopyGuest};
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
        let crew = Arc::new(Crew::new(self.session.stop.clone()).with_hook(self.hook.clone()));
        let sharing = self.sharing.take().filter(|_| guest == Guest::Here);
        let shared =
            DestinationShared::new(&self.session, self.codecs.clone(), &self.config, &self.listener, sharing);
        let accepting = Accepting::new(&shared, &crew);
        let main = accepting.main();
        let listener = Arc::clone(&self.listener);
        self.session.stop.on_trip(move || shared::stop_accepting(&listener));
        let listener = Arc::clone(&self.listener);
        crew.spawn("mig-accept", Phase::Accept, move || accepting.run(&listener))?;

        let result =
            self.wait_for_main(&main, &shared).and_then(|main| self.run_main(main, guest, &shared, &crew));
        // Nothing that comes now can be of use: no channel may join, and no page be stored, once
        // this has returned. But the source of a post-copy may still connect for urgent pages.
        let running = matches!(&result, Ok((Switched::Running(_), _)));
        let over = || {
            shared.stop_accepting();
            main.wait(&self.session.stop, None, |main| main.over.then_some(())).is_some()
        };
        let goes_on = running || over();
        let result = match result {
            Ok(switched) if goes_on => {
                if !running {
                    shared.channels.finish();
                }
                self.begun(switched, &shared, &crew)
            }
            ended => Err(ended.err().unwrap_or_else(|| Error::stopped(Phase::Active))),
        };
        result.map_err(|error| {
            let cause = self.session.fail(error, &crew);
            shared.end_sharing();
            // A main channel that came too late to be taken; a command behind it is ended now.
            drop(main.modify_silently(|main| main.channel.take()));
            shared.refusals.explain(cause)
        })
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
                self.session.enter(MigrationState::PostcopyActive)?;
                Ok(Begun::Switched(driver, Arc::clone(crew)))
            }
        }
    }

    fn relisten(&self) -> Relisten {
        Relisten { options: self.session.socket_options(&self.config.socket), tls: self.tls.clone() }
    }

    fn wait_for_main(
        &self,
        main: &crate::run::stop::Monitor<Main>,
        shared: &DestinationShared,
    ) -> Result<Channel> {
        let timeout = self.session.timeout;
        main.wait(&self.session.stop, Some(timeout), |main| main.channel.take()).ok_or_else(|| {
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
        let channel = self.session.adopt(channel, Phase::Setup)?;
        shared.note_source(&channel);
        let deadline = Deadline::start(self.config.deadline, crew)?;
        self.session.counters.main.count_bytes_of(&channel);
        self.session.enter(MigrationState::Active)?;
        self.session.begin();
        let return_path = ReturnPath::new(Arc::clone(&channel));
        let (last_message, closer) = (return_path.clone(), channel.closer());
        let stop = self.session.stop.clone();
        self.session.stop.on_trip(move || {
            last_message.abort(stop.look_at_cause(dialect::failure));
            closer.close();
        });
        let (ack, direct) = (self.config.switchover_ack, self.config.direct_io);
        let readers = PageReaders { crew: Arc::clone(crew), count: self.config.channels, direct };
        let reader = MainReader::of_main(channel, &self.session);
        let none = || Error::bug(Phase::Setup, "memory is provided twice");
        let ram = self.ram.take().ok_or_else(none)?;
        let driver = Driver::new(reader, shared, return_path.clone(), ack, readers, ram, guest);
        let switched = driver.run()?;
        drop(deadline);
        Ok((switched, return_path))
    }
}
