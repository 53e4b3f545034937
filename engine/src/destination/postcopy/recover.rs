//! A new link for a post-copy whose link is gone. Spec: docs/wire.md §15.4.

use std::sync::Arc;
use std::time::Duration;

use multifd_transports::{Arrival, Channel, Endpoint, Listener, SocketOptions, TlsServer};
use multifd_wire::{ItemType, MigrationId};

use super::serving::Serving;
use super::urgent;
use crate::destination::driver::Driver;
use crate::destination::return_path::ReturnPath;
use crate::destination::shared::DestinationShared;
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
        Ok(for_recovery(listener.tls(self.tls.clone())))
    }
}

/// Makes a listener wait for what a connection says of itself.
pub(super) fn for_recovery(listener: Listener) -> Arc<Listener> {
    let listener = listener
        .opening_len(|first| if MigrationId::is_begun_by(first) { MigrationId::OPENING_LEN } else { 0 });
    listener.keep_silent();
    Arc::new(listener)
}

/// A link that goes on begins with the id of the migration, or, if QEMU is the source, with a
/// command: RECV_BITMAP.
fn begins_recovery(first: [u8; 4]) -> bool {
    let [kind, high, ..] = first;
    (kind, high) == (ItemType::Command.byte(), 0) || MigrationId::is_begun_by(first)
}

/// Checks that the other end is the source of the guest that is here, as far as it says who it is:
/// QEMU's says nothing but names of blocks.
fn check_source(channel: &Channel, shared: &DestinationShared) -> Result<()> {
    let Some(expected) = shared.id() else { return Ok(()) };
    let mut first = [0; 4];
    let read = |into: &mut [u8]| {
        channel
            .recv_exact(into)
            .map_err(|error| Error::io(Phase::Setup, "the id of the migration", error).on(channel.peer()))
    };
    read(&mut first)?;
    let said = if MigrationId::is_begun_by(first) {
        let mut opening = [0; MigrationId::OPENING_LEN];
        let (begin, rest) = opening.split_at_mut(first.len());
        begin.copy_from_slice(&first);
        read(rest)?;
        MigrationId::of_opening(&opening)
    } else {
        None
    };
    let detail = match said {
        Some(id) if id == expected => return Ok(()),
        Some(_) => "the source of another guest, expected the one whose guest is here",
        None => "a source that does not say which migration it goes on with, as the one of this guest would",
    };
    Err(Error::misbehaved(Phase::Setup, detail).on(channel.peer()))
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
    let (driver, why) = serving.begin_recovery()?;
    serving.enter_recover_setup();
    let shared = serving.shared();
    let timeout = main.set_timeout(Some(shared.session.timeout));
    let checked = timeout.map_err(|error| Error::io(Phase::Setup, "setting up the socket", error));
    if let Err(error) = checked.and_then(|()| check_source(&main, shared)) {
        serving.end_recovery(driver, why);
        return Err(error.after_hand_over());
    }
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
        let shared = serving.shared();
        let fits = shared.check_client(&channel).and_then(|()| check_source(&channel, shared));
        let taken = fits.and_then(|()| {
            main.modify_and_notify(|main| {
                if std::mem::replace(&mut main.came, true) {
                    return Err(Error::misbehaved(Phase::Accept, "a second source for the recovery"));
                }
                main.channel = Some(channel);
                Ok(())
            })
        });
        if let Err(error) = taken {
            shared.refusals.note(&error);
        }
    });
    if let Err(error) = served {
        tracing::warn!(%error, "listening for a recovery");
    }
}
