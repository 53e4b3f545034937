//! A new link for a post-copy whose link is gone. Spec: docs/wire.md §15.4.

use std::sync::Arc;
use std::time::Duration;

use multifd_transports::{Arrival, Channel, Endpoint, Listener, SocketOptions, TlsServer};
use multifd_wire::{InitialPacket, ItemType, MULTIFD_MAGIC, MigrationId};

use super::serving::Serving;
use super::urgent;
use crate::destination::channels::accept::opening_len;
use crate::destination::channels::worker::ChannelWorker;
use crate::destination::driver::Driver;
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
    /// Nothing is accepted any more.
    over: bool,
}

/// Says, when it is dropped, that nothing is accepted any more: whatever has ended the thread.
struct NoteOver(Monitor<NewMain>);

impl Drop for NoteOver {
    fn drop(&mut self) {
        self.0.modify_and_notify(|main| main.over = true);
    }
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
    let listener = listener.opening_len(|first| {
        if MigrationId::is_begun_by(first) { MigrationId::OPENING_LEN } else { opening_len(first) }
    });
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
    let accepting = (Arc::clone(serving), Arc::clone(listener), NoteOver(main.clone()), Arc::clone(crew));
    let spawned = crew.spawn("mig-accept", Phase::Accept, move || {
        let (serving, listener, over, crew) = accepting;
        accept(&serving, &listener, &over.0, &crew);
        Ok(())
    });
    let came = spawned.and_then(|()| {
        let ended = |main: &mut NewMain| main.channel.take().map(Ok).or(main.over.then_some(Err(())));
        match main.wait(stop, Some(limit), ended) {
            Some(Ok(channel)) => Ok(channel),
            Some(Err(())) => {
                let detail = format!("{} takes no connection any more", listener.endpoint());
                Err(Error::new(ErrorKind::Transport, Phase::Accept, detail))
            }
            None => {
                let detail =
                    format!("no source for the recovery on {} within {limit:?}", listener.endpoint());
                Err(Error::new(ErrorKind::Deadline, Phase::Accept, detail))
            }
        }
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

/// Goes on over connections that the embedder has made: main, and others that say what they are.
pub(super) fn over_channels(
    serving: &Arc<Serving>,
    main: Channel,
    others: Vec<Channel>,
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
    if others.is_empty() {
        return Ok(());
    }
    let listener = for_recovery(Listener::of_connections(others, Endpoint::Fd(-1)));
    serving.shared().listen_to(Arc::clone(&listener));
    let came = NewMain { came: true, ..NewMain::default() };
    let main = Monitor::new(came, &serving.shared().session.stop);
    let accepting = (Arc::clone(serving), Arc::clone(crew));
    crew.spawn("mig-accept", Phase::Accept, move || {
        let (serving, crew) = accepting;
        accept(&serving, &listener, &main, &crew);
        Ok(())
    })
}

fn go_on(serving: &Arc<Serving>, mut driver: Box<Driver>, channel: Channel, crew: &Arc<Crew>) -> Result<()> {
    let session = &serving.shared().session;
    let adopted = session.adopt(channel, Phase::Setup).and_then(|channel| {
        session.counters.main.count_bytes_of(&channel);
        let return_path = serving.return_path().over(Arc::clone(&channel));
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

/// Main is the first that begins as a recovery does; the others say what they are once it is there.
fn accept(serving: &Arc<Serving>, listener: &Listener, main: &Monitor<NewMain>, crew: &Arc<Crew>) {
    let timeout = serving.shared().session.timeout;
    let served = listener.serve(4, timeout, &mut |arrival| {
        let Arrival::Identified { channel, first, .. } = arrival else { return };
        let taken = if begins_recovery(first) {
            take_main(channel, serving, main)
        } else if u32::from_be_bytes(first) == MULTIFD_MAGIC {
            take_channel(channel, serving, main, crew)
        } else {
            urgent::start(channel, serving.link_number(), serving.shared(), crew)
        };
        if let Err(error) = taken {
            serving.shared().refusals.note(&error);
        }
    });
    if let Err(error) = served {
        tracing::warn!(%error, "listening for a recovery");
    }
}

fn take_main(channel: Channel, serving: &Serving, main: &Monitor<NewMain>) -> Result<()> {
    let shared = serving.shared();
    shared.check_client(&channel)?;
    check_source(&channel, shared)?;
    main.modify_and_notify(|main| {
        if std::mem::replace(&mut main.came, true) {
            return Err(Error::misbehaved(Phase::Accept, "a second source for the recovery"));
        }
        main.channel = Some(channel);
        Ok(())
    })
}

/// A source connects its parallel channels when it has been told over main what has come.
fn take_channel(
    channel: Channel,
    serving: &Arc<Serving>,
    main: &Monitor<NewMain>,
    crew: &Arc<Crew>,
) -> Result<()> {
    let peer = channel.peer().to_owned();
    let refused = |detail| Err(Error::misbehaved(Phase::Accept, detail).on(peer.clone()));
    if !main.read(|main| main.came) {
        return refused("a parallel channel before the main channel of a recovery");
    }
    serving.shared().check_client(&channel)?;
    let mut bytes = [0; InitialPacket::LEN];
    channel
        .recv_exact(&mut bytes)
        .map_err(|error| Error::io(Phase::Accept, "the initial packet", error).on(peer.clone()))?;
    let hello = InitialPacket::parse(&bytes)
        .map_err(|invalid| Error::invalid(Phase::Accept, invalid).on(peer.clone()))?;
    let shared = serving.shared();
    shared.on_uuid(hello.uuid).map_err(|error| error.on(peer.clone()))?;
    let link =
        serving.add_recovered_channel(hello.channel, &channel).map_err(|error| error.on(peer.clone()))?;
    ChannelWorker::go_on(channel, hello.channel, link, shared, crew)
}
