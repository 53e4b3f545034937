//! Connections of a source, also those that are made while it runs.

use std::sync::Arc;
use std::time::Duration;

use multifd_transports::{
    Channel, DialOptions, Endpoint, SocketOptions, Stopper, ThreadHook, TlsClient, dial,
};

use crate::error::{Error, Phase, Remedy, Result};
use crate::run::session::Session;
use crate::run::stop::StopSwitch;
use crate::source::return_path::LastWords;

/// What every connection of a migration is made with.
pub(super) struct Dialer {
    pub(super) session: Arc<Session>,
    pub(super) socket: SocketOptions,
    pub(super) tls: Option<TlsClient>,
    pub(super) hook: ThreadHook,
    /// Where main was dialled to. `None`: the caller made the connections.
    pub(super) endpoint: Option<Endpoint>,
}

impl Dialer {
    /// Dials for the timeout, or until `stop` trips. `name` is what errors call the connection.
    pub(super) fn dial(&self, endpoint: &Endpoint, name: &str, stop: &StopSwitch) -> Result<Channel> {
        self.dial_within(endpoint, name, stop, self.session.timeout)
    }

    /// The same for as long as `deadline`.
    pub(super) fn dial_within(
        &self,
        endpoint: &Endpoint,
        name: &str,
        stop: &StopSwitch,
        deadline: Duration,
    ) -> Result<Channel> {
        dial(endpoint, &self.options(deadline, stop)).map_err(|error| {
            // Main was taken: a destination that takes no more is set up for fewer.
            let remedy = (name != "main").then_some(Remedy::CompareSettings);
            Error::transport(Phase::Connect, error).on(name.to_owned()).remedied_by(remedy)
        })
    }

    /// What ends when `stop` trips, if it waits until then.
    pub(super) fn options(&self, deadline: Duration, stop: &StopSwitch) -> DialOptions {
        let stopper = Stopper::new();
        let options = DialOptions {
            deadline,
            stopper: stopper.clone(),
            socket: self.session.socket_options(&self.socket),
            tls: self.tls.clone(),
            thread_hook: self.hook.clone(),
        };
        stop.on_trip(move || stopper.stop());
        options
    }

    /// Makes main part of the migration. It is closed when the migration is stopped, but not before
    /// a destination that fails has said why, if it does.
    pub(super) fn adopt_main(&self, channel: Channel, last_words: &LastWords) -> Result<Arc<Channel>> {
        let channel = self.session.adopt(channel, Phase::Connect)?;
        last_words.close_behind(channel.closer(), &self.session.stop);
        Ok(channel)
    }

    /// Makes a connection part of the migration; it is closed when `stop` trips.
    pub(super) fn adopt(&self, channel: Channel, stop: &StopSwitch) -> Result<Arc<Channel>> {
        let channel = self.session.adopt(channel, Phase::Connect)?;
        let closer = channel.closer();
        stop.on_trip(move || closer.close());
        Ok(channel)
    }
}
