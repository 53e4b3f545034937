//! What a destination that fails says last: why. It hangs up on all connections, and which end of
//! which of them shows first is chance.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use multifd_transports::Closer;

use crate::error::ErrorKind;
use crate::run::stop::{StopSwitch, lock};

/// How long main stays open for that when another connection has broken.
const GRACE: Duration = Duration::from_secs(1);

/// Whether the destination may still say something.
#[derive(Clone, Default)]
pub(in crate::source) struct LastWords(Arc<(Mutex<Reading>, Condvar)>);

#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Reading {
    /// Nothing reads what it says.
    #[default]
    Nothing,
    Reads,
}

/// Something reads what the destination says for as long as this lives.
pub(super) struct Listening(LastWords);

impl LastWords {
    /// Has main closed when `stop` trips: at once, or, where a connection has broken, when the
    /// destination has said its last.
    pub(in crate::source) fn close_behind(&self, main: Closer, stop: &StopSwitch) {
        let this = self.clone();
        stop.on_trip_of(move |stop| {
            if stop.look_at_cause(|cause| cause.kind() == ErrorKind::Transport) == Some(true) {
                this.wait(GRACE);
            }
            main.close();
        });
    }

    fn wait(&self, limit: Duration) {
        let (reading, changed) = &*self.0;
        let reads = |reading: &mut Reading| *reading == Reading::Reads;
        drop(changed.wait_timeout_while(lock(reading), limit, reads).unwrap_or_else(PoisonError::into_inner));
    }

    pub(super) fn listen(&self) -> Listening {
        self.set(Reading::Reads);
        Listening(self.clone())
    }

    fn set(&self, now: Reading) {
        let (reading, changed) = &*self.0;
        *lock(reading) = now;
        changed.notify_all();
    }
}

impl Listening {
    /// What it says from now on gives no guest back: nothing waits for it.
    pub(super) fn end(&self) {
        self.0.set(Reading::Nothing);
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        self.end();
    }
}
