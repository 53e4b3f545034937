//! What can go wrong before there is a channel.

use std::io;
use std::time::Duration;

use thiserror::Error;

use crate::Endpoint;

/// The error of a connection or a listener that could not be made.
///
/// The calls of a connected [`Channel`](crate::Channel) fail with plain [`io::Error`]s.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum TransportError {
    /// A [`Stopper`](crate::Stopper) ended the wait.
    #[error("{action} {endpoint}: stopped after {elapsed:.1?}")]
    Cancelled {
        /// What was being done: "connect to".
        action: &'static str,
        /// Where.
        endpoint: Endpoint,
        /// How long it had lasted.
        elapsed: Duration,
    },
    /// The other side was not there in time.
    #[error("{action} {endpoint}: gave up after {elapsed:.1?} and {attempts} attempts, limit is {limit:.1?}")]
    DeadlinePassed {
        /// What was being done: "connect to".
        action: &'static str,
        /// Where.
        endpoint: Endpoint,
        /// How many attempts had failed or were under way.
        attempts: u32,
        /// How long it had lasted.
        elapsed: Duration,
        /// How long it was allowed to last.
        limit: Duration,
        /// Why the last complete attempt failed.
        source: io::Error,
    },
    /// The system refused, and repeating would not help.
    #[error("{action} {endpoint}, after {elapsed:.1?}")]
    Io {
        /// What was being done: "connect to", "listen on", "accept on".
        action: &'static str,
        /// Where.
        endpoint: Endpoint,
        /// How long it had lasted.
        elapsed: Duration,
        /// The system's answer.
        source: io::Error,
    },
}

impl TransportError {
    /// Whether a [`Stopper`](crate::Stopper) caused it: a cancel, and no fault.
    pub fn is_cancelled(&self) -> bool {
        matches!(self, Self::Cancelled { .. })
    }

    /// The endpoint that it is about.
    pub fn endpoint(&self) -> &Endpoint {
        match self {
            Self::Cancelled { endpoint, .. }
            | Self::DeadlinePassed { endpoint, .. }
            | Self::Io { endpoint, .. } => endpoint,
        }
    }
}
