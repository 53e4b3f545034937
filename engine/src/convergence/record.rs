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
    /// Pause the guest and switch to post-copy: the rounds do not shrink, or the total deadline has
    /// passed.
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
    /// From the instant that [`Precopy::guest_paused_at`](crate::Precopy::guest_paused_at) named
    /// until the last bitmap sync.
    pub pause_us: u64,
    /// Collecting the dirty bits of the stopped guest.
    pub bitmap_sync_us: u64,
    /// Waiting for [`Control::proceed`](crate::Control::proceed), with pause-before-switchover.
    pub hold_us: u64,
    /// Sending the last pages, to the last sync point.
    pub last_ram_us: u64,
    /// From there to [`StopCopy::commit`](crate::StopCopy::commit): the embedder saves the device
    /// state.
    pub state_save_us: u64,
    /// Sending it.
    pub device_state_us: u64,
    /// The destination's embedder loads it, as a multifd destination says.
    pub load_us: u64,
    /// Waiting for the destination's SHUT, apart from that.
    pub acknowledgement_us: u64,
}

impl DowntimeLedger {
    /// All of it.
    pub fn total(&self) -> Duration {
        let sum = self.parts().into_iter().fold(0, |sum: u64, (_, part)| sum.saturating_add(part));
        Duration::from_micros(sum)
    }

    /// What RAM has no part in: for [`Limits::device_downtime`](crate::Limits::device_downtime) of
    /// the next migration of such a guest.
    pub fn beyond_ram(&self) -> Duration {
        let ram = [self.bitmap_sync_us, self.last_ram_us, self.hold_us];
        let ram = Duration::from_micros(ram.into_iter().fold(0, u64::saturating_add));
        self.total().saturating_sub(ram)
    }

    /// All of it by name, in the order of time.
    pub(crate) fn parts(&self) -> [(&'static str, u64); 8] {
        [
            ("pause", self.pause_us),
            ("bitmap sync", self.bitmap_sync_us),
            ("hold", self.hold_us),
            ("last RAM", self.last_ram_us),
            ("saving device state", self.state_save_us),
            ("sending device state", self.device_state_us),
            ("loading at the destination", self.load_us),
            ("acknowledgement", self.acknowledgement_us),
        ]
    }
}

impl fmt::Display for DowntimeLedger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, (name, micros)) in self.parts().into_iter().enumerate() {
            write!(f, "{}{name} {micros} µs", if index == 0 { "" } else { ", " })?;
        }
        Ok(())
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
