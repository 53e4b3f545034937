//! All userfaultfds of back-ends, and their sockets, for one thread.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::back_end::BackEnd;
use crate::destination::sharing::SharedFault;
use crate::vhost::error::VhostError;

/// Events that are taken at a time.
const EVENTS: usize = 16;

/// What the thread waits for.
pub(super) struct Watch {
    epoll: Epoll,
    wake: EventFd,
    over: AtomicBool,
}

/// What an event is of, as the number that epoll keeps.
enum Token {
    Wake,
    /// Page faults of the back-end of this index.
    Faults(usize),
    /// Its socket: it hangs up.
    Socket(usize),
}

impl Token {
    fn number(&self) -> u64 {
        match self {
            Self::Wake => 0,
            Self::Faults(index) => 2 * *index as u64 + 1,
            Self::Socket(index) => 2 * *index as u64 + 2,
        }
    }

    fn of(number: u64) -> Self {
        let index = |number: u64| usize::try_from(number / 2).unwrap_or(usize::MAX);
        match number {
            0 => Self::Wake,
            odd if odd % 2 == 1 => Self::Faults(index(odd)),
            even => Self::Socket(index(even) - 1),
        }
    }
}

impl Watch {
    pub(super) fn new() -> io::Result<Self> {
        let watch =
            Self { epoll: Epoll::new()?, wake: EventFd::new(EFD_NONBLOCK)?, over: AtomicBool::new(false) };
        watch.watch(watch.wake.as_raw_fd(), EventSet::IN, &Token::Wake)?;
        Ok(watch)
    }

    /// Watches the back-end of this index from now on.
    pub(super) fn add(&self, back_end: &BackEnd, index: usize) -> Result<(), VhostError> {
        let Some(pages) = back_end.pages() else { return Ok(()) };
        self.watch(pages.as_raw_fd(), EventSet::IN, &Token::Faults(index))
            .and_then(|()| self.watch(back_end.socket(), EventSet::READ_HANG_UP, &Token::Socket(index)))
            .map_err(|cause| back_end.failed("watching its page faults").because(cause))
    }

    fn watch(&self, descriptor: RawFd, events: EventSet, token: &Token) -> io::Result<()> {
        self.epoll.ctl(ControlOperation::Add, descriptor, EpollEvent::new(events, token.number()))
    }

    fn forget(&self, back_end: &BackEnd) {
        let pages = back_end.pages();
        for descriptor in pages.iter().map(|pages| pages.as_raw_fd()).chain([back_end.socket()]) {
            // It may be gone already.
            let _ = self.epoll.ctl(ControlOperation::Delete, descriptor, EpollEvent::default());
        }
    }

    /// Waits for faults, for `limit` if there is one; `None` when it is over.
    pub(super) fn wait(
        &self,
        limit: Option<Duration>,
        back_end: impl Fn(usize) -> Option<Arc<BackEnd>>,
    ) -> io::Result<Option<Vec<SharedFault>>> {
        let limit = limit.map_or(-1, |limit| i32::try_from(limit.as_millis()).unwrap_or(i32::MAX));
        let mut events = [EpollEvent::default(); EVENTS];
        let count = match self.epoll.wait(limit, &mut events) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            count => count?,
        };
        if self.over.load(Ordering::Acquire) {
            return Ok(None);
        }
        let mut faults = Vec::new();
        for event in events.iter().take(count) {
            let (index, heard) = match Token::of(event.data()) {
                Token::Wake => continue,
                Token::Faults(index) => (index, true),
                Token::Socket(index) => (index, false),
            };
            let Some(back_end) = back_end(index) else { continue };
            let taken = match heard {
                true => back_end.take_faults(&mut faults),
                false => Err("the back-end closed the connection".to_owned()),
            };
            if let Err(why) = taken {
                back_end.give_up(&why);
                self.forget(&back_end);
            }
        }
        Ok(Some(faults))
    }

    /// Ends the wait, and all that come.
    pub(super) fn stop(&self) {
        self.over.store(true, Ordering::Release);
        // Fails only when the counter is full, which takes 2^64 - 2 calls.
        let _ = self.wake.write(1);
    }
}

impl std::fmt::Debug for Watch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Watch").finish_non_exhaustive()
    }
}
