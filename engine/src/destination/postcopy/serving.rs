//! A post-copy as its threads share it: which link it has, and how far it is.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use multifd_transports::{Channel, Closer};
use multifd_wire::ReturnMessage;

use super::link::Link;
use super::parallel::LinkPart;
use crate::destination::arrival;
use crate::destination::driver::{Driver, ReceivedMain};
use crate::destination::place::{BlockSinks, Pager, Wanted};
use crate::destination::return_path::ReturnPath;
use crate::destination::shared::DestinationShared;
use crate::error::{Error, ErrorKind, Phase, Result};
use crate::guest::PAGE;
use crate::report::{PageFaults, PostcopyReport};
use crate::run::counters::Counters;
use crate::run::state::MigrationState;
use crate::run::stop::{Monitor, lock};
use crate::run::workers::Crew;

/// How long a source may take to end the connection after it was told that all of RAM is here.
const LINGER: Duration = Duration::from_secs(1);

/// A post-copy from LISTEN on.
pub(in crate::destination) struct Serving {
    shared: Arc<DestinationShared>,
    sinks: Arc<BlockSinks>,
    /// The guest runs here: `None` if it runs nowhere.
    pager: Option<Arc<Pager>>,
    stage: Monitor<Stage>,
    link: Mutex<Link>,
    /// The devices have been loaded, or never will be.
    loaded: Monitor<Option<Duration>>,
    /// When LISTEN was read.
    since: Instant,
    /// What came before RUN.
    received: OnceLock<Arc<ReceivedMain>>,
}

/// How far a post-copy is.
enum Stage {
    /// Pages come in.
    Serving,
    /// The link is gone. The driver goes on over another; without one it cannot.
    Paused(Option<Box<Driver>>, Arc<Error>),
    /// A new link is being set up.
    Recovering,
    /// Every page is here.
    AllHere(Box<Driver>),
    /// Its owner is gone, or has taken what it needs.
    Over,
}

/// The end of a wait for a post-copy.
pub(in crate::destination) enum Waited {
    /// Every page is here.
    AllHere(Box<Driver>),
    /// The link is gone, and why.
    Paused(Arc<Error>),
}

/// Pauses a post-copy whose thread panics.
struct PauseOnPanic(Arc<Serving>);

impl Serving {
    pub(super) fn new(
        shared: &Arc<DestinationShared>,
        sinks: &Arc<BlockSinks>,
        pager: Option<Arc<Pager>>,
        return_path: &ReturnPath,
    ) -> Arc<Self> {
        let serving = Arc::new(Self {
            shared: Arc::clone(shared),
            sinks: Arc::clone(sinks),
            pager,
            stage: Monitor::new(Stage::Serving, &shared.session.stop),
            link: Mutex::new(Link::new(return_path, 0, true)),
            loaded: Monitor::new(None, &shared.session.stop),
            since: Instant::now(),
            received: OnceLock::new(),
        });
        shared.serve(&serving);
        serving
    }

    /// What fills the guest's memory; `None` if the guest runs nowhere.
    pub(in crate::destination) fn pager(&self) -> Option<&Arc<Pager>> {
        self.pager.as_ref()
    }

    /// The figures so far.
    pub(super) fn figures(&self) -> PostcopyReport {
        let counters = &self.shared.session.counters;
        let number = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let faults = self.pager.as_ref().map(|_| lock(&counters.faults).report());
        PostcopyReport {
            requests: number(&counters.requests),
            pages_requested: number(&counters.pages_requested),
            neighbours_pushed: 0,
            pages_repeated: 0,
            recoveries: number(&counters.recoveries),
            run_after: None,
            faults: faults
                .map(|faults| PageFaults { pages_pushed: number(&counters.pages_pushed), ..faults }),
        }
    }

    /// Asks for a host page. What fails is the link over which it was asked for, whatever replaces
    /// that: it is broken before another can be there. False: nothing can be asked for.
    pub(super) fn request(&self, pager: &Pager, wanted: &Wanted) -> bool {
        let mut link = lock(&self.link);
        if !link.asks {
            return false;
        }
        // Before the source can have counted it, too.
        let counters = &self.shared.session.counters;
        Counters::add(&counters.requests, 1);
        Counters::add(&counters.pages_requested, wanted.len as usize / PAGE);
        let Err(error) = link.ask(pager, wanted) else { return true };
        link.break_off(error);
        drop(link);
        self.stage.modify_and_notify(|_| ());
        false
    }

    pub(super) fn shared(&self) -> &Arc<DestinationShared> {
        &self.shared
    }

    pub(in crate::destination) fn sinks(&self) -> &Arc<BlockSinks> {
        &self.sinks
    }

    /// The return path of the link that there is, or was.
    pub(in crate::destination) fn return_path(&self) -> ReturnPath {
        lock(&self.link).return_path.clone()
    }

    /// Keeps what came before RUN.
    pub(in crate::destination) fn keep(&self, received: ReceivedMain) -> Result<Arc<ReceivedMain>> {
        let received = Arc::new(received);
        let kept = self.received.set(Arc::clone(&received));
        kept.map_err(|_| Error::bug(Phase::Device, "a guest that is received twice"))?;
        Ok(received)
    }

    /// Reads what follows RUN on a thread of its own.
    pub(in crate::destination) fn start(self: &Arc<Self>, driver: Box<Driver>, crew: &Crew) -> Result<()> {
        // Before the thread's first step: a hook that panics would leave a guest that waits for
        // ever.
        let guard = PauseOnPanic(Arc::clone(self));
        crew.spawn("mig-postcopy", Phase::Active, move || {
            guard.0.serve(driver);
            drop(guard);
            Ok(())
        })
    }

    /// Whatever ends this pauses the migration, and nothing else does: the guest has no other
    /// memory than the one that is half here.
    fn serve(&self, mut driver: Box<Driver>) {
        let whole = driver.postcopy_part().and_then(|()| self.wait_for_rest());
        if whole.is_ok() {
            // What comes twice is not stored any more.
            self.shared.channels.finish();
        }
        match whole.and_then(|()| self.let_go()) {
            Ok(()) => self.stage.modify_and_notify(|stage| {
                if !matches!(stage, Stage::Over) {
                    *stage = Stage::AllHere(driver);
                }
            }),
            Err(error) => self.pause(Some(driver), error),
        }
    }

    /// Every page is here: the guest's memory is its own again, and the source is told. A guest
    /// that runs nowhere is put away first, by its owner.
    fn let_go(&self) -> Result<()> {
        let Some(pager) = &self.pager else { return Ok(()) };
        // Before the memory is given back: a page that its owner has dropped is a fault there, too.
        self.shared.end_sharing();
        pager.release()?;
        let load = self.loaded.wait(&self.shared.session.stop, None, |loaded| *loaded);
        if self.stage.read(|stage| matches!(stage, Stage::Over)) {
            return Ok(());
        }
        let return_path = self.return_path();
        return_path.shut(load.unwrap_or_default())?;
        return_path.confirm(LINGER)
    }

    /// The guest has never been able to run here: its memory is given back as it is.
    pub(in crate::destination) fn give_back(&self) {
        if let Some(Err(error)) = self.pager.as_ref().map(|pager| pager.release()) {
            tracing::warn!("after a failure: {}", error.chain());
        }
    }

    /// The devices have been loaded, or never will be.
    pub(super) fn note_loaded(&self) {
        let load = self.since.elapsed();
        self.loaded.modify_and_notify(|loaded| _ = loaded.get_or_insert(load));
    }

    /// Main has ended. Pages that went over other connections may come after that, and so may the
    /// connection: its pages and the end of main are in no order. The timeout counts from the last
    /// page.
    fn wait_for_rest(&self) -> Result<()> {
        let session = &self.shared.session;
        loop {
            let before = session.counters.pages();
            let whole = self.stage.wait(&session.stop, Some(session.timeout), |stage| {
                let given_up = matches!(stage, Stage::Over) || lock(&self.link).broken.is_some();
                let checked = self.check_all_came();
                (given_up || checked.is_ok()).then_some(checked)
            });
            match whole {
                Some(checked) => return checked,
                None if session.counters.pages() > before && !session.stop.tripped() => {}
                None => return self.check_all_came(),
            }
        }
    }

    /// Pages have come over a connection beside main.
    pub(super) fn note_pages(&self) {
        self.stage.modify_and_notify(|_| ());
    }

    fn check_all_came(&self) -> Result<()> {
        let none = || Error::bug(Phase::Active, "a guest that runs and was not received");
        let received = self.received.get().ok_or_else(none)?;
        arrival::check_all_came(&self.sinks, &received.early, &received.tail)
    }

    /// The link is gone, or has to go: nothing that came over it is lost.
    fn pause(&self, driver: Option<Box<Driver>>, error: Error) {
        let driver = driver.filter(|_| !lock(&self.link).for_good);
        let error = self.hang_up().unwrap_or(error).after_hand_over();
        // Who hears of the pause can listen at the same address.
        self.shared.end_accepting();
        let said = error.chain();
        if self.stage.read(|stage| matches!(stage, Stage::Over)) {
            return;
        }
        // First of all: who is woken by the stage may ask for the state.
        self.enter(MigrationState::PostcopyPaused);
        tracing::warn!("post-copy is paused: {said}");
        self.stage.modify_and_notify(|stage| {
            if !matches!(stage, Stage::Over) {
                *stage = Stage::Paused(driver, Arc::new(error));
            }
        });
    }

    /// Closes what there is of the link. Why it has gone, if that is known.
    fn hang_up(&self) -> Option<Error> {
        let mut link = lock(&self.link);
        link.asks = false;
        link.gone = true;
        link.return_path.hang_up();
        link.others.drain(..).for_each(|channel| channel.close());
        link.broken.take()
    }

    /// A channel beside main has failed: main finds that the link is gone.
    pub(super) fn break_link(&self, error: Error) {
        self.break_link_if(error, |_| true);
    }

    /// The same, of this link only: what is heard of late must not break the one that replaced it.
    pub(super) fn break_link_of(&self, number: u64, error: Error) {
        self.break_link_if(error, |link| link.number == number);
    }

    fn break_link_if(&self, error: Error, fits: impl FnOnce(&Link) -> bool) {
        let mut link = lock(&self.link);
        if !fits(&link) {
            return;
        }
        link.break_off(error);
        drop(link);
        self.stage.modify_and_notify(|_| ());
    }

    /// Nothing hears of page faults any more: the guest's threads wait for their pages, for ever.
    pub(super) fn break_for_good(&self, error: Error) {
        lock(&self.link).for_good = true;
        self.break_link(error);
    }

    /// Makes a channel for urgent pages part of the link, and gives the number of that.
    pub(super) fn add_urgent(&self, closer: Closer) -> u64 {
        let mut link = lock(&self.link);
        link.add(closer);
        link.number
    }

    /// Makes a parallel channel part of the link over which RUN came, or ends it if that is gone.
    pub(in crate::destination) fn add_channel(self: &Arc<Self>, channel: &Channel) -> LinkPart {
        let mut link = lock(&self.link);
        if link.number == 0 {
            link.add(channel.closer());
        } else {
            channel.closer().close();
        }
        LinkPart::new(self, 0)
    }

    /// Makes a parallel channel part of the link that goes on.
    ///
    /// # Errors
    /// The source has no such channel, or it is there already.
    pub(super) fn add_recovered_channel(self: &Arc<Self>, id: u8, channel: &Channel) -> Result<LinkPart> {
        let channels = &self.shared.channels;
        let mut link = lock(&self.link);
        let refusal = if !channels.has_switched() {
            "a parallel channel of a post-copy that has none".to_owned()
        } else if !link.channels.insert(id) {
            format!("channel id {id} is taken: is a second source connected?")
        } else {
            link.add(channel.closer());
            channels.rejoin(id, channel.closer());
            return Ok(LinkPart::new(self, link.number));
        };
        Err(Error::misbehaved(Phase::Accept, refusal))
    }

    /// A channel beside main has ended. That breaks the link unless all of RAM is here: then a
    /// source ends its connections as it likes.
    pub(super) fn channel_ended(&self, link: u64, result: Result<()>) {
        if self.check_all_came().is_ok() {
            return;
        }
        let early = || {
            let detail = "the source ended a channel before all of RAM was here";
            Error::new(ErrorKind::Transport, Phase::Active, detail)
        };
        self.break_link_of(link, result.err().unwrap_or_else(early));
    }

    /// The state says more than is needed here: a step that the table does not have is a message.
    fn enter(&self, next: MigrationState) {
        if let Err(error) = self.shared.session.enter(next) {
            tracing::debug!(%error, "the state of a post-copy");
        }
    }

    /// The source has said RESUME over the new link.
    pub(in crate::destination) fn resume(&self) -> Result<()> {
        self.return_path().send(Phase::Active, &ReturnMessage::ResumeAck(1))?;
        lock(&self.link).asks = true;
        if let Some(pager) = &self.pager {
            // A page that is asked for meanwhile may be asked for twice.
            self.ask(pager, &pager.pending());
        }
        self.enter(MigrationState::PostcopyActive);
        self.stage.modify_and_notify(|stage| {
            if let Stage::Recovering = stage {
                *stage = Stage::Serving;
            }
        });
        Counters::add(&self.shared.session.counters.recoveries, 1);
        tracing::info!("post-copy goes on over a new link");
        Ok(())
    }

    /// Takes the driver of a paused post-copy, for a new link.
    pub(super) fn begin_recovery(&self) -> Result<(Box<Driver>, Arc<Error>)> {
        self.stage.modify_and_notify(|stage| match std::mem::replace(stage, Stage::Over) {
            Stage::Paused(Some(driver), error) => {
                *stage = Stage::Recovering;
                Ok((driver, error))
            }
            other => {
                let detail = match &other {
                    Stage::Paused(None, error) => format!("it cannot go on: {}", error.chain()),
                    _ => "post-copy is not paused: there is nothing to recover".to_owned(),
                };
                *stage = other;
                Err(Error::new(ErrorKind::ApiMisuse, Phase::Active, detail).after_hand_over())
            }
        })
    }

    /// There is no new link after all.
    pub(super) fn end_recovery(&self, driver: Box<Driver>, error: Arc<Error>) {
        self.enter(MigrationState::PostcopyPaused);
        self.stage.modify_and_notify(|stage| {
            if let Stage::Recovering = stage {
                *stage = Stage::Paused(Some(driver), error);
            }
        });
    }

    /// Goes on over a new link.
    pub(super) fn replace_link(&self, return_path: &ReturnPath) {
        let mut link = lock(&self.link);
        *link = Link::new(return_path, link.number + 1, false);
        drop(link);
        if let Some(pager) = &self.pager {
            pager.forget_parts();
        }
        self.enter(MigrationState::PostcopyRecover);
    }

    pub(super) fn enter_recover_setup(&self) {
        self.enter(MigrationState::PostcopyRecoverSetup);
    }

    /// Waits until every page is here, or the link is gone.
    pub(in crate::destination) fn wait(&self) -> Result<Waited> {
        let stop = &self.shared.session.stop;
        let waited = self.stage.wait(stop, None, |stage| match stage {
            Stage::AllHere(_) => match std::mem::replace(stage, Stage::Over) {
                Stage::AllHere(driver) => Some(Waited::AllHere(driver)),
                _ => None,
            },
            Stage::Paused(_, error) => Some(Waited::Paused(Arc::clone(error))),
            Stage::Serving | Stage::Recovering | Stage::Over => None,
        });
        waited.ok_or_else(|| stop.cause_or(Error::stopped(Phase::Active)))
    }

    /// Ends what still runs: its owner gives up.
    pub(in crate::destination) fn abandon(&self) {
        self.stage.modify_and_notify(|stage| *stage = Stage::Over);
        self.note_loaded();
        self.hang_up();
        if let Some(pager) = &self.pager {
            pager.stop();
        }
        if let Some(sharing) = &self.shared.sharing {
            sharing.stop();
        }
        self.shared.stop_accepting();
    }
}

impl Drop for PauseOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let detail = "the thread that reads pages panicked";
            self.0.pause(None, Error::new(ErrorKind::Panicked, Phase::Active, detail));
        }
    }
}
