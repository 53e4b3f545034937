//! A new link for a post-copy whose link broke: what has arrived is asked for, the rest goes again.

use std::sync::Arc;
use std::time::Duration;

use multifd_transports::{Channel, Endpoint};
use multifd_wire::Command;

use super::link::Link;
use super::{Postcopy, PreemptStyle};
use crate::error::{Error, ErrorKind, Phase, Result};
use crate::run::state::MigrationState;
use crate::run::stop::StopSwitch;
use crate::run::workers::Crew;
use crate::source::carrier::{Channels, SyncPoints};
use crate::source::main_writer::MainWriter;
use crate::source::return_path::received_pages::set_missing;
use crate::source::return_path::{LastWords, ReturnPathReader};

/// Where the connections of a recovery come from.
enum NewConnections<'a> {
    Dialled(&'a Endpoint, Duration),
    Own(OwnConnections),
}

/// The caller's.
struct OwnConnections {
    main: Channel,
    /// In the order of their numbers.
    channels: Vec<Channel>,
    urgent: Vec<Channel>,
}

/// The parallel channels of a link, and those for pages that are asked for.
type OtherChannels = (Option<Channels>, Vec<Arc<Channel>>);

/// The connections beside main.
enum Others<'a> {
    Dialled(&'a Endpoint),
    Own { channels: Vec<Channel>, urgent: Vec<Channel> },
}

impl Postcopy {
    /// Goes on over a new connection, on which the destination waits (QEMU: `migrate-recover`):
    /// asks for what has arrived, and has [`Postcopy::serve`], which must follow, send all else.
    /// Dials for `within`.
    ///
    /// # Errors
    /// What broke, and `ApiMisuse` if the migration is not paused. It stays paused, nothing is
    /// lost, and it may be called again.
    pub fn recover(&mut self, endpoint: &Endpoint, within: Duration) -> Result<()> {
        self.replace_link(NewConnections::Dialled(endpoint, within))
    }

    /// The same over connections that the caller has made: main, and one for pages that are asked
    /// for where the settings have that. Pages that are not asked for go on main.
    ///
    /// # Errors
    /// As [`Postcopy::recover`].
    pub fn recover_over(&mut self, main: Channel, urgent: Option<Channel>) -> Result<()> {
        self.recover_over_channels(main, Vec::new(), urgent.into_iter().collect())
    }

    /// The same with parallel channels, where there were some at the switch and the destination
    /// took pages on them after it: in the order of their numbers; and with several for pages that
    /// are asked for.
    ///
    /// # Errors
    /// As [`Postcopy::recover`], and `ApiMisuse` for more channels than there were.
    pub fn recover_over_channels(
        &mut self,
        main: Channel,
        channels: Vec<Channel>,
        urgent: Vec<Channel>,
    ) -> Result<()> {
        if channels.len() > self.channels {
            let detail = format!("{} parallel channels, expected at most {}", channels.len(), self.channels);
            return Err(Error::new(ErrorKind::ApiMisuse, Phase::Postcopy, detail).after_hand_over());
        }
        self.replace_link(NewConnections::Own(OwnConnections { main, channels, urgent }))
    }

    fn replace_link(&mut self, connections: NewConnections<'_>) -> Result<()> {
        let session = Arc::clone(&self.shared.session);
        if session.state() != MigrationState::PostcopyPaused {
            let detail = format!("the migration is {}, only a paused post-copy can recover", session.state());
            return Err(Error::new(ErrorKind::ApiMisuse, Phase::Postcopy, detail));
        }
        // First of all: from the next state on, the link can be cut.
        let stop = StopSwitch::default();
        self.control.set_link(&stop);
        session.enter(MigrationState::PostcopyRecoverSetup)?;
        let result = self.try_link(connections, stop);
        result.map_err(|error| {
            self.link = None;
            session.retire_closed_channels();
            match session.enter(MigrationState::PostcopyPaused) {
                Ok(()) => error.after_hand_over(),
                Err(bug) => bug,
            }
        })
    }

    fn try_link(&mut self, connections: NewConnections<'_>, stop: StopSwitch) -> Result<()> {
        let dialled = matches!(connections, NewConnections::Dialled(..));
        let (main, others) = match connections {
            NewConnections::Dialled(endpoint, within) => {
                (self.dialer.dial_within(endpoint, "main", &stop, within)?, Others::Dialled(endpoint))
            }
            NewConnections::Own(OwnConnections { main, channels, urgent }) => {
                (main, Others::Own { channels, urgent })
            }
        };
        let channel = self.dialer.adopt(main, &stop)?;
        self.shared.session.counters.main.count_bytes_of(&channel);
        let crew = Crew::new(stop.clone()).with_hook(self.dialer.hook.clone());
        let return_path = ReturnPathReader::start(
            Arc::clone(&channel),
            Arc::clone(&self.shared),
            &crew,
            &LastWords::default(),
        )?;
        self.shared.session.enter(MigrationState::PostcopyRecover)?;
        let mut main = MainWriter::new(channel, None);
        main.enter(Phase::Postcopy);
        let resumed =
            self.connect_others(&mut main, &return_path, others, (&stop, &crew)).and_then(|others| {
                main.command(Command::PostcopyResume)?;
                return_path.wait_for_resumed(self.shared.session.timeout)?;
                Ok(others)
            });
        let (resumed, channels, urgent) = match resumed {
            Ok((channels, urgent)) => (Ok(()), channels, urgent),
            Err(error) => (Err(error), None, Vec::new()),
        };
        let wanted = self.wanted(!urgent.is_empty(), dialled);
        let mut link = Link::recovered(main, return_path, crew, wanted, channels);
        if let Err(error) = resumed.and_then(|()| self.start_urgent(&mut link, urgent)) {
            return Err(link.end(error).cause);
        }
        self.shared.session.enter(MigrationState::PostcopyActive)?;
        self.recoveries += 1;
        self.link = Some(link);
        Ok(())
    }

    /// Asks what has arrived, and makes the connections beside main: the destination takes them
    /// once it has said that. But one of a machine type up to 7.2 answers nothing before it has its
    /// connection for pages that are asked for.
    fn connect_others(
        &self,
        main: &mut MainWriter,
        return_path: &ReturnPathReader,
        mut others: Others<'_>,
        (stop, crew): (&StopSwitch, &Crew),
    ) -> Result<OtherChannels> {
        let parallel = match &others {
            Others::Dialled(_) => self.channels,
            Others::Own { channels, .. } => channels.len(),
        };
        let urgent = self.settings.urgent(&self.shared, parallel > 0);
        let first = self.settings.preempt && self.settings.preempt_style == PreemptStyle::AtSetup;
        let early = if first { self.connect_urgent(&mut others, urgent, stop)? } else { Vec::new() };
        self.shared.id.get().map_or(Ok(()), |id| main.raw(&id.opening()))?;
        self.ask_what_has_arrived(main, return_path)?;
        let channels = self.connect_parallel(&mut others, stop, crew)?;
        let urgent = if first { early } else { self.connect_urgent(&mut others, urgent, stop)? };
        Ok((channels, urgent))
    }

    fn connect_urgent(
        &self,
        others: &mut Others<'_>,
        count: usize,
        stop: &StopSwitch,
    ) -> Result<Vec<Arc<Channel>>> {
        let name = "the channel for pages that are asked for";
        let urgent = match others {
            Others::Dialled(endpoint) => {
                (0..count).map(|_| self.dialer.dial(endpoint, name, stop)).collect::<Result<_>>()?
            }
            Others::Own { urgent, .. } => std::mem::take(urgent),
        };
        urgent.into_iter().take(count).map(|channel| self.dialer.adopt(channel, stop)).collect()
    }

    fn connect_parallel(
        &self,
        others: &mut Others<'_>,
        stop: &StopSwitch,
        crew: &Crew,
    ) -> Result<Option<Channels>> {
        let parallel = match others {
            Others::Dialled(endpoint) => {
                let dial = |id| self.dialer.dial(endpoint, &format!("channel {id}"), stop);
                (0..self.channels).map(dial).collect::<Result<_>>()?
            }
            Others::Own { channels, .. } => std::mem::take(channels),
        };
        if parallel.is_empty() {
            return Ok(None);
        }
        let channels = Channels::new(parallel.len(), SyncPoints::AtFlush, crew);
        for (id, channel) in (0..=u8::MAX).zip(parallel) {
            channels.restart(self.dialer.adopt(channel, stop)?, id, &self.shared, crew)?;
        }
        Ok(Some(channels))
    }

    /// All pages are dirty that the destination does not have.
    fn ask_what_has_arrived(&self, main: &mut MainWriter, return_path: &ReturnPathReader) -> Result<()> {
        let ram = &self.shared.ram;
        let mut bitmaps = Vec::with_capacity(ram.blocks.len());
        for (index, outgoing) in ram.blocks.indexed() {
            return_path.expect_bitmap(index);
            main.command(Command::RecvBitmap(outgoing.block.name().clone()))?;
            bitmaps.push((index, return_path.wait_for_bitmap(self.shared.session.timeout)?));
        }
        // All of them or none: what is asked for in vain leaves the bits as they were.
        for (index, received) in bitmaps {
            set_missing(&received, ram.dirty.at(index));
        }
        ram.host_pages.round_up();
        tracing::debug!(left = ram.host_pages.left(), "what has not arrived");
        Ok(())
    }
}
