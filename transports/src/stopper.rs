//! The wake for whoever waits for a connection.

use tokio::sync::watch;

/// Ends a [`dial`](crate::dial) or a [`Listener::serve`](crate::Listener::serve) at once, from any thread.
///
/// A latch: once stopped it stays so, and what starts later ends at once too. Clones share the latch; one may
/// serve any number of waits.
#[derive(Clone, Debug, Default)]
pub struct Stopper {
    stopped: watch::Sender<bool>,
}

impl Stopper {
    /// One that nobody has stopped yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Ends every wait that has this stopper. Never blocks.
    pub fn stop(&self) {
        self.stopped.send_replace(true);
    }

    /// Whether [`stop`](Self::stop) was called.
    pub fn is_stopped(&self) -> bool {
        *self.stopped.borrow()
    }

    /// Waits for [`stop`](Self::stop).
    pub async fn stopped(&self) {
        // It fails only when every sender is gone, and `self` is one.
        let _ = self.stopped.subscribe().wait_for(|stopped| *stopped).await;
    }
}
