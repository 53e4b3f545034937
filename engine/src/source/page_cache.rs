//! The xbzrle cache: what the destination holds of pages that are written again and again. Rules:
//! docs/wire.md §6.1.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use multifd_codecs::xbzrle::{self, Outcome};
use serde::Serialize;

use super::rounds::RoundContext;
use crate::guest::PAGE;
use crate::run::stop::lock;

/// Direct-mapped: a page has one slot, shared with others. Each slot has its own lock, which no
/// thread holds for long.
#[derive(Debug)]
pub(super) struct PageCache {
    slots: Box<[Mutex<Slot>]>,
    on: AtomicBool,
    counters: Counters,
    /// Rounds in a row that saved too little.
    poor_rounds: AtomicU64,
    /// The counters at the last assessment.
    assessed: Mutex<XbzrleStats>,
}

#[derive(Debug, Default)]
struct Slot {
    key: u64,
    /// The round in which the page was last seen.
    age: u64,
    content: Option<Box<[u8; PAGE]>>,
}

#[derive(Debug, Default)]
struct Counters {
    hits: AtomicU64,
    misses: AtomicU64,
    overflows: AtomicU64,
    unchanged: AtomicU64,
    deltas: AtomicU64,
    delta_bytes: AtomicU64,
}

/// What the xbzrle cache has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct XbzrleStats {
    /// Pages that were found in the cache.
    pub hits: u64,
    /// Pages that were not.
    pub misses: u64,
    /// Pages whose difference was no shorter than the page.
    pub overflows: u64,
    /// Pages that were written, but not changed: not sent at all.
    pub unchanged: u64,
    /// Pages that went as a difference.
    pub deltas: u64,
    /// Bytes that these differences had.
    pub delta_bytes: u64,
    /// Bytes that did not have to be sent.
    pub saved_bytes: u64,
    /// The cache switched itself off, because it saved too little.
    pub switched_off: bool,
}

/// What to send for a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lookup {
    /// The difference, which was appended.
    Delta,
    /// The page as it is.
    Plain,
    /// Nothing: the destination holds it.
    Unchanged,
}

/// A round saves enough with 5 % of what it looked at: below that, the copies cost more than they
/// give.
const ENOUGH_PERCENT: u64 = 5;

/// Pages in a round below which it says nothing.
const ASSESSABLE_PAGES: u64 = 256;

/// Poor rounds in a row that switch the cache off. The first round that caches has only misses.
const POOR_ROUNDS: u64 = 3;

impl PageCache {
    /// A cache of at most `bytes`: a power of two, at least a page.
    pub(super) fn new(bytes: usize) -> Self {
        let slots = (bytes / PAGE).max(1);
        Self {
            slots: (0..slots).map(|_| Mutex::default()).collect(),
            on: AtomicBool::new(true),
            counters: Counters::default(),
            poor_rounds: AtomicU64::new(0),
            assessed: Mutex::default(),
        }
    }

    /// True if pages of this round go through the cache.
    pub(super) fn serves(&self, context: RoundContext) -> bool {
        context.round > 1 && self.on.load(Ordering::Relaxed)
    }

    /// Decides how the page `key` (unique in the guest) goes out; a difference is appended to
    /// `delta`. What is then sent must be `content`, a private copy, and nothing else: the cache
    /// takes it for what the destination holds.
    pub(super) fn lookup(
        &self,
        key: u64,
        content: &[u8; PAGE],
        context: RoundContext,
        delta: &mut Vec<u8>,
    ) -> Lookup {
        let Some(slot) = self.slot(key) else { return Lookup::Plain };
        let mut slot = lock(slot);
        let count = |counter: &AtomicU64| counter.fetch_add(1, Ordering::Relaxed);
        let (known, in_use) = (slot.key == key, slot.age + 2 > context.round);
        match &mut slot.content {
            Some(cached) if known => {
                count(&self.counters.hits);
                let mut room = [0; PAGE];
                let outcome = xbzrle::encode(&cached[..], content, &mut room);
                if outcome != Outcome::Unchanged && !context.last {
                    **cached = *content;
                }
                slot.age = context.round;
                self.count_outcome(outcome, &room, delta)
            }
            // A slot that another page used a round ago is that page's.
            Some(_) if in_use => {
                count(&self.counters.misses);
                Lookup::Plain
            }
            _ => {
                count(&self.counters.misses);
                if !context.last {
                    *slot = Slot { key, age: context.round, content: Some(Box::new(*content)) };
                }
                Lookup::Plain
            }
        }
    }

    fn count_outcome(&self, outcome: Outcome, room: &[u8], delta: &mut Vec<u8>) -> Lookup {
        // A delta that is longer than the room for it would be none: the page goes as it is.
        let encoded = match outcome {
            Outcome::Delta(len) => room.get(..len),
            _ => None,
        };
        match (outcome, encoded) {
            (Outcome::Delta(len), Some(encoded)) => {
                delta.extend_from_slice(encoded);
                self.counters.deltas.fetch_add(1, Ordering::Relaxed);
                self.counters.delta_bytes.fetch_add(len as u64, Ordering::Relaxed);
                Lookup::Delta
            }
            (Outcome::Overflow | Outcome::Delta(_), _) => {
                self.counters.overflows.fetch_add(1, Ordering::Relaxed);
                Lookup::Plain
            }
            (Outcome::Unchanged, _) => {
                self.counters.unchanged.fetch_add(1, Ordering::Relaxed);
                Lookup::Unchanged
            }
        }
    }

    /// The page goes out as a zero page: so must its copy become.
    pub(super) fn zeroed(&self, key: u64) {
        let Some(slot) = self.slot(key) else { return };
        let mut slot = lock(slot);
        if slot.key == key
            && let Some(cached) = &mut slot.content
        {
            **cached = [0; PAGE];
        }
    }

    /// After a round: does it still pay? Says so when it does not, and switches itself off.
    pub(super) fn assess(&self, context: RoundContext) -> Option<String> {
        if !self.serves(context) {
            return None;
        }
        let now = self.stats();
        let before = std::mem::replace(&mut *lock(&self.assessed), now);
        let pages = now.hits + now.misses - before.hits - before.misses;
        let saved = now.saved_bytes - before.saved_bytes;
        if pages < ASSESSABLE_PAGES {
            return None;
        }
        let looked_at = pages * PAGE as u64;
        if saved * 100 >= looked_at * ENOUGH_PERCENT {
            self.poor_rounds.store(0, Ordering::Relaxed);
            return None;
        }
        if self.poor_rounds.fetch_add(1, Ordering::Relaxed) + 1 < POOR_ROUNDS {
            return None;
        }
        self.on.store(false, Ordering::Relaxed);
        Some(format!("xbzrle off: it saved {saved} of {looked_at} bytes"))
    }

    pub(super) fn stats(&self) -> XbzrleStats {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let counters = &self.counters;
        let (deltas, delta_bytes) = (read(&counters.deltas), read(&counters.delta_bytes));
        let unchanged = read(&counters.unchanged);
        XbzrleStats {
            hits: read(&counters.hits),
            misses: read(&counters.misses),
            overflows: read(&counters.overflows),
            unchanged,
            deltas,
            delta_bytes,
            saved_bytes: ((deltas + unchanged) * PAGE as u64).saturating_sub(delta_bytes),
            switched_off: !self.on.load(Ordering::Relaxed),
        }
    }

    fn slot(&self, key: u64) -> Option<&Mutex<Slot>> {
        let index = key % self.slots.len() as u64;
        self.slots.get(usize::try_from(index).ok()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(round: u64) -> RoundContext {
        RoundContext { round, last: false }
    }

    fn lookup(cache: &PageCache, key: u64, fill: u8, round: u64) -> Lookup {
        let mut content = [7; PAGE];
        content[100] = fill;
        cache.lookup(key, &content, at(round), &mut Vec::new())
    }

    #[test]
    fn the_first_round_is_not_served() {
        let cache = PageCache::new(1 << 20);
        assert!(!cache.serves(at(1)) && cache.serves(at(2)));
    }

    #[test]
    fn a_page_seen_before_goes_as_its_difference() {
        let cache = PageCache::new(1 << 20);
        assert_eq!(lookup(&cache, 5, 1, 2), Lookup::Plain);
        assert_eq!(lookup(&cache, 5, 2, 3), Lookup::Delta);
        assert_eq!(lookup(&cache, 5, 2, 4), Lookup::Unchanged);
        let stats = cache.stats();
        assert_eq!((stats.hits, stats.misses, stats.deltas, stats.unchanged), (2, 1, 1, 1));
        // 100 bytes alike in two length bytes? No: 100 < 128 takes one. One byte differs: its
        // length, itself.
        assert_eq!(stats.delta_bytes, 3);
    }

    #[test]
    fn a_slot_in_use_is_not_given_away_for_a_round() {
        let cache = PageCache::new(PAGE);
        assert_eq!(lookup(&cache, 1, 1, 2), Lookup::Plain);
        assert_eq!(lookup(&cache, 2, 1, 3), Lookup::Plain);
        assert_eq!(lookup(&cache, 1, 2, 3), Lookup::Delta, "still there");
        assert_eq!(lookup(&cache, 2, 1, 5), Lookup::Plain);
        assert_eq!(lookup(&cache, 1, 2, 5), Lookup::Plain, "pushed out");
    }

    #[test]
    fn a_zero_page_zeroes_its_copy() {
        let cache = PageCache::new(1 << 20);
        lookup(&cache, 3, 9, 2);
        cache.zeroed(3);
        let mut content = [0; PAGE];
        content[4095] = 1;
        let mut delta = Vec::new();
        assert_eq!(cache.lookup(3, &content, at(3), &mut delta), Lookup::Delta);
        let mut there = [0; PAGE];
        xbzrle::decode(&delta, &mut there).unwrap();
        assert_eq!(there, content);
    }

    #[test]
    fn the_last_stage_changes_nothing() {
        let cache = PageCache::new(1 << 20);
        let last = RoundContext { round: 3, last: true };
        assert_eq!(cache.lookup(1, &[1; PAGE], last, &mut Vec::new()), Lookup::Plain);
        assert_eq!(cache.lookup(1, &[1; PAGE], last, &mut Vec::new()), Lookup::Plain, "was not cached");
    }

    #[test]
    fn it_switches_itself_off_and_says_so() {
        let cache = PageCache::new(1 << 24);
        let mut said = Vec::new();
        for round in 2..8 {
            if cache.serves(at(round)) {
                for key in 0..512 {
                    let content: [u8; PAGE] =
                        std::array::from_fn(|at| (at as u64 * round * 31 + key).to_le_bytes()[0]);
                    cache.lookup(key, &content, at(round), &mut Vec::new());
                }
            }
            said.extend(cache.assess(at(round)));
        }
        assert_eq!(said.len(), 1, "{said:?}");
        assert!(cache.stats().switched_off && !cache.serves(at(9)));
    }
}
