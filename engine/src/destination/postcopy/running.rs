//! A guest that runs here before its RAM is here.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use multifd_transports::{Channel, Listener};
use multifd_wire::{Configuration, ReturnMessage, SectionHead};

use super::faults;
use super::recover;
use super::serving::{Serving, Waited};
use super::shared_faults;
use crate::destination::driver::{Driver, ReceivedMain};
use crate::error::{Error, Phase, Result};
use crate::report::{PostcopyReport, Report};
use crate::run::session::{HandOver, ProgressReader};
use crate::run::state::MigrationState;
use crate::run::workers::Crew;
use crate::stream::sections::EarlySections;

/// The PING behind the devices by which a source (QEMU from 10.2 on) finds out that they have been
/// loaded: until it is answered, the guest may run on there. Spec: docs/wire.md §15.1.
const DEVICES_LOADED: u32 = 0x42;

/// The state of a guest's devices is here, its RAM follows.
///
/// Load the device state, call [`PostcopyGuest::loaded`], start the vCPUs, then
/// [`PostcopyGuest::wait`]. Memory can be touched from the beginning: a thread that needs a page
/// which is not here waits for it. Threads of the engine's own fill the memory all the while.
///
/// When the link to the source breaks, nothing is lost: what has come stays, threads that need what
/// has not come wait, and [`PostcopyGuest::recover`] goes on over another link. **Dropped before
/// all of RAM is here, these threads wait for as long as the process lives**: a page that is
/// missing is never read as zero.
#[must_use = "the guest's RAM comes in as long as this lives"]
pub struct PostcopyGuest {
    serving: Arc<Serving>,
    received: Arc<ReceivedMain>,
    /// To be answered when the devices have been loaded.
    pings: Vec<u32>,
    crew: Arc<Crew>,
    loaded: AtomicBool,
    over: bool,
}

/// Why a wait for a guest's RAM has ended.
#[derive(Debug)]
pub enum PostcopyEnd {
    /// All of RAM is here, and the source knows it.
    Completed(Box<Report>),
    /// The link is gone, or had to go: why. The guest runs on until it needs a page.
    Paused(Error),
}

impl PostcopyGuest {
    /// RUN was read.
    pub(in crate::destination) fn start(mut driver: Box<Driver>, crew: &Arc<Crew>) -> Result<Self> {
        let serving = driver.share()?;
        let none = || Error::bug(Phase::Device, "a guest that runs without a pager");
        let pager = Arc::clone(serving.pager().ok_or_else(none)?);
        let (received, pings) = driver.take_devices()?;
        let received = serving.keep(received)?;
        faults::start(&serving, &pager, crew)?;
        shared_faults::start(&serving, &pager, crew)?;
        serving.start(driver, crew)?;
        let crew = Arc::clone(crew);
        Ok(Self { serving, received, pings, crew, loaded: AtomicBool::new(false), over: false })
    }

    /// Machine type, and what else the source said of itself.
    pub fn configuration(&self) -> &Configuration {
        &self.received.configuration
    }

    /// Device sections that came before the last RAM (virtio-mem), as they came.
    pub fn early_sections(&self) -> &EarlySections {
        &self.received.early
    }

    /// The devices' sections as they came.
    pub fn device_state(&self) -> &[u8] {
        self.received.tail.sections()
    }

    /// The one section that a source made by [`DeviceState::opaque`](crate::DeviceState::opaque):
    /// its version and bytes. `None` if the device state is anything else.
    pub fn opaque_state(&self, name: &str) -> Option<(u32, &[u8])> {
        self.received.tail.opaque(name)
    }

    /// The devices' sections one by one: their heads and payloads, such as a source made by
    /// [`DeviceState::described`](crate::DeviceState::described).
    ///
    /// # Errors
    /// `InvalidStream` if they are no sections.
    pub fn sections(&self) -> Result<Vec<(SectionHead, &[u8])>> {
        self.received.tail.split()
    }

    /// The guest's uuid, if it has one: QEMU says all zeros for a guest without.
    pub fn uuid(&self) -> Option<[u8; 16]> {
        self.serving.shared().uuid().filter(|uuid| *uuid != [0; 16])
    }

    /// The stream announced the switch-over by SWITCHOVER_START.
    pub fn switchover_start(&self) -> bool {
        self.received.switchover_start
    }

    /// `postcopy-active`, `postcopy-paused` and so on.
    pub fn state(&self) -> MigrationState {
        self.serving.shared().session.state()
    }

    /// The counters, from any thread.
    pub fn progress(&self) -> ProgressReader {
        ProgressReader::new(&self.serving.shared().session)
    }

    /// What it has taken so far, and how long threads have waited for pages.
    pub fn figures(&self) -> PostcopyReport {
        self.serving.figures()
    }

    /// The device state has been loaded: the guest may run here from now on.
    ///
    /// # Errors
    /// The migration was cancelled before, or the source has gone without having heard this, and
    /// may run the guest itself: it must not run here.
    pub fn loaded(&self) -> Result<()> {
        if self.loaded.load(Ordering::Acquire) {
            return Ok(());
        }
        let session = &self.serving.shared().session;
        if !session.stop.seal() {
            return Err(session.stop.cause_or(Error::stopped(Phase::Device)));
        }
        let answer =
            |value: &u32| self.serving.return_path().send(Phase::Device, &ReturnMessage::Pong(*value));
        match self.pings.iter().try_for_each(answer) {
            Err(error) if self.pings.contains(&DEVICES_LOADED) => return Err(error),
            // Any other source has let go of the guest already.
            Err(error) => tracing::warn!("at the switch to post-copy: {}", error.chain()),
            Ok(()) => {}
        }
        session.set_hand_over(HandOver::Begun);
        self.loaded.store(true, Ordering::Release);
        self.serving.note_loaded();
        Ok(())
    }

    /// Waits until all of RAM is here and the source has been told, or the link is gone.
    ///
    /// # Errors
    /// `ApiMisuse` before [`PostcopyGuest::loaded`].
    pub fn wait(&mut self) -> Result<PostcopyEnd> {
        if !self.loaded.load(Ordering::Acquire) {
            let detail = "a wait for the RAM of a guest whose devices have not been loaded";
            return Err(Error::new(crate::ErrorKind::ApiMisuse, Phase::Device, detail));
        }
        match self.serving.wait()? {
            Waited::AllHere(driver) => {
                drop(driver);
                let shared = self.serving.shared();
                shared.stop_accepting();
                let session = &shared.session;
                session.complete();
                session.set_hand_over(HandOver::Done);
                let codec =
                    shared.codec_in_use().map_or_else(|| "none".to_owned(), |it| it.name().to_owned());
                let mut report = Report::of(session, session.elapsed(), codec);
                report.postcopy = Some(self.serving.figures());
                self.wind_up();
                Ok(PostcopyEnd::Completed(Box::new(report)))
            }
            Waited::Paused(why) => {
                let error = Error::new(why.kind(), why.phase(), why.chain()).after_hand_over();
                Ok(PostcopyEnd::Paused(error))
            }
        }
    }

    /// Goes on, after a pause, over the first connection to `listener` by which the source does,
    /// and returns when it is there; it has to come within `limit`. What the listener takes is TLS
    /// if the first link was.
    ///
    /// # Errors
    /// The migration is not paused (`ApiMisuse`), or no source came. It is paused as before then.
    pub fn recover(&mut self, listener: Listener, limit: Duration) -> Result<()> {
        recover::over_listener(&self.serving, &recover::for_recovery(listener), limit, &self.crew)
    }

    /// The same over connections that the caller has made: main, and `others` in any order, those
    /// for urgent pages and the parallel channels, as many as the source makes.
    ///
    /// # Errors
    /// As [`PostcopyGuest::recover`].
    pub fn recover_over(&mut self, main: Channel, others: impl IntoIterator<Item = Channel>) -> Result<()> {
        recover::over_channels(&self.serving, main, others.into_iter().collect(), &self.crew)
    }

    /// Gives up what has not come: each page that is missing is poisoned. Threads that wait for one
    /// go on, and get a signal, as those that touch one later: SIGBUS with BUS_MCEERR_AR, or a
    /// system call's EFAULT or EHWPOISON, as of memory that a machine check has lost. What has come
    /// stays, and can be read; nothing waits any more, and the memory can be unmapped or sent on.
    /// The source keeps all of RAM as it was at the switch.
    ///
    /// Without this, threads wait for as long as the process lives (see [`PostcopyGuest`]). Gives
    /// the number of pages that are lost.
    ///
    /// # Errors
    /// `Incompatible`: the kernel cannot (before Linux 6.6); threads wait then, as when this is
    /// dropped.
    pub fn poison_missing(mut self) -> Result<usize> {
        let none = || Error::bug(Phase::Active, "a guest that runs without a pager");
        let pager = Arc::clone(self.serving.pager().ok_or_else(none)?);
        self.give_up();
        self.serving.shared().session.note_end_of_failed();
        pager.poison_missing().map_err(Error::after_hand_over)
    }

    fn give_up(&mut self) {
        if self.over {
            return;
        }
        if !self.loaded.load(Ordering::Acquire) {
            // It never ran here: a source that can go back does.
            self.serving.return_path().abort(None);
        }
        self.serving.abandon();
        self.wind_up();
    }

    fn wind_up(&mut self) {
        self.over = true;
        self.serving.shared().session.close_channels();
        self.serving.shared().end_of_service();
        self.crew.join();
        self.serving.shared().session.stop.release();
    }
}

impl Drop for PostcopyGuest {
    fn drop(&mut self) {
        self.give_up();
    }
}

impl fmt::Debug for PostcopyGuest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PostcopyGuest").field("state", &self.state()).finish_non_exhaustive()
    }
}
