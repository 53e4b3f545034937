//! A new link for a post-copy whose link broke: what has arrived is asked for, the rest goes again.

use std::sync::Arc;
use std::time::Duration;

use multifd_transports::{Channel, Endpoint};
use multifd_wire::Command;

use super::Postcopy;
use super::link::Link;
use crate::error::{Error, ErrorKind, Phase, Result};
use crate::run::state::MigrationState;
use crate::run::stop::StopSwitch;
use crate::run::workers::Crew;
use crate::source::main_writer::MainWriter;
use crate::source::return_path::ReturnPathReader;
use crate::source::return_path::received_pages::set_missing;

/// Where the connections of a recovery come from.
enum NewConnections<'a> {
    Dialled(&'a Endpoint, Duration),
    Own(Channel, Option<Channel>),
}

impl Postcopy {
    /// Goes on over a new connection, on which the destination waits (QEMU: `migrate-recover`): asks for what has arrived, and
    /// has [`Postcopy::serve`], which must follow, send all else. Dials for `within`.
    ///
    /// # Errors
    /// What broke, and `ApiMisuse` if the migration is not paused. It stays paused, nothing is lost, and it may be called again.
    pub fn recover(&mut self, endpoint: &Endpoint, within: Duration) -> Result<()> {
        self.replace_link(NewConnections::Dialled(endpoint, within))
    }

    /// The same over connections that the caller has made: main, and one for pages that are asked for where the settings have
    /// that.
    ///
    /// # Errors
    /// As [`Postcopy::recover`].
    pub fn recover_over(&mut self, main: Channel, urgent: Option<Channel>) -> Result<()> {
        self.replace_link(NewConnections::Own(main, urgent))
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
        let (main, urgent) = match connections {
            NewConnections::Dialled(endpoint, within) => {
                (self.dialer.dial_within(endpoint, "main", &stop, within)?, Err(endpoint))
            }
            NewConnections::Own(main, urgent) => (main, Ok(urgent)),
        };
        let channel = self.dialer.adopt(main, &stop)?;
        self.shared.session.counters.main.count_bytes_of(&channel);
        let crew = Crew::new(stop.clone()).with_hook(self.dialer.hook.clone());
        let return_path = ReturnPathReader::start(Arc::clone(&channel), Arc::clone(&self.shared), &crew)?;
        self.shared.session.enter(MigrationState::PostcopyRecover)?;
        let mut main = MainWriter::new(channel, None);
        main.enter(Phase::Postcopy);
        let said = self.shared.id.get().map_or(Ok(()), |id| main.raw(&id.opening()));
        let resumed = said.and_then(|()| self.ask_what_has_arrived(&mut main, &return_path)).and_then(|()| {
            let urgent = match urgent {
                _ if !self.settings.preempt => None,
                Ok(own) => own,
                Err(endpoint) => {
                    Some(self.dialer.dial(endpoint, "the channel for pages that are asked for", &stop)?)
                }
            };
            let urgent = urgent.map(|channel| self.dialer.adopt(channel, &stop)).transpose()?;
            main.command(Command::PostcopyResume)?;
            return_path.wait_for_resumed(self.shared.session.timeout)?;
            Ok(urgent)
        });
        let mut link = Link::recovered(main, return_path, crew);
        let urgent = match resumed {
            Ok(urgent) => urgent,
            Err(error) => return Err(link.end(error).cause),
        };
        if let Some(channel) = urgent {
            link.start_urgent(channel, self.settings.preempt_style, self.place, &self.shared)?;
        }
        self.shared.session.enter(MigrationState::PostcopyActive)?;
        self.recoveries += 1;
        self.link = Some(link);
        Ok(())
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
