//! The threads that hear of page faults: they ask for a page once, and never touch guest memory.

use std::sync::Arc;
use std::time::Duration;

use super::serving::Serving;
use crate::destination::place::{Pager, Wanted};
use crate::error::{Error, ErrorKind, Phase, Result};
use crate::os::userfaultfd::MemoryEvent;
use crate::run::workers::Crew;

/// Between two tries to serve a fault for which there is no memory: nothing says when there is.
pub(super) const TRY_AGAIN: Duration = Duration::from_millis(50);

/// Says that nothing hears of faults any more, whatever ends the thread.
struct Stopping {
    serving: Arc<Serving>,
    pager: Arc<Pager>,
    slice: usize,
}

/// Starts one for each slice of RAM.
pub(super) fn start(serving: &Arc<Serving>, pager: &Arc<Pager>, crew: &Crew) -> Result<()> {
    (0..pager.slices()).try_for_each(|slice| {
        let stopping = Stopping { serving: Arc::clone(serving), pager: Arc::clone(pager), slice };
        crew.spawn("mig-fault", Phase::Active, move || {
            let Stopping { serving, pager, slice } = &stopping;
            if let Err(error) = run(serving, pager, *slice) {
                serving.break_for_good(error);
            }
            Ok(())
        })
    })
}

fn run(serving: &Serving, pager: &Pager, slice: usize) -> Result<()> {
    // Faults that have to wait: until the kernel's word on dropped pages was read, or until there
    // is memory for them.
    let mut later: Vec<MemoryEvent> = Vec::new();
    let limit = |later: &[MemoryEvent]| (!later.is_empty()).then_some(TRY_AGAIN);
    while let Some(events) = pager.events(slice, limit(&later))? {
        let mut wanted = Vec::new();
        for event in std::mem::take(&mut later).into_iter().chain(events) {
            let MemoryEvent::Fault { address, thread } = event else { continue };
            let (ask, done) = pager.on_fault(address, thread)?;
            wanted.extend(ask);
            if !done {
                later.push(event);
            }
        }
        serving.ask(pager, &wanted);
    }
    Ok(())
}

impl Serving {
    /// Asks the source for pages. Without a link they are asked for when there is one again.
    pub(super) fn ask(&self, pager: &Pager, wanted: &[Wanted]) {
        for wanted in wanted {
            if !self.request(pager, wanted) {
                return;
            }
        }
    }
}

impl Drop for Stopping {
    fn drop(&mut self) {
        self.pager.note_stopped(self.slice);
        if std::thread::panicking() {
            let detail = "the thread that hears of page faults panicked";
            self.serving.break_for_good(Error::new(ErrorKind::Panicked, Phase::Active, detail));
        }
    }
}
