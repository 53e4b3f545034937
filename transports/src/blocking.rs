//! The same for callers without a tokio runtime.

use std::io;
use std::time::Duration;

use tokio::runtime::{Builder, Runtime};

use crate::{Channel, DialOptions, Endpoint, TransportError};

/// [`dial`](crate::dial), on the caller's thread.
///
/// # Errors
/// As [`dial`](crate::dial).
///
/// # Panics
/// On a thread that drives a tokio runtime: await [`dial`](crate::dial) there.
pub fn dial(endpoint: &Endpoint, options: &DialOptions) -> Result<Channel, TransportError> {
    let runtime = runtime().map_err(|source| TransportError::Io {
        action: "connect to",
        endpoint: endpoint.clone(),
        elapsed: Duration::ZERO,
        source,
    })?;
    let outcome = runtime.block_on(crate::dial(endpoint, options));
    // A plain drop would wait for a name look-up that hangs, deadline or not.
    runtime.shutdown_background();
    outcome
}

/// A runtime for one thread and one wait.
pub(crate) fn runtime() -> io::Result<Runtime> {
    Builder::new_current_thread().enable_all().build()
}
