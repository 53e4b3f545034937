//! The dirty rate of a guest, and the effect of xbzrle on pages written again.

use std::time::Duration;

use multifd_codecs::xbzrle::{self, Outcome};

use super::findings::{DirtyFacts, DirtyOrigin, XbzrleFacts};
use super::memory::{PAGE, Rewrites};

/// The effect of xbzrle on pages seen in two versions.
pub(super) fn xbzrle(rewrites: &Rewrites) -> Option<XbzrleFacts> {
    let (mut encoded, mut bytes) = (0, 0);
    let mut delta = [0; PAGE];
    for [before, after] in &rewrites.pairs {
        match xbzrle::encode(&before[..], &after[..], &mut delta) {
            Outcome::Delta(len) => {
                encoded += 1;
                bytes += len;
            }
            Outcome::Overflow => bytes += PAGE,
            // Written with the same bytes: nothing is sent.
            Outcome::Unchanged => encoded += 1,
        }
    }
    let pages = rewrites.pairs.len();
    (pages > 0).then(|| XbzrleFacts {
        pages: pages as u64,
        encoded: f64::from(encoded) / pages as f64,
        size: bytes as f64 / (pages * PAGE) as f64,
    })
}

/// The dirty rate and working set that fit the bytes changed after some times, by
/// `changed(t) = working set * (1 - exp(-rate * t / working set))`.
///
/// The first time with a change gives the rate, the last one the working set, which is at most
/// `all` bytes.
pub(super) fn measured(changed: &[(Duration, u64)], all: u64) -> DirtyFacts {
    let still = DirtyFacts { origin: DirtyOrigin::Measured, bytes_per_s: 0, working_set_bytes: 0 };
    let Some((first, last)) = changed.iter().find(|(_, bytes)| *bytes > 0).zip(changed.last()) else {
        return still;
    };
    let seconds = |time: &Duration| time.as_secs_f64().max(1e-6);
    let (time, bytes) = (seconds(&last.0), last.1 as f64);
    // A working set nearly complete at the first time hides how often it is written: this is a
    // lower bound.
    let mut rate = first.1 as f64 / seconds(&first.0);
    let mut working_set = fit(rate, time, bytes, all as f64);
    // The curve bends before the first time: improve the rate until it leads through that point.
    for _ in 0..4 {
        let full = 1.0 - first.1 as f64 / working_set;
        if full <= 0.01 {
            break;
        }
        rate = -full.ln() * working_set / seconds(&first.0);
        working_set = fit(rate, time, bytes, all as f64);
    }
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "positive, and less than memory can hold"
    )]
    DirtyFacts { bytes_per_s: rate as u64, working_set_bytes: working_set as u64, ..still }
}

/// The working set, between `bytes` and `all`, of which `rate` changes `bytes` in `time`.
fn fit(rate: f64, time: f64, bytes: f64, all: f64) -> f64 {
    let (mut low, mut high) = (bytes, all.max(bytes));
    if after(rate, high, time) <= bytes {
        return high;
    }
    // 40 halvings of less than 2^64 bytes leave less than 2^24.
    for _ in 0..40 {
        let middle = f64::midpoint(low, high);
        if after(rate, middle, time) < bytes { low = middle } else { high = middle }
    }
    high
}

/// Distinct bytes written in `seconds`.
pub(super) fn after(rate: f64, working_set: f64, seconds: f64) -> f64 {
    if working_set <= 0.0 { 0.0 } else { -working_set * (-rate * seconds / working_set).exp_m1() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn looks(rate: f64, working_set: f64) -> Vec<(Duration, u64)> {
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "what the test asks for")]
        let look = |ms: u64| (Duration::from_millis(ms), after(rate, working_set, ms as f64 / 1e3) as u64);
        [20, 100, 400, 1000].map(look).to_vec()
    }

    #[test]
    fn the_rate_and_the_working_set_are_found_again() {
        for (rate, working_set) in [(100e6, 64e6), (1e9, 100e6), (10e6, 4e9), (5e6, 1e6)] {
            let found = measured(&looks(rate, working_set), 4_000_000_000);
            let near = |found: u64, expected: f64| (0.9..1.1).contains(&(found as f64 / expected));
            assert!(near(found.bytes_per_s, rate), "{rate} {working_set}: {found:?}");
            // A working set hardly begun within a second cannot be told from a larger one.
            assert!(near(found.working_set_bytes, working_set) || rate < working_set, "{found:?}");
        }
    }

    #[test]
    fn a_guest_that_writes_nothing_has_no_dirty_rate() {
        let found = measured(&looks(0.0, 1e9), 1 << 30);
        assert_eq!((found.bytes_per_s, found.working_set_bytes), (0, 0));
        assert_eq!(measured(&[], 1 << 30).bytes_per_s, 0);
    }

    #[test]
    fn deltas_are_counted_against_whole_pages() {
        let page = |set: usize| {
            let mut page = Box::new([0; PAGE]);
            page.iter_mut().step_by(2).take(set).for_each(|byte| *byte = 1);
            page
        };
        let pairs = vec![[page(0), page(1)], [page(0), page(2000)], [page(3), page(3)]];
        let facts = xbzrle(&Rewrites { changed: Vec::new(), pairs }).unwrap();
        assert_eq!(facts.pages, 3);
        assert!((facts.encoded - 2.0 / 3.0).abs() < 1e-9);
        assert!((facts.size - 1.0 / 3.0).abs() < 0.01, "{}", facts.size);
        assert!(xbzrle(&Rewrites::default()).is_none());
    }
}
