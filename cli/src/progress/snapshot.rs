//! What is told of a migration at one time: amounts, rate, the time that is left.

use std::fmt;
use std::time::{Duration, Instant};

use multifd_engine::{PAGE, Progress};
use serde_json::{Value, json};

use crate::human::show_bytes;

/// Weight of the newest rate in the mean over the last seconds.
const NEWEST: f64 = 0.1;

/// Measures rates between looks at the counters.
pub(super) struct Meter {
    begun: Instant,
    last: Option<(Instant, u64, u64)>,
    /// Bytes a second, smoothed: on the wire, and of guest RAM that is done.
    wire: Option<f64>,
    done: Option<f64>,
}

/// One look.
#[derive(Clone, Debug)]
pub(super) struct Snapshot {
    pub(super) rounds: u64,
    pub(super) ram_bytes: u64,
    /// Bytes of the pages that have gone or come, in whatever form; more than all of RAM where
    /// pages went again.
    pub(super) done_bytes: u64,
    pub(super) wire_bytes: u64,
    elapsed: Duration,
    wire_rate: f64,
    /// Until every page has been moved once. `None`: that is so, or nothing is known yet.
    left: Option<Duration>,
}

impl Meter {
    pub(super) fn new(now: Instant) -> Self {
        Self { begun: now, last: None, wire: None, done: None }
    }

    pub(super) fn measure(&mut self, progress: &Progress, now: Instant) -> Snapshot {
        let pages = progress.pages_normal + progress.pages_zero + progress.pages_xbzrle;
        let (wire_bytes, done_bytes) = (progress.wire_bytes, pages * PAGE as u64);
        if let Some((then, wire, done)) = self.last {
            let seconds = now.duration_since(then).as_secs_f64();
            smooth(&mut self.wire, wire_bytes.saturating_sub(wire) as f64, seconds);
            smooth(&mut self.done, done_bytes.saturating_sub(done) as f64, seconds);
        }
        // The wait for a source that has sent nothing is not part of any rate.
        self.last = (wire_bytes > 0).then_some((now, wire_bytes, done_bytes));
        Snapshot {
            rounds: progress.rounds,
            ram_bytes: progress.ram_bytes,
            done_bytes,
            wire_bytes,
            elapsed: now.duration_since(self.begun),
            wire_rate: self.wire.unwrap_or(0.0),
            left: self.left(progress.ram_bytes.saturating_sub(done_bytes)),
        }
    }

    fn left(&self, bytes: u64) -> Option<Duration> {
        let rate = self.done.filter(|rate| *rate >= 1.0 && bytes > 0)?;
        Duration::try_from_secs_f64(bytes as f64 / rate).ok()
    }
}

fn smooth(mean: &mut Option<f64>, bytes: f64, seconds: f64) {
    if seconds > 0.0 {
        let newest = bytes / seconds;
        *mean = Some(mean.map_or(newest, |mean| mean + (newest - mean) * NEWEST));
    }
}

impl Snapshot {
    /// The same for programs.
    pub(super) fn event(&self, name: &str) -> Value {
        json!({
            "event": name,
            "elapsed_ms": u64::try_from(self.elapsed.as_millis()).unwrap_or(u64::MAX),
            "round": self.rounds,
            "ram_bytes": self.ram_bytes,
            "done_bytes": self.done_bytes,
            "wire_bytes": self.wire_bytes,
            "wire_bytes_per_second": self.wire_rate.round(),
            "left_s": self.left.map(|left| left.as_secs()),
        })
    }
}

impl fmt::Display for Snapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (done, ram) = (show_bytes(self.done_bytes), show_bytes(self.ram_bytes));
        let (wire, rate) = (show_bytes(self.wire_bytes), self.wire_rate * 8.0 / 1e9);
        write!(f, "round {}  {done} of {ram}  wire {wire}  {rate:.2} Gbit/s", self.rounds)?;
        match self.left.map(|left| left.as_secs()) {
            Some(left @ 0..60) => write!(f, "  {left} s left"),
            Some(left @ 60..3600) => write!(f, "  {} min {} s left", left / 60, left % 60),
            Some(left) => write!(f, "  {} h {} min left", left / 3600, left % 3600 / 60),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn progress(pages: u64) -> Progress {
        let mut progress = Progress::default();
        progress.ram_bytes = 1 << 30;
        progress.pages_normal = pages;
        progress.wire_bytes = pages * 4096;
        progress
    }

    #[test]
    fn the_time_left_is_what_the_rate_makes_of_the_rest() {
        let begun = Instant::now();
        let second = Duration::from_secs(1);
        let mut meter = Meter::new(begun);
        let first = meter.measure(&progress(0), begun);
        assert_eq!((first.left, first.to_string().contains("left")), (None, false));
        // The source comes after a minute; the rate is that of what it sends.
        meter.measure(&progress(1024), begun + 60 * second);
        let one = meter.measure(&progress(2048), begun + 61 * second);
        assert_eq!(one.left, Some(254 * second));
        assert!(one.to_string().ends_with("0.03 Gbit/s  4 min 14 s left"), "{one}");
        let event = one.event("progress");
        assert_eq!(event["left_s"], 254);
        assert_eq!((&event["done_bytes"], &event["elapsed_ms"]), (&json!(8 << 20), &json!(61_000)));
        let last = meter.measure(&progress(1 << 18), begun + 62 * second);
        assert_eq!(last.left, None);
    }
}
