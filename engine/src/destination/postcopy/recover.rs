//! A new link for a post-copy whose link is gone. Spec: docs/wire.md §15.4.

use std::sync::Arc;
use std::time::Duration;

use multifd_transports::{Arrival, Channel, Endpoint, Listener, SocketOptions, TlsServer};
use multifd_wire::ItemType;

use super::serving::Serving;
use super::urgent;
use crate::destination::driver::Driver;
use crate::destination::return_path::ReturnPath;
use crate::error::{Error, ErrorKind, Phase, Result};
use crate::run::stop::Monitor;
use crate::run::workers::Crew;
use crate::stream::MainReader;

/// How a destination listens for the source of its paused post-copy.
#[derive(Clone)]
pub(in crate::destination) struct Relisten {
    pub(in crate::destination) options: SocketOptions,
    pub(in crate::destination) tls: Option<TlsServer>,
}

/// What a recovery waits for.
#[derive(Default)]
struct NewMain {
    channel: Option<Channel>,
    came: bool,
}

impl Relisten {
    /// A listener for the new link.
    pub(in crate::destination) fn bind(&self, endpoint: &Endpoint) -> Result<Arc<Listener>> {
        let listener = Listener::bind_with(endpoint, &self.options)
            .map_err(|error| Error::transport(Phase::Accept, error).after_hand_over())?;
        let listener = listener.tls(self.tls.clone());
        listener.keep_silent();
        Ok(Arc::new(listener))
    }
}

/// A link that goes on begins with a command: RECV_BITMAP.
fn begins_recovery(first: [u8; 4]) -> bool {
    let [kind, high, ..] = first;
    (kind, high) == (ItemType::Command.byte(), 0)
}

/// Waits for the source on `listener`, for at most `limit`, and goes on over its connection.
pub(in crate::destination) fn over_listener(
    serving: &Arc<Serving>,
    listener: &Arc<Listener>,
    limit: Duration,
    crew: &Arc<Crew>,
) -> Result<()> {
    let (driver, why) = serving.begin_recovery()?;
    serving.enter_recover_setup();
    let stop = &serving.shared().session.stop;
    let main = Monitor::new(NewMain::default(), stop);
    serving.shared().listen_to(Arc::clone(listener));
    let accepting = (Arc::clone(serving), Arc::clone(listener), main.clone(), Arc::clone(crew));
    let spawned = crew.spawn("mig-accept", Phase::Accept, move || {
        let (serving, listener, main, crew) = accepting;
        accept(&serving, &listener, &main, &crew);
        Ok(())
    });
    let came = spawned.and_then(|()| {
        main.wait(stop, Some(limit), |main| main.channel.take()).ok_or_else(|| {
            let detail = format!("no source for the recovery on {} within {limit:?}", listener.endpoint());
            Error::new(ErrorKind::Deadline, Phase::Accept, detail)
        })
    });
    match came {
        Ok(channel) => go_on(serving, driver, channel, crew),
        Err(error) => {
            listener.close();
            listener.stopper().stop();
            serving.end_recovery(driver, why);
            Err(error.after_hand_over())
        }
    }
}

/// Goes on over connections that the embedder has made.
pub(super) fn over_channels(
    serving: &Arc<Serving>,
    main: Channel,
    urgent: Option<Channel>,
    crew: &Arc<Crew>,
) -> Result<()> {
    let (driver, _) = serving.begin_recovery()?;
    serving.enter_recover_setup();
    go_on(serving, driver, main, crew)?;
    urgent.map_or(Ok(()), |urgent| urgent::start(urgent, serving.shared(), crew))
}

fn go_on(serving: &Arc<Serving>, mut driver: Box<Driver>, channel: Channel, crew: &Arc<Crew>) -> Result<()> {
    let session = &serving.shared().session;
    let adopted = session.adopt(channel, Phase::Setup).and_then(|channel| {
        session.counters.main.count_bytes_of(&channel);
        let return_path = ReturnPath::new(Arc::clone(&channel));
        return_path.open();
        serving.replace_link(&return_path);
        driver.recover(MainReader::of_main(channel, session), return_path)?;
        session.retire_closed_channels();
        Ok(())
    });
    match adopted {
        Ok(()) => serving.start(driver, crew),
        Err(error) => {
            let error = Arc::new(error.after_hand_over());
            serving.end_recovery(driver, Arc::clone(&error));
            Err(Error::new(error.kind(), error.phase(), error.chain()).after_hand_over())
        }
    }
}

/// Main is the first that begins as a recovery does; another may carry urgent pages.
fn accept(serving: &Arc<Serving>, listener: &Listener, main: &Monitor<NewMain>, crew: &Arc<Crew>) {
    let timeout = serving.shared().session.timeout;
    let served = listener.serve(4, timeout, &mut |arrival| {
        let Arrival::Identified { channel, first, .. } = arrival else { return };
        if !begins_recovery(first) {
            if let Err(error) = urgent::start(channel, serving.shared(), crew) {
                serving.shared().refusals.note(&error);
            }
            return;
        }
        let refused = main.modify_and_notify(|main| {
            if std::mem::replace(&mut main.came, true) {
                return true;
            }
            main.channel = Some(channel);
            false
        });
        if refused {
            let detail = "a second source for the recovery";
            serving.shared().refusals.note(&Error::misbehaved(Phase::Accept, detail));
        }
    });
    if let Err(error) = served {
        tracing::warn!(%error, "listening for a recovery");
    }
}
