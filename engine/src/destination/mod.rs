//! The receiving end: any QEMU or multifd source moves its guest in here.
//!
//! ```text
//!  lobby ──── accepts connections in any order, tells main from channels
//!    ├─ main_channel ── header, commands, ram_section, tail      on the caller's thread
//!    └─ channel ×N ──── packets into guest memory                one thread each, `mig-recv`
//!         gate ──────── where SYNC on channels meets FLUSH on main
//!    └─ mapped ×N ─── pages at fixed places of a file            one thread each, `mig-recv-N`
//!         landing ───── the blocks, and how a page is written or cleared
//! ```

mod arrived;
mod channel;
mod gate;
mod landing;
mod lobby;
mod main_channel;
mod mapped;
mod ram_section;
mod return_path;
mod shared;
mod switchover;
mod tail;

use std::sync::Arc;
use std::time::Duration;

use multifd_codecs::Codecs;
use multifd_transports::{Channel, Endpoint, Listener, SocketOptions, TlsServer};

pub use arrived::Arrived;
pub use landing::IncomingRam;
pub use shared::DevicePacket;
pub use switchover::SwitchoverAck;

use crate::error::{Error, ErrorKind, Phase, Result};
use crate::session::{Canceller, DEFAULT_TIMEOUT, ProgressReader, Session};
use crate::state::MigrationState;
use crate::stream::StreamReader;
use crate::workers::Crew;
use lobby::Lobby;
use main_channel::MainChannel;
use mapped::PageReaders;
use return_path::ReturnPath;
use shared::Shared;

/// Settings of a [`Destination`]. Made by [`Destination::builder`].
pub struct DestinationBuilder {
    ram: Box<dyn IncomingRam>,
    codecs: Codecs,
    channels: Option<usize>,
    direct_io: bool,
    switchover_ack: SwitchoverAck,
    timeout: Duration,
    socket: SocketOptions,
    tls: Option<TlsServer>,
}

/// Listens for one migration.
pub struct Destination {
    listener: Arc<Listener>,
    session: Arc<Session>,
    settings: DestinationBuilder,
}

impl DestinationBuilder {
    /// The codecs that may come in. Default: none, zlib, zstd. Which one it is, the packets say.
    #[must_use]
    pub fn codecs(mut self, codecs: Codecs) -> Self {
        self.codecs = codecs;
        self
    }

    /// Insists on exactly so many parallel channels, and waits for all of them at the first sync point. Default: any number up
    /// to 255; those count that are there by then. Of a `mapped-ram` file: so many threads read it; default: one a core, up to 4.
    #[must_use]
    pub fn channels(mut self, channels: usize) -> Self {
        self.channels = Some(channels);
        self
    }

    /// Reads the pages of a `mapped-ram` file past the page cache (O_DIRECT); anything else that comes is refused then. The memory
    /// must begin at a multiple of the disk's block size. Default: no.
    #[must_use]
    pub fn direct_io(mut self, direct_io: bool) -> Self {
        self.direct_io = direct_io;
        self
    }

    /// When to acknowledge the switch-over unasked. Default: [`SwitchoverAck::Auto`].
    #[must_use]
    pub fn switchover_ack(mut self, ack: SwitchoverAck) -> Self {
        self.switchover_ack = ack;
        self
    }

    /// The longest silence in which the source is taken for alive: waiting for it to connect, for the next byte of the main
    /// stream, for the rest of a packet. Default: 60 s. A source that was paused by hand is silent.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// How the connections' sockets are tuned. Default: as for [`SourceBuilder`](crate::SourceBuilder).
    #[must_use]
    pub fn socket_options(mut self, options: SocketOptions) -> Self {
        self.socket = options;
        self
    }

    /// Takes sealed connections only, and refuses a source whose certificate does not verify. Default: plain ones only.
    /// Needs feature `tls-aws-lc` or `tls-ring`.
    #[must_use]
    pub fn tls(mut self, tls: TlsServer) -> Self {
        self.tls = Some(tls);
        self
    }

    /// Opens the listening socket. The source may connect from now on.
    ///
    /// # Errors
    /// `ApiMisuse` for a timeout of zero or channels over what is one channel, `Transport` if the address cannot be listened on.
    pub fn listen(self, endpoint: &Endpoint) -> Result<Destination> {
        if self.timeout.is_zero() {
            return Err(Error::new(ErrorKind::ApiMisuse, Phase::Accept, "timeout is 0, expected more"));
        }
        // Before a command is started or a file opened. What a descriptor is, shows when it is looked at.
        if !matches!(endpoint, Endpoint::Fd(_) | Endpoint::FdFrom(_)) {
            self.check_carrier(
                endpoint,
                endpoint.takes_several(),
                matches!(endpoint, Endpoint::File { .. }),
            )?;
        }
        let session = Session::new(self.timeout);
        let listener = Listener::bind_with(endpoint, &session.socket_options(&self.socket))
            .map_err(|error| Error::transport(Phase::Accept, error))?
            .tls(self.tls.clone());
        self.check_carrier(endpoint, listener.takes_several(), listener.reads_file())?;
        Ok(Destination { listener: Arc::new(listener), session, settings: self })
    }
}

impl DestinationBuilder {
    fn check_carrier(&self, endpoint: &Endpoint, takes_several: bool, is_file: bool) -> Result<()> {
        let misuse = |detail| Err(Error::new(ErrorKind::ApiMisuse, Phase::Accept, detail));
        if self.tls.is_some() && !takes_several {
            return misuse(format!("TLS over {endpoint}, expected tcp, unix or vsock"));
        }
        match self.channels {
            // Of a file they are threads, if its pages have fixed places; the stream says whether they do.
            Some(channels @ 1..) if !takes_several && !is_file => {
                misuse(format!("{channels} parallel channels over {endpoint}, which is one channel"))
            }
            _ => Ok(()),
        }
    }
}

impl Destination {
    /// A destination whose pages land in what `ram` provides.
    pub fn builder(ram: impl IncomingRam + 'static) -> DestinationBuilder {
        DestinationBuilder {
            ram: Box::new(ram),
            codecs: Codecs::default(),
            channels: None,
            direct_io: false,
            switchover_ack: SwitchoverAck::Auto,
            timeout: DEFAULT_TIMEOUT,
            socket: SocketOptions::default(),
            tls: None,
        }
    }

    /// Where it listens, with the port that the system chose if 0 was asked for.
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

    /// Waits for the source and receives the whole guest. All of RAM has landed when this returns; the source waits for
    /// [`Arrived::accept`].
    ///
    /// # Errors
    /// Anything that keeps the guest from arriving whole. The source has been told then, if it listens.
    pub fn receive(mut self) -> Result<Arrived> {
        self.session.enter(MigrationState::Setup)?;
        let crew = Arc::new(Crew::new(self.session.stop.clone()));
        let shared = Shared::new(&self.session, self.settings.codecs.clone(), self.settings.channels);
        let lobby = Lobby::new(&shared, &crew);
        let main = lobby.main();
        let listener = Arc::clone(&self.listener);
        let stopper = listener.stopper();
        self.session.stop.on_trip(move || stopper.stop());
        crew.spawn("mig-accept", Phase::Accept, move || lobby.run(&listener))?;

        let result = self.wait_for_main(&main).and_then(|main| self.run_main(main, &shared, &crew));
        match result {
            Ok((stream, return_path)) => {
                shared.gate.finish();
                Ok(Arrived::new(stream, return_path, shared, crew, self.listener))
            }
            Err(error) => {
                self.session.stop.trip(error);
                self.session.note_end_of_failed();
                crew.join();
                Err(self.session.stop.cause_or(Error::new(ErrorKind::Cancelled, Phase::Active, "stopped")))
            }
        }
    }

    fn wait_for_main(&self, main: &crate::stop::Monitor<Option<Channel>>) -> Result<Channel> {
        let patience = self.session.timeout;
        main.wait(&self.session.stop, Some(patience), Option::take).ok_or_else(|| {
            let detail = format!("no main channel on {} within {patience:?}", self.listener.endpoint());
            Error::new(ErrorKind::Deadline, Phase::Accept, detail)
        })
    }

    fn run_main(
        &mut self,
        channel: Channel,
        shared: &Arc<Shared>,
        crew: &Arc<Crew>,
    ) -> Result<(main_channel::MainStream, ReturnPath)> {
        let channel = self.session.adopt(channel, Phase::Setup)?;
        self.session.enter(MigrationState::Active)?;
        self.session.begin();
        let return_path = ReturnPath::new(Arc::clone(&channel));
        let (goodbye, closer) = (return_path.clone(), channel.closer());
        self.session.stop.on_trip(move || {
            goodbye.abort();
            closer.close();
        });
        let (ack, direct) = (self.settings.switchover_ack, self.settings.direct_io);
        let readers = PageReaders { crew: Arc::clone(crew), count: self.settings.channels, direct };
        let main = MainChannel::new(
            StreamReader::new(channel, &self.session),
            shared,
            return_path.clone(),
            ack,
            readers,
        );
        Ok((main.run(&mut *self.settings.ram)?, return_path))
    }
}
