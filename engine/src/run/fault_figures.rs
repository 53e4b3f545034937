//! How long threads have waited for pages.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::report::{BackEndWaits, FaultLatency, PageFaults, ThreadWaits};
use crate::run::counters::Progress;

/// Steps of the histogram within a power of two: a percentile is exact to an eighth.
const STEPS: usize = 8;
/// Powers of two of microseconds that are told apart: up to 12 days.
const POWERS: usize = 40;

/// Waits of all threads.
#[derive(Clone, Debug)]
pub(crate) struct FaultFigures {
    counts: Vec<u64>,
    max: Duration,
    threads: BTreeMap<u32, (u64, Duration)>,
    /// Of the threads of other processes, by the name of the device that each process serves.
    shared: BTreeMap<String, FaultFigures>,
}

impl Default for FaultFigures {
    fn default() -> Self {
        Self {
            counts: vec![0; POWERS * STEPS],
            max: Duration::ZERO,
            threads: BTreeMap::new(),
            shared: BTreeMap::new(),
        }
    }
}

impl FaultFigures {
    /// A thread has waited so long.
    pub(crate) fn count(&mut self, thread: u32, waited: Duration) {
        let index = step_of(micros(waited)).min(self.counts.len() - 1);
        if let Some(count) = self.counts.get_mut(index) {
            *count += 1;
        }
        self.max = self.max.max(waited);
        let of_thread = self.threads.entry(thread).or_default();
        *of_thread = (of_thread.0 + 1, of_thread.1 + waited);
    }

    /// A thread of a device's back-end has waited so long.
    pub(crate) fn count_shared(&mut self, device: &str, waited: Duration) {
        if !self.shared.contains_key(device) {
            self.shared.insert(device.to_owned(), Self::default());
        }
        if let Some(figures) = self.shared.get_mut(device) {
            figures.count(0, waited);
        }
    }

    /// The figures for a report, but that of pages which came unasked.
    pub(crate) fn report(&self) -> PageFaults {
        let faults: u64 = self.counts.iter().sum();
        PageFaults {
            faults,
            fault_us: self.latency(faults),
            blocktime_ms: u64::try_from(self.blocktime().as_millis()).unwrap_or(u64::MAX),
            threads: self
                .threads
                .iter()
                .map(|(thread, (faults, waited))| ThreadWaits {
                    thread: *thread,
                    faults: *faults,
                    blocktime_us: micros(*waited),
                })
                .collect(),
            back_ends: self.shared.iter().map(|(device, figures)| figures.report_of(device)).collect(),
            pages_pushed: 0,
        }
    }

    fn report_of(&self, device: &str) -> BackEndWaits {
        let faults: u64 = self.counts.iter().sum();
        BackEndWaits {
            device: device.to_owned(),
            faults,
            fault_us: self.latency(faults),
            blocktime_us: micros(self.blocktime()),
        }
    }

    fn latency(&self, faults: u64) -> FaultLatency {
        FaultLatency {
            p50: self.percentile(faults, 50),
            p99: self.percentile(faults, 99),
            max: micros(self.max),
            histogram: self.histogram(),
        }
    }

    /// Shows them among the numbers of a migration that is under way.
    pub(crate) fn show_in(&self, progress: &mut Progress) {
        progress.faults = self.counts.iter().sum();
        progress.fault_p50_us = self.percentile(progress.faults, 50);
        progress.fault_p99_us = self.percentile(progress.faults, 99);
        progress.fault_max_us = micros(self.max);
        progress.blocktime_us = micros(self.blocktime());
    }

    fn blocktime(&self) -> Duration {
        self.threads.values().map(|(_, waited)| *waited).sum()
    }

    /// The upper end of the step that so many percent of all are in or below.
    fn percentile(&self, all: u64, percent: u64) -> u64 {
        let wanted = (all * percent).div_ceil(100).max(1);
        let mut seen = 0;
        let step = self.counts.iter().position(|count| {
            seen += count;
            seen >= wanted
        });
        step.map_or(0, |step| end_of(step).min(micros(self.max)))
    }

    /// Entry n: waits of 2^n to 2^(n+1) µs; those below 1 µs are in the first.
    fn histogram(&self) -> Vec<u64> {
        let mut powers: Vec<u64> = self.counts.chunks(STEPS).map(|steps| steps.iter().sum()).collect();
        while powers.last() == Some(&0) {
            powers.pop();
        }
        powers
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

/// The step of a number of microseconds.
fn step_of(us: u64) -> usize {
    let power = us.max(1).ilog2() as usize;
    let within = ((us.max(1) - (1 << power)) * STEPS as u64) >> power;
    power * STEPS + usize::try_from(within).unwrap_or(0)
}

/// The last microsecond of a step.
fn end_of(step: usize) -> u64 {
    let (power, within) = (step / STEPS, (step % STEPS) as u64 + 1);
    (1 << power) + (within << power).div_ceil(STEPS as u64) - 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_wait_is_within_its_step() {
        for us in (0..5000).chain([1 << 20, (1 << 20) + 12345, 1 << 38]) {
            let step = step_of(us);
            assert!(end_of(step) >= us, "{us}");
            assert!(step == 0 || end_of(step) <= us.max(1) * 9 / 8, "{us} {}", end_of(step));
        }
    }

    #[test]
    fn percentiles_and_threads_are_those_of_the_waits() {
        let mut figures = FaultFigures::default();
        assert_eq!(figures.report().fault_us, FaultLatency::default());
        for us in 1..=1000 {
            figures.count(us % 4, Duration::from_micros(us.into()));
        }
        let PageFaults { faults, fault_us, threads, .. } = figures.report();
        assert_eq!((faults, threads.len(), fault_us.max), (1000, 4, 1000));
        assert!((500..=563).contains(&fault_us.p50), "{fault_us:?}");
        assert!((990..=1000).contains(&fault_us.p99), "{fault_us:?}");
        assert_eq!(fault_us.histogram, [1, 2, 4, 8, 16, 32, 64, 128, 256, 489]);
        assert_eq!(threads.iter().map(|thread| thread.blocktime_us).sum::<u64>(), 500_500);
        let mut progress = Progress::default();
        figures.show_in(&mut progress);
        assert_eq!((progress.faults, progress.blocktime_us), (1000, 500_500));
        let shown = (progress.fault_p50_us, progress.fault_p99_us, progress.fault_max_us);
        assert_eq!(shown, (fault_us.p50, fault_us.p99, fault_us.max));
    }
}
