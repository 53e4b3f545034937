//! The dirty rate of a live process: a sample of pages is read, and read again some times.
//!
//! Changes are found by content, which costs the process nothing. A page rewritten with the same
//! bytes counts as not written, and would not have to be sent again; one that gets its old bytes
//! back before the next look is missed. A page that was touched after the process was opened is not
//! in the sample.

use std::io;
use std::time::{Duration, Instant};

use super::super::{BATCH_PAGES, Extent, MAX_PAIRS, PAGE, Rewrites};
use super::pace::Pace;
use super::reading::Content;

/// Pages watched: 32 MiB. A working set of 1 % of memory is measured to a tenth (82 of these pages,
/// ± 9), and a look at all of them takes about 20 ms.
const WATCHED: u64 = 8192;

/// Times of the further looks, after the first. The first of them shows fast pages, such as
/// counters and network buffers; the last shows most of a working set that is rewritten as a whole:
/// rounds last from some 100 ms to seconds.
const LOOKS: [Duration; 4] = [
    Duration::from_millis(20),
    Duration::from_millis(100),
    Duration::from_millis(400),
    Duration::from_secs(1),
];

/// Index of the look whose pages are kept in both versions: 400 ms later. Rounds are about that far
/// apart when deltas begin to matter; within a downtime limit of 300 ms the move would be over.
const PAIRED: usize = 2;

/// Longest time of the first look, which ends with fewer pages where no core is free. Later looks
/// have no more pages than it.
const FIRST_LOOK: Duration = Duration::from_millis(400);

/// A watched page, with its first content.
struct Watched {
    block: usize,
    page: u64,
    at: Instant,
    content: Box<[u8; PAGE]>,
    changed: bool,
}

pub(super) fn watch(content: &Content, extent: &Extent) -> io::Result<Rewrites> {
    let sample = sample(extent, WATCHED);
    let mut pace = Pace::start();
    let begin = Instant::now();
    let mut watched = first_look(content, &sample, begin + FIRST_LOOK, &mut pace)?;
    let held: u64 = extent.batches.iter().map(|batch| batch.held).sum();
    let mut rewrites = Rewrites::default();
    for (number, after) in LOOKS.into_iter().enumerate() {
        pace.wait_until(begin + after);
        let mut pairs = (number == PAIRED).then_some(&mut rewrites.pairs);
        let (mut looked, mut later) = (0, Duration::ZERO);
        for watched in &mut watched {
            later += watched.look(content, &mut pairs)?;
            looked += 1;
            pace.rest();
        }
        if looked > 0 {
            let changed = watched.iter().filter(|watched| watched.changed).count() as u64;
            rewrites.changed.push((later / looked, scale(changed, held, looked.into())));
        }
    }
    Ok(rewrites)
}

/// Bytes of changed pages, scaled from the `looked` pages to all held ones.
fn scale(changed: u64, held: u64, looked: u64) -> u64 {
    let bytes = u128::from(changed) * u128::from(held) * PAGE as u128 / u128::from(looked.max(1));
    u64::try_from(bytes).unwrap_or(u64::MAX)
}

impl Watched {
    /// Reads the page again. Returns the time since the first look at it.
    fn look(
        &mut self,
        content: &Content,
        pairs: &mut Option<&mut Vec<[Box<[u8; PAGE]>; 2]>>,
    ) -> io::Result<Duration> {
        let later = self.at.elapsed();
        if self.changed && pairs.is_none() {
            return Ok(later);
        }
        let now = read_page(content, self.block, self.page)?;
        if let Some(now) = now.filter(|now| *now != self.content) {
            self.changed = true;
            if let Some(pairs) = pairs.as_mut().filter(|pairs| pairs.len() < MAX_PAIRS) {
                pairs.push([self.content.clone(), now]);
            }
        }
        Ok(later)
    }
}

/// The first content of the sample's pages, as far as they are read before `end`.
fn first_look(
    content: &Content,
    sample: &[(usize, u64, u64)],
    end: Instant,
    pace: &mut Pace,
) -> io::Result<Vec<Watched>> {
    let mut watched = Vec::new();
    for &(block, batch, nth) in sample {
        if Instant::now() > end {
            break;
        }
        let first = batch * BATCH_PAGES;
        let held = content.held(block, first..first + BATCH_PAGES)?;
        let Some(page) = held.runs().flatten().nth(usize::try_from(nth).unwrap_or(usize::MAX)) else {
            continue;
        };
        let page = first + page;
        let at = Instant::now();
        if let Some(content) = read_page(content, block, page)? {
            watched.push(Watched { block, page, at, content, changed: false });
        }
        pace.rest();
    }
    Ok(watched)
}

/// `None`: the page is not held any more.
fn read_page(content: &Content, block: usize, page: u64) -> io::Result<Option<Box<[u8; PAGE]>>> {
    let mut bytes = Vec::with_capacity(PAGE);
    if content.held(block, page..page + 1)?.count() > 0 {
        content.read(block, page..page + 1, &mut bytes)?;
    }
    Ok(bytes.into_boxed_slice().try_into().ok())
}

/// A sample of the held pages, evenly spread: one of each stretch, at a random place in it. In
/// random order, so that every prefix is as evenly spread; the same every time.
///
/// Each as block, number of the batch, and index among the batch's held pages.
fn sample(extent: &Extent, most: u64) -> Vec<(usize, u64, u64)> {
    let held: u64 = extent.batches.iter().map(|batch| batch.held).sum();
    let stretches = held.min(most);
    let mut random = Random(1);
    let mut batches = extent.batches.iter();
    let (mut batch, mut before) = (batches.next(), 0);
    let mut pages = Vec::new();
    for stretch in 0..stretches {
        let edge = |stretch: u64| {
            u64::try_from(u128::from(stretch) * u128::from(held) / u128::from(stretches)).unwrap_or(0)
        };
        let (start, end) = (edge(stretch), edge(stretch + 1));
        let page = start + random.below(end - start);
        while let Some(passed) = batch.filter(|batch| page >= before + batch.held) {
            before += passed.held;
            batch = batches.next();
        }
        pages.extend(batch.map(|batch| (batch.block, batch.number, page - before)));
    }
    for last in (1..pages.len()).rev() {
        pages.swap(last, usize::try_from(random.below(last as u64 + 1)).unwrap_or(0));
    }
    pages
}

/// Splitmix64: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014.
struct Random(u64);

impl Random {
    /// A number below `limit`, which is not 0.
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ mixed >> 31) % limit.max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::Batch;
    use super::*;

    fn extent(held: &[u64]) -> Extent {
        let batch = |(number, held): (usize, &u64)| Batch { block: 0, number: number as u64, held: *held };
        Extent {
            blocks: vec![held.len() as u64 * 128 * PAGE as u64],
            batches: held.iter().enumerate().map(batch).collect(),
            device_bytes: 0,
        }
    }

    #[test]
    fn a_sample_is_spread_evenly_and_no_page_is_in_it_twice() {
        let extent = extent(&[128, 1, 3, 128, 60, 128]);
        let mut sample = sample(&extent, 64);
        assert_ne!(sample, {
            let mut sorted = sample.clone();
            sorted.sort_unstable();
            sorted
        });
        sample.sort_unstable();
        sample.dedup();
        assert_eq!(sample.len(), 64);
        for (number, held) in [(0, 128), (3, 128), (4, 60), (5, 128)] {
            let found =
                sample.iter().filter(|(_, batch, nth)| *batch == number && *nth < held).count() as u64;
            assert!(found.abs_diff(held * 64 / 448) <= 1, "{found} of batch {number}");
        }
    }

    #[test]
    fn of_a_few_pages_all_are_in_the_sample() {
        let mut all = sample(&extent(&[2, 0, 1]), 64);
        all.sort_unstable();
        assert_eq!(all, [(0, 0, 0), (0, 0, 1), (0, 2, 0)]);
        assert!(sample(&extent(&[]), 64).is_empty());
    }

    #[test]
    fn what_was_seen_is_scaled_to_all_that_is_held() {
        assert_eq!(scale(82, 1 << 20, 8192), 82 * 128 * PAGE as u64);
        assert_eq!(scale(0, 0, 0), 0);
    }
}
