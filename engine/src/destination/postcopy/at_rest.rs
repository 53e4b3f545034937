//! A post-copy whose guest runs nowhere: it is kept when its last page is here.

use std::sync::Arc;
use std::time::Duration;

use multifd_transports::Endpoint;

use super::recover::{self, Relisten};
use super::serving::{Serving, Waited};
use crate::destination::alive::Alive;
use crate::destination::arrived::Arrived;
use crate::destination::driver::{Driver, ReceivedMain};
use crate::error::{Error, Phase, Result};
use crate::run::session::HandOver;
use crate::run::workers::Crew;

/// A guest that the source has let go of, whose pages come in.
pub(in crate::destination) struct AtRest {
    serving: Arc<Serving>,
    received: Arc<ReceivedMain>,
    crew: Arc<Crew>,
}

/// What to do when the link is gone.
pub(in crate::destination) struct Recovering {
    /// How long to wait for the source each time; `None`: not at all.
    pub(in crate::destination) limit: Option<Duration>,
    pub(in crate::destination) relisten: Relisten,
    /// Where to listen again.
    pub(in crate::destination) at: Endpoint,
}

impl AtRest {
    /// RUN was read. No device waits for anything: what was asked behind them is answered at once.
    pub(in crate::destination) fn start(mut driver: Box<Driver>, crew: &Arc<Crew>) -> Result<Self> {
        let serving = driver.share()?;
        serving.pause_on_panics(crew);
        let session = &serving.shared().session;
        // From here on, whatever ends a thread pauses the migration.
        if !session.stop.seal() {
            return Err(session.stop.cause_or(Error::stopped(Phase::Device)));
        }
        session.set_hand_over(HandOver::Begun);
        let (received, pings) = driver.take_devices()?;
        let received = serving.keep(received)?;
        for value in pings {
            // A link that is gone by now is found by the thread that reads pages.
            let answer = multifd_wire::ReturnMessage::Pong(value);
            if let Err(error) = serving.return_path().send(Phase::Active, &answer) {
                tracing::debug!(%error, "at the switch to post-copy");
            }
        }
        serving.start(driver, crew)?;
        Ok(Self { serving, received, crew: Arc::clone(crew) })
    }

    /// Waits until the last page is here.
    ///
    /// # Errors
    /// The link is gone, and was not made again.
    pub(in crate::destination) fn receive(self, recovering: &Recovering) -> Result<Arrived> {
        let result = self.pages(recovering);
        if result.is_err() {
            self.serving.abandon();
            self.serving.shared().session.note_end_of_failed();
            self.serving.shared().session.close_channels();
            self.serving.shared().end_of_service();
            self.crew.join();
        }
        result
    }

    fn pages(&self, recovering: &Recovering) -> Result<Arrived> {
        loop {
            match self.serving.wait()? {
                Waited::AllHere(driver) => {
                    drop(driver);
                    let shared = Arc::clone(self.serving.shared());
                    shared.stop_accepting();
                    let (received, crew) = (Arc::clone(&self.received), Arc::clone(&self.crew));
                    let return_path = self.serving.return_path();
                    let alive = Alive::start(&return_path, &crew)?;
                    return Ok(Arrived::new(received, return_path, shared, crew, alive).switched());
                }
                Waited::Paused(why) => {
                    self.recover(recovering, &why)?;
                }
            }
        }
    }

    fn recover(&self, recovering: &Recovering, why: &Error) -> Result<()> {
        let copy = || {
            let error = Error::new(why.kind(), why.phase(), why.chain()).after_hand_over();
            error.noting("post-copy is paused; the source keeps what has not come")
        };
        let limit = recovering.limit.ok_or_else(copy)?;
        let listener = recovering.relisten.bind(&recovering.at).map_err(|error| error.noting(why.chain()))?;
        let endpoint = listener.endpoint();
        tracing::warn!(
            "listening again on {endpoint} for {limit:?}: the source goes on with its migration there"
        );
        recover::over_listener(&self.serving, &listener, limit, &self.crew)
            .map_err(|error| error.noting(why.chain()))
    }
}
