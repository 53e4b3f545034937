//! The channels of a migration that are open, until all are closed. Checked under every
//! interleaving by tests/loom.

use crate::run::stop::lock;
use crate::sync::Mutex;

/// Things that are open, and that none can be added to once they have been closed.
pub(crate) struct OpenSet<T>(Mutex<Items<T>>);

struct Items<T> {
    closed: bool,
    items: Vec<T>,
    /// Numbers of those that are gone.
    gone: u64,
}

impl<T> OpenSet<T> {
    pub(crate) fn new() -> Self {
        Self(Mutex::new(Items { closed: false, items: Vec::new(), gone: 0 }))
    }

    /// Adds `item`. False: all have been closed, and this one is for the caller to close.
    #[must_use]
    pub(crate) fn add(&self, item: T) -> bool {
        let mut set = lock(&self.0);
        if !set.closed {
            set.items.push(item);
        }
        !set.closed
    }

    /// Closes all that were added, and whatever is added later is refused.
    pub(crate) fn close(&self, close: impl FnMut(&T)) {
        let mut set = lock(&self.0);
        set.closed = true;
        set.items.iter().for_each(close);
    }

    /// Lets go of all that `ended` says; in sums they stay, with their last `number`.
    pub(crate) fn retire(&self, ended: impl Fn(&T) -> bool, number: impl FnMut(&T) -> u64) {
        let mut set = lock(&self.0);
        let gone: Vec<_> = set.items.extract_if(.., |item| ended(item)).collect();
        set.gone += gone.iter().map(number).sum::<u64>();
        drop(set);
        // What is last dropped here may take its time.
        drop(gone);
    }

    /// A sum over all that were added.
    pub(crate) fn sum(&self, number: impl FnMut(&T) -> u64) -> u64 {
        let set = lock(&self.0);
        set.gone + set.items.iter().map(number).sum::<u64>()
    }
}
