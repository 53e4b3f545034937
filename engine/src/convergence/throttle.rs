//! Auto-converge: how much to hold back vCPUs that write faster than we send. QEMU's rules
//! (docs/wire.md §20).

use std::time::Duration;

use serde::Serialize;

use crate::config::parameter::{self, OutOfRange};

/// Settings of the throttle, with QEMU's names and defaults. The engine says how much, the embedder
/// holds its vCPUs back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct AutoConverge {
    /// Dirty bytes in percent of sent bytes above which a period counts as not converging: 1..=100.
    /// Default 50.
    pub trigger_threshold: u8,
    /// The first step, in percent of a vCPU's time: 1..=99. Default 20 (cpu-throttle-initial).
    pub initial: u8,
    /// Each further step: 1..=99. Default 10 (cpu-throttle-increment).
    pub increment: u8,
    /// The most: `initial`..=99. Default 99 (max-cpu-throttle).
    pub max: u8,
    /// Take smaller steps where they are enough (cpu-throttle-tailslow). Default no.
    pub tailslow: bool,
}

/// Shortest time between two looks.
const PERIOD: Duration = Duration::from_secs(1);

/// Bad periods that trigger a step.
const TRIGGER: u32 = 2;

#[derive(Debug)]
pub(super) struct Throttle {
    settings: AutoConverge,
    percent: u8,
    bad_periods: u32,
    time: Duration,
    dirtied: u64,
    sent: u64,
}

impl Default for AutoConverge {
    fn default() -> Self {
        Self { trigger_threshold: 50, initial: 20, increment: 10, max: 99, tailslow: false }
    }
}

impl AutoConverge {
    /// The first setting that is out of its range.
    pub(crate) fn check(&self) -> Result<(), OutOfRange> {
        parameter::THROTTLE_TRIGGER_THRESHOLD.check(self.trigger_threshold)?;
        parameter::CPU_THROTTLE_INITIAL.check(self.initial)?;
        parameter::CPU_THROTTLE_INCREMENT.check(self.increment)?;
        parameter::MAX_CPU_THROTTLE.at_least(self.initial).check(self.max)
    }
}

impl Throttle {
    pub(super) fn new(settings: AutoConverge) -> Self {
        Self { settings, percent: 0, bad_periods: 0, time: Duration::ZERO, dirtied: 0, sent: 0 }
    }

    /// Notes a bitmap sync, with the bytes written and sent since the last one. Returns the
    /// throttle from now on.
    pub(super) fn on_sync(&mut self, elapsed: Duration, dirtied: u64, sent: u64) -> u8 {
        self.time += elapsed;
        self.dirtied += dirtied;
        self.sent += sent;
        if self.time <= PERIOD {
            return self.percent;
        }
        let threshold = self.sent / 100 * u64::from(self.settings.trigger_threshold);
        if self.dirtied > threshold {
            self.bad_periods += 1;
            if self.bad_periods >= TRIGGER {
                self.bad_periods = 0;
                self.percent = self.step(threshold);
            }
        }
        (self.time, self.dirtied, self.sent) = (Duration::ZERO, 0, 0);
        self.percent
    }

    fn step(&self, threshold: u64) -> u8 {
        let AutoConverge { initial, increment, max, tailslow, .. } = self.settings;
        if self.percent == 0 {
            return initial.min(max);
        }
        let increment = match tailslow {
            false => increment,
            true => {
                // What the guest may have of its time for the dirtied bytes to be as many as the
                // threshold.
                let now = u64::from(100 - self.percent);
                let ideal = now.saturating_mul(threshold) / self.dirtied.max(1);
                u8::try_from(now.saturating_sub(ideal)).unwrap_or(u8::MAX).min(increment)
            }
        };
        self.percent.saturating_add(increment).min(max)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_millis(1001);

    #[test]
    fn every_second_bad_period_is_a_step() {
        let mut throttle = Throttle::new(AutoConverge::default());
        let steps: Vec<u8> = (0..8).map(|_| throttle.on_sync(LONG, 60, 100)).collect();
        assert_eq!(steps, [0, 20, 20, 30, 30, 40, 40, 50]);
    }

    #[test]
    fn a_good_period_is_no_step() {
        let mut throttle = Throttle::new(AutoConverge::default());
        assert!((0..10).all(|_| throttle.on_sync(LONG, 50, 100) == 0));
    }

    #[test]
    fn short_rounds_add_up_to_a_period() {
        let mut throttle = Throttle::new(AutoConverge::default());
        let steps: Vec<u8> =
            (0..22).map(|_| throttle.on_sync(Duration::from_millis(100), 100, 100)).collect();
        assert_eq!(steps.iter().position(|step| *step == 20), Some(21));
    }

    #[test]
    fn the_maximum_is_kept() {
        let mut throttle = Throttle::new(AutoConverge { max: 45, ..AutoConverge::default() });
        let last = (0..100).map(|_| throttle.on_sync(LONG, 100, 100)).last();
        assert_eq!(last, Some(45));
    }

    #[test]
    fn tailslow_takes_the_step_that_is_enough() {
        let mut throttle = Throttle::new(AutoConverge { tailslow: true, ..AutoConverge::default() });
        throttle.on_sync(LONG, 1000, 1000);
        throttle.on_sync(LONG, 1000, 1000);
        // 80 % of its time gives 520 where 500 would do: 80 * 500 / 520 = 76, so 4 more.
        throttle.on_sync(LONG, 520, 1000);
        assert_eq!(throttle.on_sync(LONG, 520, 1000), 24);
    }

    #[test]
    fn settings_out_of_range_are_named() {
        let wrong = AutoConverge { max: 10, ..AutoConverge::default() };
        assert_eq!(wrong.check().unwrap_err().to_string(), "max-cpu-throttle 10, expected 20..=99");
        assert_eq!(AutoConverge::default().check(), Ok(()));
    }

    #[test]
    fn the_defaults_are_those_of_qemu() {
        let AutoConverge { trigger_threshold, initial, increment, max, tailslow } = AutoConverge::default();
        assert_eq!(u64::from(trigger_threshold), parameter::THROTTLE_TRIGGER_THRESHOLD.default);
        assert_eq!(u64::from(initial), parameter::CPU_THROTTLE_INITIAL.default);
        assert_eq!(u64::from(increment), parameter::CPU_THROTTLE_INCREMENT.default);
        assert_eq!(u64::from(max), parameter::MAX_CPU_THROTTLE.default);
        assert_eq!(tailslow, parameter::CPU_THROTTLE_TAILSLOW.default);
    }
}
