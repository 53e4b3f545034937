//! The thread that hears of the page faults of other processes, however many those are.

use std::sync::Arc;

use super::faults::TRY_AGAIN;
use super::serving::Serving;
use crate::destination::place::Pager;
use crate::destination::sharing::{SharedFault, Sharing};
use crate::error::{Error, ErrorKind, Phase, Result};
use crate::run::workers::Crew;

/// Says that nothing hears of these faults any more, if the thread panics.
struct Stopping(Arc<Serving>);

/// Starts it, if memory is shared.
pub(super) fn start(serving: &Arc<Serving>, pager: &Arc<Pager>, crew: &Crew) -> Result<()> {
    let Some(sharing) = serving.shared().sharing.clone() else { return Ok(()) };
    let (stopping, pager) = (Stopping(Arc::clone(serving)), Arc::clone(pager));
    crew.spawn("mig-fault-vhost", Phase::Active, move || {
        if let Err(error) = run(&stopping.0, &pager, &*sharing) {
            stopping.0.break_for_good(error);
        }
        Ok(())
    })
}

/// Never waits for an answer of a process: its thread that would give it may be the one that waits
/// for a page.
fn run(serving: &Serving, pager: &Pager, sharing: &dyn Sharing) -> Result<()> {
    // What has to wait until the kernel's word on dropped pages was read, or until there is memory.
    let mut later: Vec<SharedFault> = Vec::new();
    while let Some(faults) = sharing.faults((!later.is_empty()).then_some(TRY_AGAIN))? {
        let mut wanted = Vec::new();
        for fault in std::mem::take(&mut later).into_iter().chain(faults) {
            let (ask, again) = pager.on_shared_fault(fault)?;
            wanted.extend(ask);
            later.extend(again);
        }
        serving.ask(pager, &wanted);
    }
    Ok(())
}

impl Drop for Stopping {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let detail = "the thread that hears of other processes' page faults panicked";
            self.0.break_for_good(Error::new(ErrorKind::Panicked, Phase::Active, detail));
        }
    }
}
