//! A new link for a post-copy whose link is gone. Spec: docs/wire.md §15.4.

use std::sync::Arc;
use std::time::Duration;

use multifd_transports::{Arrival, Channel, Endpoint, Listener, SocketOptions, TlsServer};
use multifd_wire::{InitialPacket, ItemType, MULTIFD_MAGIC};

use super::serving::Serving;
use super::urgent;
use crate::destination::channels::accept::opening_len;
use crate::destination::channels::worker::ChannelWorker;
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
    /// By which its client has authenticated itself.
    certificate: Option<Vec<u8>>,
}

impl Relisten {
    /// A listener for the new link.
    pub(in crate::destination) fn bind(&self, endpoint: &Endpoint) -> Result<Arc<Listener>> {
        let listener = Listener::bind_with(endpoint, &self.options)
            .map_err(|error| Error::transport(Phase::Accept, error).after_hand_over())?;
        let listener = listener.tls(self.tls.clone()).opening_len(opening_len);
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

/// Goes on over connections that the embedder has made: main, and others that say what they are.
pub(super) fn over_channels(
    serving: &Arc<Serving>,
    main: Channel,
    others: Vec<Channel>,
    crew: &Arc<Crew>,
) -> Result<()> {
    let (driver, _) = serving.begin_recovery()?;
    serving.enter_recover_setup();
    go_on(serving, driver, main, crew)?;
    if others.is_empty() {
        return Ok(());
    }
    let ready = Listener::of_connections(others, Endpoint::Fd(-1)).opening_len(opening_len);
    ready.keep_silent();
    let listener = Arc::new(ready);
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
        let return_path = ReturnPath::new(Arc::clone(&channel));
        return_path.open();
        serving.replace_link(&return_path);
        driver.recover(MainReader::of_main(channel, session), return_path)
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
            take_main(channel, main)
        } else if u32::from_be_bytes(first) == MULTIFD_MAGIC {
            take_channel(channel, serving, main, crew)
        } else {
            urgent::start(channel, serving.shared(), crew)
        };
        if let Err(error) = taken {
            serving.shared().refusals.note(&error);
        }
    });
    if let Err(error) = served {
        tracing::warn!(%error, "listening for a recovery");
    }
}

fn take_main(channel: Channel, main: &Monitor<NewMain>) -> Result<()> {
    main.modify_and_notify(|main| {
        if std::mem::replace(&mut main.came, true) {
            return Err(Error::misbehaved(Phase::Accept, "a second source for the recovery"));
        }
        main.certificate = channel.client_certificate().map(<[u8]>::to_vec);
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
    let (came, same) = main.read(|main| {
        let certificate = main.certificate.as_deref();
        (main.came, certificate.is_none() || certificate == channel.client_certificate())
    });
    if !came {
        return refused("a parallel channel before the main channel of a recovery");
    }
    if !same {
        return refused("a channel with another certificate than that of main: it is another source's");
    }
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
