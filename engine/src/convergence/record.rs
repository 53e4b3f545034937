//! What was decided after each round, and what the downtime was made of.

use std::fmt;
use std::time::Duration;

use serde::Serialize;

/// What follows a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Decision {
    /// Give up: the rounds do not shrink, and the policy says so.
    AbortStalled,
    /// Give up: the total deadline has passed.
    AbortDeadline,
    /// Another round.
    Continue,
    /// Pause the guest and switch to post-copy: the rounds do not shrink, or the total deadline has passed.
    Postcopy,
    /// Stop the guest: what is left fits the downtime limit.
    SwitchOver,
    /// Stop the guest: the rounds do not shrink, and what is left fits the second limit.
    SwitchOverStalled,
}

/// One line of the decision log.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct RoundRecord {
    /// Number of the round, from 1.
    pub round: u64,
    /// Guest bytes that were dirty when it began, all of which it sent.
    pub dirty_bytes: u64,
    /// Bytes that it put on the wire.
    pub wire_bytes: u64,
    /// How long it took, in µs, the bitmap sync at its end not included.
    pub duration_us: u64,
    /// How long the bitmap sync at its end took, in µs.
    pub sync_us: u64,
    /// Guest bytes that went with content, per second in this round.
    pub bandwidth_bytes_per_s: u64,
    /// Guest bytes written per second while it ran.
    pub dirty_rate_bytes_per_s: u64,
    /// Guest bytes that are dirty after it.
    pub remaining_bytes: u64,
    /// Expected downtime if the guest were paused now, in µs.
    pub expected_downtime_us: u64,
    /// Share of time for which each vCPU should be throttled from now on, in percent; 0: none.
    pub throttle_percent: u8,
    /// What follows.
    pub decision: Decision,
    /// Why, with the numbers it was made from.
    pub reason: String,
}

/// Where the downtime went, in µs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct DowntimeLedger {
    /// Collecting the dirty bits of the stopped guest.
    pub bitmap_sync_us: u64,
    /// Sending the last pages, to the last sync point.
    pub last_ram_us: u64,
    /// From there to the last byte of device state: the embedder's saving of it is in here.
    pub device_state_us: u64,
    /// Waiting for the destination's SHUT.
    pub acknowledgement_us: u64,
}

impl DowntimeLedger {
    /// All of it.
    pub fn total(&self) -> Duration {
        let Self { bitmap_sync_us, last_ram_us, device_state_us, acknowledgement_us } = self;
        Duration::from_micros(bitmap_sync_us + last_ram_us + device_state_us + acknowledgement_us)
    }
}

impl fmt::Display for DowntimeLedger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { bitmap_sync_us, last_ram_us, device_state_us, acknowledgement_us } = self;
        write!(
            f,
            "bitmap sync {bitmap_sync_us} µs, last RAM {last_ram_us} µs, device state {device_state_us} µs, \
             acknowledgement {acknowledgement_us} µs"
        )
    }
}

impl fmt::Display for RoundRecord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        write!(
            f,
            "round {}  dirty {:.1} MiB  wire {:.1} MiB  {:.0} MiB/s  dirtied {:.0} MiB/s  left {:.1} MiB  est. downtime {} ms: {}",
            self.round,
            mib(self.dirty_bytes),
            mib(self.wire_bytes),
            mib(self.bandwidth_bytes_per_s),
            mib(self.dirty_rate_bytes_per_s),
            mib(self.remaining_bytes),
            self.expected_downtime_us / 1000,
            self.reason
        )
    }
}
