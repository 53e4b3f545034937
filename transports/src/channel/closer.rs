//! Closes a channel from another thread.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{OnceLock, Weak};

use crate::channel::broken::Broken;
use crate::channel::stream::Stream;

/// Ends a [`Channel`](crate::Channel) from any thread: both directions are shut down, and calls
/// that are blocked on it return at once.
///
/// It does not keep the channel open: when the channel is dropped the peer sees the end, however
/// many closers are left, and they have nothing more to do.
#[derive(Clone, Debug)]
pub struct Closer {
    link: Weak<Link>,
}

impl Closer {
    pub(crate) fn new(link: Weak<Link>) -> Self {
        Self { link }
    }

    /// Closes the channel; a second time does nothing. Never blocks, but for a command to die that
    /// is killed: 2 s at most.
    pub fn close(&self) {
        if let Some(link) = self.link.upgrade() {
            link.closed.store(true, Ordering::Relaxed);
            link.stream.close();
        }
    }
}

/// What a channel and its closers share.
#[derive(Debug)]
pub(crate) struct Link {
    pub(crate) stream: Stream,
    /// Set before the stream is shut down. `Relaxed`: a thread that sees the shutdown got it
    /// through the kernel's socket lock, after this store.
    closed: AtomicBool,
    /// The system's error that ended the connection: the system gives it to one call only, see
    /// [`Broken`].
    pub(super) broken: OnceLock<Broken>,
}

impl Link {
    pub(crate) fn new(stream: Stream) -> Self {
        Self { stream, closed: AtomicBool::new(false), broken: OnceLock::new() }
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Relaxed)
    }
}
