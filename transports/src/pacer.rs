//! One byte rate over all channels.

use std::num::NonZeroU64;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use thiserror::Error;

/// A limit on bytes per second, shared by all sending threads, changeable meanwhile.
///
/// Each [`take`](Self::take) reserves its bytes at the end of the line and returns when all bytes
/// before its own are paid for by time: first come, first served, a large packet delays its
/// followers and not itself. Unused time is kept for 20 ms at most, so no more than that and one
/// packet goes out above the rate.
#[derive(Debug)]
pub struct Pacer {
    line: Mutex<Line>,
    changed: Condvar,
}

impl Pacer {
    /// `None`: unlimited.
    pub fn new(bytes_per_second: Option<NonZeroU64>) -> Self {
        Self { line: Mutex::new(Line::new(bytes_per_second, Instant::now())), changed: Condvar::new() }
    }

    /// Changes the rate, for threads that wait now, too.
    pub fn set_rate(&self, bytes_per_second: Option<NonZeroU64>) {
        self.lock().change_rate(bytes_per_second, Instant::now());
        self.changed.notify_all();
    }

    /// The rate in bytes per second; `None`: unlimited.
    pub fn rate(&self) -> Option<NonZeroU64> {
        self.lock().rate
    }

    /// Waits until `bytes` more may be sent.
    ///
    /// # Errors
    /// [`Stopped`] after [`stop`](Self::stop).
    pub fn take(&self, bytes: usize) -> Result<(), Stopped> {
        let mut line = self.lock();
        // What was paid before counts before the reservation, or idle time would pay for it.
        line.advance(Instant::now());
        let place = line.reserve(bytes);
        loop {
            if line.stopped {
                return Err(Stopped);
            }
            let Some(wait) = line.wait(place) else { return Ok(()) };
            let woken = self.changed.wait_timeout(line, wait);
            line = woken.unwrap_or_else(PoisonError::into_inner).0;
            line.advance(Instant::now());
        }
    }

    /// Counts `bytes` that go without a wait: what follows waits for them, too.
    pub fn charge(&self, bytes: usize) {
        let mut line = self.lock();
        line.advance(Instant::now());
        line.reserve(bytes);
    }

    /// How long until all that was counted is paid for; `None`: it is.
    pub fn debt(&self) -> Option<Duration> {
        let mut line = self.lock();
        line.advance(Instant::now());
        line.wait(line.reserved)
    }

    /// Ends every wait, now and later. Never blocks for long.
    pub fn stop(&self) {
        self.lock().stopped = true;
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, Line> {
        // No code of others runs under the lock, and every state of a line is valid.
        self.line.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The [`Pacer`] was stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("the pacer was stopped")]
pub struct Stopped;

/// All bytes ever reserved as one line, and how far time has paid for it. Exact in whole bytes and
/// nanoseconds.
#[derive(Debug)]
struct Line {
    rate: Option<NonZeroU64>,
    /// Bytes, from the beginning.
    reserved: u64,
    /// Bytes, from the beginning; `paid <= reserved + credit`.
    paid: u64,
    /// Up to when `paid` is right.
    paid_at: Instant,
    stopped: bool,
}

impl Line {
    fn new(rate: Option<NonZeroU64>, now: Instant) -> Self {
        Self { rate, reserved: 0, paid: 0, paid_at: now, stopped: false }
    }

    /// Turns the time up to `now` into paid bytes.
    fn advance(&mut self, now: Instant) {
        let most = self.reserved.saturating_add(self.credit());
        let Some(rate) = self.rate else {
            (self.paid, self.paid_at) = (most, now);
            return;
        };
        let elapsed = now.saturating_duration_since(self.paid_at);
        let earned = u64::try_from(elapsed.as_nanos() * u128::from(rate.get()) / NANOS).unwrap_or(u64::MAX);
        if self.paid.saturating_add(earned) >= most {
            (self.paid, self.paid_at) = (most, now);
        } else {
            self.paid += earned;
            // The time of the fraction of a byte that is not paid yet stays for the next call.
            self.paid_at += time_of(earned, rate);
        }
    }

    fn change_rate(&mut self, rate: Option<NonZeroU64>, now: Instant) {
        self.advance(now);
        self.rate = rate;
        // Credit of a high rate is not to be spent at a low one.
        self.advance(now);
    }

    /// Puts `bytes` at the end of the line; gives their place.
    fn reserve(&mut self, bytes: usize) -> u64 {
        let place = self.reserved;
        self.reserved = place.saturating_add(bytes as u64);
        place
    }

    /// How long until everything before `place` is paid; `None` if it is.
    fn wait(&self, place: u64) -> Option<Duration> {
        let rate = self.rate?;
        let missing = place.checked_sub(self.paid).filter(|missing| *missing > 0)?;
        // One nanosecond more than the rounded-down time, so that it is enough.
        Some(time_of(missing, rate) + Duration::from_nanos(1))
    }

    /// Bytes that idle time may pay in advance: 20 ms worth. It bridges the wake-up of a thread,
    /// and keeps the average over any second within 3 %.
    fn credit(&self) -> u64 {
        self.rate.map_or(0, |rate| rate.get() / 50)
    }
}

fn time_of(bytes: u64, rate: NonZeroU64) -> Duration {
    let nanos = u128::from(bytes) * NANOS / u128::from(rate.get());
    Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
}

/// Nanoseconds in a second.
const NANOS: u128 = 1_000_000_000;

#[cfg(test)]
mod tests;
