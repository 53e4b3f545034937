//! One back-end through a post-copy.
//!
//! ```text
//!  idle ─ POSTCOPY_ADVISE ─> advised ─ POSTCOPY_LISTEN ─> listening ─ SET_MEM_TABLE.. ─ POSTCOPY_END ─> over
//! ```

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, OnceLock};

use vhost::VhostUserMemoryRegionInfo;
use vhost::vhost_user::message::FrontendReq;

use super::translation::{Translation, answered};
use crate::destination::sharing::{SharedFault, SharingProcess};
use crate::os::userfaultfd::{ForeignPages, MemoryEvent};
use crate::run::stop::lock;
use crate::vhost::error::VhostError;
use crate::vhost::message::Connection;
use crate::vhost::region::VhostRegion;
use crate::vhost::user::{TABLE, infos, region_bytes, table};

/// A back-end that faults on the guest's memory.
///
/// A holder of `life` may wait for an answer of the back-end, and that for a page: the thread that
/// hears of faults takes it never.
#[derive(Debug)]
pub(in crate::vhost) struct BackEnd {
    name: String,
    connection: Arc<Connection>,
    /// PAGEFAULT is negotiated.
    faults: bool,
    life: Mutex<Life>,
    /// Its userfaultfd, while pages may be missing there.
    pages: Mutex<Option<Arc<ForeignPages>>>,
    mapped: Mutex<Translation>,
    /// Why it takes part no more.
    failure: OnceLock<String>,
}

#[derive(Debug)]
struct Life {
    stage: Stage,
    /// The memory that it was told of, as the message has it.
    table: Vec<Vec<u8>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Idle,
    Advised,
    Listening,
    Over,
}

impl BackEnd {
    pub(in crate::vhost) fn new(name: &str, connection: Arc<Connection>, faults: bool) -> Self {
        Self {
            name: name.to_owned(),
            connection,
            faults,
            life: Mutex::new(Life { stage: Stage::Idle, table: Vec::new() }),
            pages: Mutex::default(),
            mapped: Mutex::default(),
            failure: OnceLock::new(),
        }
    }

    /// Why it keeps a guest from coming by post-copy, if so. Nothing is sent for this.
    pub(super) fn blocker(&self, regions: &[VhostRegion]) -> Result<(), VhostError> {
        if !self.faults {
            let text = "cannot take part in a post-copy: VHOST_USER_PROTOCOL_F_PAGEFAULT is not negotiated with its back-end";
            return Err(self.failed(text));
        }
        if !(1..=TABLE).contains(&regions.len()) {
            let text = format!(
                "cannot take part in a post-copy: {} memory regions, which SET_MEM_TABLE has 1 to {TABLE} of",
                regions.len()
            );
            return Err(self.failed(text));
        }
        match infos(regions).iter().zip(regions).find(|(info, _)| info.mmap_handle < 0) {
            Some((_, region)) => Err(self.failed(format!("{region}: it is not shared with a file"))),
            None => Ok(()),
        }
    }

    /// POSTCOPY_ADVISE: the back-end makes a userfaultfd and hands it over.
    pub(super) fn advise(&self) -> Result<(), VhostError> {
        let mut life = lock(&self.life);
        if life.stage != Stage::Idle {
            return Err(self.failed("its connection was part of a post-copy before: it needs a new one"));
        }
        let failed = |cause: io::Error| self.failed("announcing a post-copy").because(cause);
        let descriptor = self.connection.ask_descriptor(FrontendReq::POSTCOPY_ADVISE).map_err(failed)?;
        let descriptor = descriptor.ok_or_else(|| {
            self.failed(
                "its back-end made no userfaultfd (which takes CAP_SYS_PTRACE, /dev/userfaultfd or \
                 vm.unprivileged_userfaultfd=1 there)",
            )
        })?;
        let pages = ForeignPages::new(descriptor)
            .map_err(|cause| self.failed("its answer to POSTCOPY_ADVISE").because(cause))?;
        *lock(&self.pages) = Some(Arc::new(pages));
        life.stage = Stage::Advised;
        Ok(())
    }

    /// POSTCOPY_LISTEN, and the memory. The source sends no page before this has returned: nothing
    /// is waited for that may need one.
    pub(super) fn listen(&self, regions: &[VhostRegion]) -> Result<(), VhostError> {
        let mut life = lock(&self.life);
        let told = self.connection.tell(FrontendReq::POSTCOPY_LISTEN, &[], &[]);
        told.map_err(|cause| self.failed("telling it that post-copy begins").because(cause))?;
        life.stage = Stage::Listening;
        self.share(&mut life, regions)
            .map_err(|cause| self.failed("sharing memory that comes by post-copy").because(cause))
    }

    /// Has it know these regions as memory whose pages come, if that is where it stands. False: it
    /// is not.
    pub(in crate::vhost) fn shares(&self, regions: &[VhostRegion]) -> io::Result<bool> {
        let mut life = lock(&self.life);
        match life.stage {
            Stage::Idle => Ok(false),
            Stage::Advised => {
                let text = "the source may still switch to post-copy: the back-end gets its memory when that is known";
                Err(io::Error::other(text))
            }
            Stage::Listening => {
                self.share(&mut life, regions)?;
                // What is said in answer to this comes after the memory is in use.
                self.connection.ask_u64(FrontendReq::GET_FEATURES)?;
                Ok(true)
            }
            Stage::Over => Ok(life.table == rows(&infos(regions))),
        }
    }

    /// SET_MEM_TABLE: its bases are known before it may touch what is there.
    fn share(&self, life: &mut Life, regions: &[VhostRegion]) -> io::Result<()> {
        let regions = infos(regions);
        let rows = rows(&regions);
        if life.table == rows {
            return Ok(());
        }
        let request = FrontendReq::SET_MEM_TABLE;
        let (body, descriptors) = table(&regions).map_err(io::Error::other)?;
        let answer = self.connection.ask(request, &body, &descriptors)?;
        let mapped = answered(&regions, &answer).map_err(|wrong| {
            let wrong = format!("its answer to SET_MEM_TABLE has {wrong}");
            // It waits for our confirmation, and would take anything else for that.
            self.connection.break_off(&wrong);
            io::Error::new(io::ErrorKind::InvalidData, wrong)
        })?;
        lock(&self.mapped).add(mapped);
        life.table = rows;
        self.connection.say(request, &0_u64.to_ne_bytes())
    }

    /// POSTCOPY_END: when this has returned, it faults no more.
    pub(super) fn end(&self) -> Result<(), VhostError> {
        let mut life = lock(&self.life);
        let stage = std::mem::replace(&mut life.stage, Stage::Over);
        // An error that was told is not told twice.
        if !matches!(stage, Stage::Advised | Stage::Listening) || self.failure().is_some() {
            return Ok(());
        }
        let tell = |request| self.connection.tell(request, &[], &[]);
        // Back-ends of the crate vhost-user-backend refuse an end without a beginning.
        let begun = if stage == Stage::Advised { tell(FrontendReq::POSTCOPY_LISTEN) } else { Ok(()) };
        begun
            .and_then(|()| tell(FrontendReq::POSTCOPY_END))
            .map_err(|cause| self.failed("telling it that post-copy is over").because(cause))
    }

    /// Pages are missing in its memory, or will be.
    pub(in crate::vhost) fn is_listening(&self) -> bool {
        lock(&self.life).stage == Stage::Listening
    }

    /// Its userfaultfd.
    pub(super) fn pages(&self) -> Option<Arc<ForeignPages>> {
        lock(&self.pages).clone()
    }

    /// Closes its userfaultfd here.
    pub(super) fn close_pages(&self) {
        *lock(&self.pages) = None;
    }

    /// The descriptor by which it is seen to hang up.
    pub(super) fn socket(&self) -> RawFd {
        self.connection.as_raw_fd()
    }

    /// The faults since the last call, by addresses of this process; an error is the end of it.
    pub(super) fn take_faults(self: &Arc<Self>, into: &mut Vec<SharedFault>) -> Result<(), String> {
        let Some(pages) = self.pages() else { return Ok(()) };
        let mut events = Vec::new();
        pages.read(&mut events).map_err(|error| format!("reading its page faults: {error}"))?;
        let mapped = lock(&self.mapped);
        for event in events {
            match event {
                MemoryEvent::Fault { address, thread } => {
                    let here = mapped.here(address).ok_or_else(|| outside(address, &mapped))?;
                    let process = Arc::clone(self) as Arc<dyn SharingProcess>;
                    into.push(SharedFault::new(here, address, thread, process));
                }
                // What it drops of its mapping, the file keeps; if it drops that of the file, we
                // hear of it where it is a page that has come, and else fill it.
                MemoryEvent::Removed { .. } => {}
                MemoryEvent::Other(kind) => {
                    return Err(format!("event {kind:#x} of its userfaultfd, expected page faults"));
                }
            }
        }
        Ok(())
    }

    /// It takes part no more, and why: its threads wait for pages as long as its process lives.
    pub(super) fn give_up(&self, why: &str) {
        if self.failure.set(why.to_owned()).is_ok() {
            tracing::warn!("vhost device {}: lost to the post-copy: {why}", self.name);
            self.connection.break_off(why);
        }
    }

    /// Why it takes part no more.
    pub(super) fn failure(&self) -> Option<VhostError> {
        self.failure.get().map(|why| self.failed(format!("lost to the post-copy: {why}")))
    }

    pub(super) fn failed(&self, doing: impl Into<String>) -> VhostError {
        VhostError::of_device(&self.name, doing)
    }
}

impl SharingProcess for BackEnd {
    fn name(&self) -> &str {
        &self.name
    }

    fn note_waiting(&self, more: bool) {
        self.connection.note_page_wait(more);
    }

    fn fill(&self, at: u64) {
        let Some(pages) = self.pages() else { return };
        if let Err(error) = pages.zero(at) {
            self.give_up(&format!("a fault at {at:#x}, on memory that does not come by post-copy: {error}"));
        }
    }

    fn wake(&self, start: u64, len: u64) {
        let Some(pages) = self.pages() else { return };
        if let Err(error) = pages.wake(start, len) {
            self.give_up(&format!("waking its threads at {start:#x}: {error}"));
        }
    }
}

fn rows(regions: &[VhostUserMemoryRegionInfo]) -> Vec<Vec<u8>> {
    regions.iter().map(region_bytes).collect()
}

fn outside(address: u64, mapped: &Translation) -> String {
    format!(
        "a page fault at {address:#x}, outside of what it has mapped ({}): the thread waits for ever, end its process",
        mapped.describe()
    )
}
