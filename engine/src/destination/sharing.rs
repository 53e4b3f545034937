//! Other processes that have the guest's memory mapped, and fault on it while it comes by
//! post-copy: back-ends of vhost-user devices.
//!
//! ```text
//!  ADVISE ─> advise   LISTEN ─> listen   RUN ─> faults.. ─ page placed ─> SharedFault::wake   all of RAM is here ─> end
//! ```
#![cfg_attr(not(feature = "vhost"), expect(dead_code, reason = "only vhost devices share memory"))]

use std::sync::Arc;
use std::time::Duration;

use crate::error::Result;
use crate::guest::PAGE;

/// The processes that share the guest's memory, as a post-copy needs them.
pub(crate) trait Sharing: Send + Sync {
    /// The memory that is shared: address and length in this process, and what errors call it.
    fn memory(&self) -> Vec<(u64, u64, String)>;

    /// The source may switch to post-copy, and can still go back.
    ///
    /// # Errors
    /// A process cannot wait for pages.
    fn advise(&self) -> Result<()>;

    /// Pages follow the guest: what is mapped from now on has missing pages. The source can still
    /// go back; nothing is waited for that needs a page.
    ///
    /// # Errors
    /// A process does not follow.
    fn listen(&self) -> Result<()>;

    /// Waits for faults, for `limit` if there is one; `None` when it is over. What a process does
    /// wrong costs that process its pages, and is no error.
    ///
    /// # Errors
    /// Nothing can be heard any more.
    fn faults(&self, limit: Option<Duration>) -> Result<Option<Vec<SharedFault>>>;

    /// No page is missing any more: nothing faults when this has returned. Faults are heard until
    /// then, from another thread.
    fn end(&self);

    /// Ends the waits for faults: threads of other processes go on waiting for what has not come.
    fn stop(&self);
}

/// A process that shares the guest's memory.
pub(crate) trait SharingProcess: Send + Sync {
    /// What it is called in reports.
    fn name(&self) -> &str;

    /// The number of its threads that wait for a page has grown, or shrunk.
    fn note_waiting(&self, more: bool);

    /// The page at this address of the process's is not one that comes: it is zero unless it is
    /// there.
    fn fill(&self, at: u64);

    /// Wakes who waits for pages of this range of the process's own addresses.
    fn wake(&self, start: u64, len: u64);
}

/// A thread of another process that waits for a page.
pub(crate) struct SharedFault {
    /// Where the page is mapped in this process.
    here: u64,
    /// Where it is in the other one.
    there: u64,
    thread: u32,
    process: Arc<dyn SharingProcess>,
}

impl SharedFault {
    pub(crate) fn new(here: u64, there: u64, thread: u32, process: Arc<dyn SharingProcess>) -> Self {
        process.note_waiting(true);
        Self { here, there, thread, process }
    }

    /// Where the page is mapped in this process.
    pub(crate) fn here(&self) -> u64 {
        self.here
    }

    /// The memory is none that comes by post-copy.
    pub(crate) fn fill(&self) {
        self.process.fill(self.there & !(PAGE as u64 - 1));
    }

    /// What the process is called in reports.
    pub(crate) fn name(&self) -> &str {
        self.process.name()
    }

    /// True if `other` is of the same thread, as far as that can be told: not all processes say
    /// which of their threads it is.
    pub(crate) fn is_again(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.process, &other.process) && (self.there, self.thread) == (other.there, other.thread)
    }

    /// Wakes who waits there for the host page which is at this address here.
    pub(crate) fn wake(&self, host_page: u64, len: u64) {
        // A host page begins at or before the address that a thread has touched in it.
        let within = self.here.wrapping_sub(host_page);
        self.process.wake(self.there.wrapping_sub(within), len);
    }
}

impl Drop for SharedFault {
    fn drop(&mut self) {
        self.process.note_waiting(false);
    }
}
