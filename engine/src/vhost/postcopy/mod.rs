//! Back-ends that fault on guest memory while it comes by post-copy. Rules: docs/vhost.md.
//!
//! ```text
//!  VhostPostcopy ── the back-ends of a guest that may come by post-copy    the embedder's handle
//!    ├─ BackEnd ── one through its messages; its userfaultfd
//!    ├─ Translation ── its addresses, and ours
//!    └─ Watch ── all userfaultfds, for one thread
//! ```

mod back_end;
mod translation;
mod watch;

use std::io;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

pub(super) use back_end::BackEnd;

use super::error::VhostError;
use super::region::{self, VhostRegion};
use super::user::VhostUser;
use crate::destination::sharing::{SharedFault, Sharing};
use crate::error::{Error, Phase, Result};
use crate::guest::Mappings;
use crate::run::stop::lock;
use watch::Watch;

/// The vhost-user back-ends of a guest that may come by post-copy: they fault on its memory as the
/// guest does, and are served with it. For one migration. Cheap to clone: a handle, for any thread.
///
/// ```text
///   VhostPostcopy::new, add            before the source comes
///   DestinationBuilder::vhost_postcopy
///   Destination::receive_live          ADVISE, LISTEN and the memory are said to each back-end
///   VhostDevice::load, start           rings run while pages are missing
///   PostcopyGuest::wait                END is said when the last page is here
/// ```
///
/// From [`Destination::receive_live`](crate::Destination::receive_live) up to the end of the
/// post-copy, the connection belongs to the engine: a `Frontend` of the embedder's must not use it.
#[derive(Clone, Debug)]
pub struct VhostPostcopy(Arc<Group>);

#[derive(Debug)]
struct Group {
    regions: Vec<VhostRegion>,
    /// Held while back-ends are told something; the thread that hears of faults takes it never.
    stage: Mutex<Stage>,
    back_ends: Mutex<Vec<Arc<BackEnd>>>,
    watch: Watch,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Idle,
    Advised,
    Listening,
    Over,
}

impl VhostPostcopy {
    /// No back-ends yet. `regions`: the guest memory that they get, as
    /// [`VhostDevices`](super::VhostDevices) has it.
    ///
    /// # Errors
    /// A region outside of its block, or overlaps another; or this process has no descriptors left.
    pub fn new(regions: Vec<VhostRegion>) -> std::result::Result<Self, VhostError> {
        region::check(&regions).map_err(VhostError::of_memory)?;
        let watch =
            Watch::new().map_err(|cause| VhostError::of_memory("watching page faults").because(cause))?;
        let (stage, back_ends) = (Mutex::new(Stage::Idle), Mutex::default());
        Ok(Self(Arc::new(Group { regions, stage, back_ends, watch })))
    }

    /// Adds the back-end of a device, also while the post-copy runs: then it takes part from now
    /// on. `user` goes into a [`VhostDevice`](super::VhostDevice) later.
    ///
    /// # Errors
    /// It is part of a post-copy already; or, while one runs, it cannot take part.
    pub fn add(&self, name: &str, user: &VhostUser) -> std::result::Result<(), VhostError> {
        let twice = || VhostError::of_device(name, "its back-end takes part in a post-copy already");
        let back_end = user.join_postcopy(name).ok_or_else(twice)?;
        let group = &self.0;
        let stage = lock(&group.stage);
        if matches!(*stage, Stage::Advised | Stage::Listening) {
            back_end.blocker(&group.regions)?;
            back_end.advise()?;
            group.watch.add(&back_end, group.all().len())?;
        }
        // Its first fault finds it here.
        group.all().push(Arc::clone(&back_end));
        if *stage == Stage::Listening {
            back_end.listen(&group.regions).inspect_err(|error| back_end.give_up(&error.chain()))?;
        }
        Ok(())
    }

    /// Why the guest cannot come by post-copy: back-ends that cannot wait for pages. A source that
    /// may switch is refused for these, before anything is said to any back-end.
    pub fn blockers(&self) -> Vec<VhostError> {
        let all = self.0.all();
        all.iter().filter_map(|back_end| back_end.blocker(&self.0.regions).err()).collect()
    }

    /// The back-ends that were lost to the post-copy, and why: they hung up, or broke the protocol.
    /// The guest's memory is whole nevertheless.
    pub fn failures(&self) -> Vec<VhostError> {
        self.0.all().iter().filter_map(|back_end| back_end.failure()).collect()
    }

    pub(crate) fn sharing(&self) -> Arc<dyn Sharing> {
        Arc::clone(&self.0) as Arc<dyn Sharing>
    }
}

impl Group {
    fn all(&self) -> MutexGuard<'_, Vec<Arc<BackEnd>>> {
        lock(&self.back_ends)
    }

    /// All of them, without a lock: they may wait for answers.
    fn each(
        &self,
        act: impl Fn(usize, &Arc<BackEnd>) -> std::result::Result<(), VhostError>,
    ) -> std::result::Result<(), VhostError> {
        let all = self.all().clone();
        all.iter().enumerate().try_for_each(|(index, back_end)| act(index, back_end))
    }
}

impl Sharing for Group {
    fn memory(&self) -> Vec<(u64, u64, String)> {
        let here = |region: &VhostRegion| (region.info().userspace_addr, region.len(), region.to_string());
        self.regions.iter().map(here).collect()
    }

    fn advise(&self) -> Result<()> {
        let mut stage = lock(&self.stage);
        let refused = |error: VhostError| {
            let detail = "the source may switch to postcopy, which a device here cannot follow: switch off capability \
                postcopy-ram at the source";
            Error::incompatible(Phase::Setup, detail).because(error)
        };
        if *stage != Stage::Idle {
            return Err(refused(VhostError::of_memory("its devices were part of a post-copy before")));
        }
        self.each(|_, back_end| back_end.blocker(&self.regions)).map_err(refused)?;
        *stage = Stage::Advised;
        self.each(|index, back_end| {
            back_end.advise()?;
            self.watch.add(back_end, index)
        })
        .map_err(refused)
    }

    fn listen(&self) -> Result<()> {
        let mut stage = lock(&self.stage);
        *stage = Stage::Listening;
        self.each(|_, back_end| back_end.listen(&self.regions)).map_err(|error| {
            let detail = "a device does not follow the guest into post-copy";
            Error::incompatible(Phase::Device, detail).because(error)
        })
    }

    fn faults(&self, limit: Option<Duration>) -> Result<Option<Vec<SharedFault>>> {
        let heard = self.watch.wait(limit, |index| self.all().get(index).cloned());
        heard.map_err(|error| Error::io(Phase::Active, "waiting for page faults of back-ends", error))
    }

    fn end(&self) {
        let mut stage = lock(&self.stage);
        if *stage == Stage::Over {
            return;
        }
        *stage = Stage::Over;
        let all = self.all().clone();
        for back_end in &all {
            if let Err(error) = back_end.end() {
                back_end.give_up(&error.chain());
            }
        }
        self.watch.stop();
        all.iter().for_each(|back_end| back_end.close_pages());
    }

    fn stop(&self) {
        self.watch.stop();
    }
}

/// Refuses memory that has missing pages to a back-end that does not fault on them: it would read
/// zeros.
pub(super) fn refuse_missing(regions: &[VhostRegion]) -> io::Result<()> {
    let mappings = Mappings::read_with_pagers()?;
    match regions.iter().find(|region| mappings.paged(region.block()).is_some()) {
        None => Ok(()),
        Some(region) => Err(io::Error::other(format!(
            "{region}: its pages are still coming by post-copy, and this back-end does not wait for them (VhostPostcopy::add)"
        ))),
    }
}
