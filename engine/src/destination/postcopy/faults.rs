//! The thread that hears of page faults: asks for a page once, and never touches guest memory.

use std::sync::Arc;

use super::serving::Serving;
use crate::destination::place::{Pager, Wanted};
use crate::error::{Error, ErrorKind, Phase, Result};
use crate::os::userfaultfd::MemoryEvent;
use crate::run::workers::Crew;

/// Says that nothing hears of faults any more, whatever ends the thread.
struct Stopping {
    serving: Arc<Serving>,
    pager: Arc<Pager>,
}

/// Starts it.
pub(super) fn start(serving: &Arc<Serving>, pager: &Arc<Pager>, crew: &Crew) -> Result<()> {
    let stopping = Stopping { serving: Arc::clone(serving), pager: Arc::clone(pager) };
    crew.spawn("mig-fault", Phase::Active, move || {
        let Stopping { serving, pager } = &stopping;
        if let Err(error) = run(serving, pager) {
            serving.break_for_good(error);
        }
        Ok(())
    })
}

fn run(serving: &Serving, pager: &Pager) -> Result<()> {
    // Faults that have to wait until the kernel's word on dropped pages was read.
    let mut later: Vec<MemoryEvent> = Vec::new();
    while let Some(events) = pager.events()? {
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
        self.pager.note_stopped();
        if std::thread::panicking() {
            let detail = "the thread that hears of page faults panicked";
            self.serving.break_for_good(Error::new(ErrorKind::Panicked, Phase::Active, detail));
        }
    }
}
