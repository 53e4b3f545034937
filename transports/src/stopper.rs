//! Cancels pending dials and accepts.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::event::PollFlags;

use crate::os::event_loop::ready;
use crate::os::wake::Wake;

/// Ends a [`dial`](crate::dial) or a [`Listener::serve`](crate::Listener::serve) at once, from any
/// thread.
///
/// A latch: once stopped it stays so, and what starts later ends at once too. Clones share the
/// latch; one may serve any number of waits.
#[derive(Clone, Debug, Default)]
pub struct Stopper(Arc<Latch>);

#[derive(Debug, Default)]
struct Latch {
    stopped: AtomicBool,
    /// Made by the first wait.
    wake: Mutex<Option<Arc<Wake>>>,
}

impl Stopper {
    /// A stopper that has not been stopped.
    pub fn new() -> Self {
        Self::default()
    }

    /// Ends every wait that has this stopper. Never blocks.
    pub fn stop(&self) {
        // Before the look at the wake: a wait that makes it later sees that it need not begin.
        self.0.stopped.store(true, Ordering::SeqCst);
        if let Some(wake) = &*self.0.wake.lock().unwrap_or_else(PoisonError::into_inner) {
            wake.fire();
        }
    }

    /// Whether [`stop`](Self::stop) was called.
    pub fn is_stopped(&self) -> bool {
        self.0.stopped.load(Ordering::SeqCst)
    }

    /// Waits for [`stop`](Self::stop).
    pub(crate) async fn stopped(&self) -> io::Result<()> {
        if self.is_stopped() {
            return Ok(());
        }
        let wake = {
            let mut wake = self.0.wake.lock().unwrap_or_else(PoisonError::into_inner);
            match &*wake {
                Some(wake) => Arc::clone(wake),
                None => Arc::clone(wake.insert(Arc::new(Wake::new()?))),
            }
        };
        // Stopped since, without a wake to fire.
        if self.is_stopped() { Ok(()) } else { ready(&wake, PollFlags::IN).await }
    }
}
