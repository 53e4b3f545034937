//! The sample: evenly spread parts of the memory.

use multifd_codecs::zero;

use super::error::Result;
use super::memory::{Batch, Memory, PAGE};

/// Neighbouring batches sampled together: 4 MiB of memory. A compressor finds many matches in
/// earlier batches: on a Linux guest zstd:3 reached 3.33x in runs of 2 MiB, 3.35x in runs of 4,
/// 3.37x as a whole. More and shorter runs represent the rest better.
pub(super) const RUN_BATCHES: usize = 8;

/// The order in which memory is sampled. Wherever it ends, the sample is spread evenly over all
/// batches.
pub(super) struct Plan {
    batches: Vec<Batch>,
    /// Numbers of the runs left.
    order: std::vec::IntoIter<usize>,
    held_pages: u64,
}

/// Sampled parts of the memory.
pub(super) struct Sample {
    pub(super) runs: Vec<Run>,
    /// Pages read, with zero pages.
    pub(super) pages: u64,
    /// Share of all held pages, 0.0 to 1.0.
    pub(super) share: f64,
    /// Share of the pages read that are not zero, 0.0 to 1.0.
    pub(super) data_share: f64,
}

/// Neighbouring batches, each with its pages that are not zero back to back. A batch of zeros is
/// left out.
#[derive(Debug, Default)]
pub(super) struct Run {
    pub(super) batches: Vec<Vec<u8>>,
}

impl Plan {
    pub(super) fn of(memory: &dyn Memory) -> Self {
        let batches = memory.extent().batches.clone();
        let order = spread(batches.len().div_ceil(RUN_BATCHES)).into_iter();
        Self { held_pages: held(&batches), batches, order }
    }

    /// Whether all of the memory has been sampled.
    pub(super) fn is_done(&self) -> bool {
        self.order.as_slice().is_empty()
    }

    /// Reads the next parts of `memory`, about `limit` bytes.
    pub(super) fn take(
        &mut self,
        memory: &mut dyn Memory,
        limit: u64,
        progress: &dyn Fn(u64),
    ) -> Result<Sample> {
        let (mut numbers, mut pages) = (Vec::new(), 0);
        while pages * (PAGE as u64) < limit {
            let Some(number) = self.order.next() else { break };
            pages += held(self.run(number));
            numbers.push(number);
        }
        numbers.sort_unstable();
        let wanted: Vec<Batch> = numbers.iter().flat_map(|number| self.run(*number)).copied().collect();
        let mut contents = memory.read(&wanted, progress)?.into_iter();
        let runs = numbers.iter().map(|number| contents.by_ref().take(self.run(*number).len()).collect());
        Ok(Sample::of(runs, held(&wanted) as f64 / self.held_pages.max(1) as f64))
    }

    fn run(&self, number: usize) -> &[Batch] {
        let start = number * RUN_BATCHES;
        let end = (start + RUN_BATCHES).min(self.batches.len());
        self.batches.get(start..end).unwrap_or_default()
    }
}

impl Sample {
    fn of(contents: impl Iterator<Item = Vec<Vec<u8>>>, share: f64) -> Self {
        let (mut pages, mut data) = (0, 0);
        let mut runs = Vec::new();
        for batches in contents {
            let mut run = Run::default();
            for content in batches {
                pages += content.len() / PAGE;
                let batch = without_zeros(content);
                data += batch.len() / PAGE;
                if !batch.is_empty() {
                    run.batches.push(batch);
                }
            }
            if !run.batches.is_empty() {
                runs.push(run);
            }
        }
        Self { runs, pages: pages as u64, share, data_share: data as f64 / pages.max(1) as f64 }
    }

    /// The pages that are not zero.
    pub(super) fn data_pages(&self) -> impl Iterator<Item = &[u8]> {
        self.runs.iter().flat_map(|run| &run.batches).flat_map(|batch| batch.chunks_exact(PAGE))
    }
}

impl Run {
    pub(super) fn bytes(&self) -> u64 {
        self.batches.iter().map(|batch| batch.len() as u64).sum()
    }
}

/// All numbers below `count`, in an order whose every prefix is spread evenly over them: steps of
/// the golden ratio, which resonate with no pattern of the memory and are the same every time.
///
/// No gap between n such steps is wider than 2.62 / n, so 2.62 * `count` of them reach every
/// number.
pub(super) fn spread(count: usize) -> Vec<usize> {
    let mut met = vec![false; count];
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a share of `count`")]
    let steps = (0..3 * count).map(|step| ((step as f64 * GOLDEN).fract() * count as f64) as usize);
    steps.filter(|number| met.get_mut(*number).is_some_and(|met| !std::mem::replace(met, true))).collect()
}

/// (sqrt(5) - 1) / 2
const GOLDEN: f64 = 0.618_033_988_749_895;

fn held(batches: &[Batch]) -> u64 {
    batches.iter().map(|batch| batch.held).sum()
}

fn without_zeros(content: Vec<u8>) -> Vec<u8> {
    if !content.chunks_exact(PAGE).any(zero::is_zero) {
        return content;
    }
    content.chunks_exact(PAGE).filter(|page| !zero::is_zero(page)).flatten().copied().collect()
}

#[cfg(test)]
mod tests {
    use super::super::memory::{Extent, Rewrites};
    use super::*;

    /// Every third page is zero, and every batch of number 7; the others hold the number of their
    /// batch.
    struct Numbers(Extent);

    impl Memory for Numbers {
        fn name(&self) -> String {
            "numbers".to_owned()
        }
        fn extent(&self) -> &Extent {
            &self.0
        }
        fn read(&mut self, wanted: &[Batch], progress: &dyn Fn(u64)) -> Result<Vec<Vec<u8>>> {
            progress(0);
            let page = |batch: &Batch, page: u64| {
                let zero = page.is_multiple_of(3) || batch.number == 7;
                vec![if zero { 0 } else { u8::try_from(batch.number).unwrap_or(1) }; PAGE]
            };
            let content = |batch: &Batch| (0..batch.held).flat_map(|number| page(batch, number)).collect();
            Ok(wanted.iter().map(content).collect())
        }
        fn rewrites(&mut self) -> Result<Option<Rewrites>> {
            Ok(None)
        }
    }

    fn numbers(batches: u64) -> Numbers {
        let batches = (1..=batches).map(|number| Batch { block: 0, number, held: 6 }).collect();
        Numbers(Extent { batches, ..Extent::default() })
    }

    #[test]
    fn parts_follow_each_other_until_all_is_read_once() {
        let mut memory = numbers(100);
        let mut plan = Plan::of(&memory);
        let (mut share, mut seen) = (0.0, Vec::new());
        while !plan.is_done() {
            let sample = plan.take(&mut memory, 100 * PAGE as u64, &|_| ()).unwrap();
            assert!(sample.pages <= 100 + 6 * RUN_BATCHES as u64);
            share += sample.share;
            seen.extend(sample.runs.iter().flat_map(|run| &run.batches).map(|batch| (batch[0], batch.len())));
        }
        assert!((share - 1.0).abs() < 1e-9, "{share}");
        seen.sort_unstable();
        let expected: Vec<_> =
            (1..=100).filter(|number| *number != 7).map(|number| (number, 4 * PAGE)).collect();
        assert_eq!(seen, expected, "zero pages are left out");
    }

    #[test]
    fn the_share_of_zeros_is_noted() {
        let mut memory = numbers(6);
        let sample = Plan::of(&memory).take(&mut memory, 1 << 30, &|_| ()).unwrap();
        assert_eq!((sample.pages, sample.share), (36, 1.0));
        assert!((sample.data_share - 2.0 / 3.0).abs() < 1e-9);
    }

    #[test]
    fn every_beginning_of_the_order_is_spread_evenly() {
        for count in [1, 2, 3, 10, 1000, 12_345] {
            let order = spread(count);
            let mut sorted = order.clone();
            sorted.sort_unstable();
            assert!(sorted.into_iter().eq(0..count), "{count}");
            for taken in [count / 10, count / 3].into_iter().filter(|taken| *taken > 1) {
                let mut part = order[..taken].to_vec();
                part.sort_unstable();
                let gap = part.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap();
                assert!(gap <= 3 * count / taken, "{taken} of {count}: a gap of {gap}");
            }
        }
        assert!(spread(0).is_empty());
    }
}
