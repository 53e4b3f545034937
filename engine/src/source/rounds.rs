//! How the main thread hands a round to the workers, and learns that all of them are through.

use std::sync::Arc;

use multifd_wire::BlockRef;

use super::postcopy::Bulk;
use crate::error::{Error, Phase, Result};
use crate::run::stop::{Monitor, StopSwitch};
use crate::work::{BlockIndex, Round};

/// Which round a page goes out in.
#[derive(Clone, Copy, Debug)]
pub(super) struct RoundContext {
    /// The round, from 1. In the first, no page goes out as a difference.
    pub(super) round: u64,
    /// The guest is stopped: no page goes out again.
    pub(super) last: bool,
}

/// Zero pages of one block, found by a worker, to be announced on the main channel.
#[derive(Debug)]
pub(super) struct ZeroReport {
    pub(super) block: BlockIndex,
    pub(super) offsets: Vec<u64>,
}

/// Zero-page reports, of at most one batch each, that may wait for the main thread: 1024 of 1 KiB.
const MAX_REPORTS: usize = 1024;

/// The rounds that the main thread hands to its workers.
#[derive(Clone)]
pub(super) struct Rounds {
    state: Monitor<State>,
    stop: StopSwitch,
    workers: usize,
}

#[derive(Default)]
struct State {
    /// The round under way, or the last one.
    number: u64,
    job: Option<Job>,
    /// Workers whose SYNC of this round is out.
    done: usize,
    reports: Vec<ZeroReport>,
    closing: bool,
}

/// What the main thread has handed out.
enum Job {
    Round(Arc<Round>, RoundContext),
    Bulk(Arc<Bulk>),
}

/// What a worker does next.
pub(super) enum Work {
    /// Send the pages of a round, then SYNC.
    Round { number: u64, round: Arc<Round>, context: RoundContext },
    /// Send the background stream of a post-copy.
    Bulk { bulk: Arc<Bulk> },
    /// The migration is complete: end the channel.
    Close,
}

impl Rounds {
    pub(super) fn new(stop: &StopSwitch, workers: usize) -> Self {
        Self { state: Monitor::new(State::default(), stop), stop: stop.clone(), workers }
    }

    pub(super) fn workers(&self) -> usize {
        self.workers
    }

    /// Main: starts a round, passes on the zero pages that workers find, returns when every SYNC is
    /// out.
    pub(super) fn run(
        &self,
        round: Round,
        context: RoundContext,
        mut on_zero: impl FnMut(ZeroReport) -> Result<()>,
    ) -> Result<()> {
        self.state.modify_and_notify(|state| {
            state.number += 1;
            state.job = Some(Job::Round(Arc::new(round), context));
            state.done = 0;
        });
        loop {
            let (reports, done) = self.wait(|state| {
                let done = state.done == self.workers;
                (done || !state.reports.is_empty()).then(|| (std::mem::take(&mut state.reports), done))
            })?;
            // Workers that wait for room among the reports.
            self.state.notify();
            reports.into_iter().try_for_each(&mut on_zero)?;
            if done {
                return Ok(());
            }
        }
    }

    /// Main: starts the background stream of a post-copy, and returns at once.
    pub(super) fn start_bulk(&self, bulk: &Arc<Bulk>) {
        self.state.modify_and_notify(|state| {
            state.number += 1;
            state.job = Some(Job::Bulk(Arc::clone(bulk)));
        });
    }

    /// Main: lets the workers end their channels.
    pub(super) fn close(&self) {
        self.state.modify_and_notify(|state| state.closing = true);
    }

    /// Worker: waits for a round after `last`.
    pub(super) fn next(&self, last: u64) -> Result<Work> {
        self.wait(|state| match &state.job {
            Some(Job::Round(round, context)) if state.number > last => {
                Some(Work::Round { number: state.number, round: Arc::clone(round), context: *context })
            }
            Some(Job::Bulk(bulk)) if state.number > last => Some(Work::Bulk { bulk: Arc::clone(bulk) }),
            _ => state.closing.then_some(Work::Close),
        })
    }

    /// Worker: its SYNC is out.
    pub(super) fn done(&self) {
        self.state.modify_and_notify(|state| state.done += 1);
    }

    /// Worker: has the main thread announce zero pages.
    pub(super) fn post(&self, report: ZeroReport) -> Result<()> {
        self.wait(|state| (state.reports.len() < MAX_REPORTS).then_some(()))?;
        self.state.modify_and_notify(|state| state.reports.push(report));
        Ok(())
    }

    fn wait<R>(&self, ready: impl FnMut(&mut State) -> Option<R>) -> Result<R> {
        self.state.wait(&self.stop, None, ready).ok_or_else(|| Error::stopped(Phase::Active))
    }
}

/// Names a block once and refers to it afterwards, as CONTINUE allows within one channel.
#[derive(Default)]
pub(super) struct BlockNaming {
    last: Option<BlockIndex>,
}

impl BlockNaming {
    pub(super) fn refer(&mut self, block: BlockIndex, name: &multifd_wire::BlockName) -> BlockRef {
        if self.last.replace(block) == Some(block) { BlockRef::Same } else { BlockRef::Named(name.clone()) }
    }
}
