//! Bitmap, logs and rounds against plain arrays: whatever is written, claimed, sent, lost and put
//! back, in any order, the destination's array ends equal to the source's.
#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::indexing_slicing,
    clippy::unwrap_used,
    reason = "test code may panic"
)]

use std::cell::Cell;
use std::sync::Arc;

use multifd_engine::DirtyBitmap;
use multifd_engine::unstable::{BlockIndex, Claim, PerBlock, Round};
use proptest::prelude::*;

/// Pages of two blocks; neither a whole number of words.
const BLOCKS: [usize; 2] = [300, 130];

#[derive(Clone, Debug)]
enum Step {
    /// The guest writes a page, and the log notes it.
    Write { block: usize, page: usize },
    /// A worker claims up to so many pages.
    Claim { worker: usize, most: usize },
    /// A worker's batch reaches the destination, with what the pages hold at that moment.
    Deliver { worker: usize },
    /// A worker fails: its batch is lost, it gives back what it has.
    Fail { worker: usize },
    /// The round is over for all: workers deliver, the log is read, the next round begins.
    NextRound,
}

const WORKERS: usize = 3;

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let worker = 0..WORKERS;
    let step = prop_oneof![
        6 => (0..BLOCKS.len(), 0_usize..300).prop_map(|(block, page)| Step::Write { block, page: page % BLOCKS[block] }),
        4 => (worker.clone(), 1_usize..128).prop_map(|(worker, most)| Step::Claim { worker, most }),
        3 => worker.clone().prop_map(|worker| Step::Deliver { worker }),
        1 => worker.prop_map(|worker| Step::Fail { worker }),
        1 => Just(Step::NextRound),
    ];
    prop::collection::vec(step, 1..200)
}

#[derive(Default)]
struct Worker {
    claim: Claim,
    /// What it has claimed and not delivered.
    batch: Option<(BlockIndex, Vec<usize>)>,
}

impl Worker {
    fn claim(&mut self, round: &Round, most: usize) -> bool {
        let batch = round.claim(&mut self.claim, most);
        self.batch = batch.map(|batch| (batch.block, batch.pages.to_vec()));
        self.batch.is_some()
    }
}

struct Model {
    source: PerBlock<Vec<Cell<u32>>>,
    destination: PerBlock<Vec<Cell<u32>>>,
    log: PerBlock<DirtyBitmap>,
    dirty: PerBlock<Arc<DirtyBitmap>>,
    round: Round,
    workers: Vec<Worker>,
    sent_this_round: Vec<(BlockIndex, usize)>,
    next_value: u32,
}

impl Model {
    fn new() -> Self {
        let dirty: PerBlock<_> = BLOCKS.iter().map(|pages| Arc::new(DirtyBitmap::new(*pages))).collect();
        dirty.iter().for_each(|bitmap| bitmap.set_range(0, bitmap.pages()));
        Self {
            source: dirty.map(|bitmap| vec![Cell::new(1); bitmap.pages()]),
            destination: dirty.map(|bitmap| vec![Cell::new(0); bitmap.pages()]),
            log: dirty.map(|bitmap| DirtyBitmap::new(bitmap.pages())),
            round: Round::new(&dirty, WORKERS),
            dirty,
            workers: (0..WORKERS).map(|_| Worker::default()).collect(),
            sent_this_round: Vec::new(),
            next_value: 2,
        }
    }

    fn step(&mut self, step: &Step) {
        match *step {
            Step::Write { block, page } => {
                self.source[block][page].set(self.next_value);
                self.next_value += 1;
                self.log[block].set(page);
            }
            Step::Claim { worker, most } => {
                self.deliver(worker);
                self.workers[worker].claim(&self.round, most);
                assert!(self.workers[worker].batch.iter().all(|(_, pages)| pages.len() <= most));
            }
            Step::Deliver { worker } => self.deliver(worker),
            Step::Fail { worker } => {
                let Worker { claim, batch } = &mut self.workers[worker];
                self.round.put_back(claim);
                *batch = None;
            }
            Step::NextRound => self.next_round(),
        }
    }

    fn deliver(&mut self, worker: usize) {
        let Some((block, pages)) = self.workers[worker].batch.take() else { return };
        for page in pages {
            self.destination.at(block)[page].set(self.source.at(block)[page].get());
            self.sent_this_round.push((block, page));
        }
    }

    /// Every worker runs dry, then the log is read and a new round begins.
    fn next_round(&mut self) {
        for worker in 0..WORKERS {
            self.deliver(worker);
            while self.workers[worker].claim(&self.round, 128) {
                self.deliver(worker);
            }
        }
        let sent = self.sent_this_round.len();
        self.sent_this_round.sort_unstable();
        self.sent_this_round.dedup();
        assert_eq!(self.sent_this_round.len(), sent, "a page went twice in one round");
        self.sent_this_round.clear();
        for (log, dirty) in self.log.iter().zip(self.dirty.iter()) {
            log.move_to(dirty);
        }
        self.round = Round::new(&self.dirty, WORKERS);
        self.workers = (0..WORKERS).map(|_| Worker::default()).collect();
    }

    /// What failed workers put back behind the cursor takes a round more.
    fn assert_equal_when_paused(&mut self) {
        self.next_round();
        self.next_round();
        assert_eq!(&self.source[..], &self.destination[..]);
        assert!(self.dirty.iter().all(|dirty| dirty.count() == 0));
    }
}

/// Steps of one long history; 10^6 by `MULTIFD_MODEL_STEPS=1000000`: half a second.
const LONG: usize = 20_000;

#[test]
fn nothing_written_is_ever_lost_in_a_long_history() {
    let steps = std::env::var("MULTIFD_MODEL_STEPS").map_or(LONG, |steps| steps.parse().unwrap());
    let mut seed = 1_u64;
    let mut below = |limit: usize| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) as usize % limit
    };
    let mut model = Model::new();
    for step in 0..steps {
        let (block, worker) = (below(BLOCKS.len()), below(WORKERS));
        model.step(&match below(15) {
            0..6 => Step::Write { block, page: below(BLOCKS[block]) },
            6..10 => Step::Claim { worker, most: 1 + below(127) },
            10..13 => Step::Deliver { worker },
            13 => Step::Fail { worker },
            _ => Step::NextRound,
        });
        if step % 1000 == 999 {
            model.assert_equal_when_paused();
        }
    }
    model.assert_equal_when_paused();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    #[test]
    fn nothing_written_is_ever_lost(steps in steps()) {
        let mut model = Model::new();
        steps.iter().for_each(|step| model.step(step));
        model.assert_equal_when_paused();
    }
}
