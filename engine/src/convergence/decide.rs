//! The decision after a round.

use std::num::NonZeroU64;
use std::time::Duration;

use serde::Serialize;

use super::record::{Decision, RoundRecord};
use super::throttle::{AutoConverge, Throttle};

/// How far a migration may go. All of it can be changed while it runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Limits {
    /// Longest time for which the guest may be paused. Default: 300 ms.
    pub downtime_limit: Duration,
    /// Guest bytes per second to expect at the switch-over; `None`, the default: what was measured.
    pub avail_switchover_bandwidth: Option<NonZeroU64>,
    /// Bytes per second over all channels from the switch-over on, while the guest is paused.
    /// `None`, the default: no limit, as in QEMU. Not to be taken for `avail_switchover_bandwidth`,
    /// which changes an estimate and holds nothing back.
    pub max_switchover_bandwidth: Option<NonZeroU64>,
    /// Expected part of the downtime that RAM has no part in: until the guest is paused, saving and
    /// loading its devices. Of an earlier migration,
    /// [`DowntimeLedger::beyond_ram`](super::DowntimeLedger::beyond_ram) has it. Default: 0.
    pub device_downtime: Duration,
    /// What to do when rounds no longer shrink. Default: go on.
    pub on_stall: OnStall,
    /// Gives up when rounds have not shrunk for this long, if `on_stall` has not ended it before.
    /// `None`: never, as QEMU. Default: 10 minutes.
    pub stall_deadline: Option<Duration>,
    /// Total time after which to give up. Default: none.
    pub deadline: Option<Duration>,
}

/// What to do when rounds no longer shrink.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum OnStall {
    /// Give up; the guest stays.
    Abort,
    /// Go on, as QEMU does: the guest's load may change.
    #[default]
    Continue,
    /// Hand the guest over at once, and have its RAM follow:
    /// [`Precopy::switch_to_postcopy`](crate::Precopy::switch_to_postcopy). Also when the deadline
    /// has passed.
    Postcopy,
    /// Stop the guest at a local minimum, if that takes no longer than this second limit.
    SwitchBelow(Duration),
}

/// Measurements of one round.
#[derive(Clone, Copy, Debug)]
pub struct RoundFacts {
    /// Guest bytes dirty when the round began.
    pub dirty_bytes: u64,
    /// Those of them that went with content. Zero pages cost next to nothing, and what a guest
    /// writes is rarely zero: a rate that counts them promises too much for the switch-over.
    pub content_bytes: u64,
    /// Guest bytes dirty when the round ended: written while it ran.
    pub remaining_bytes: u64,
    /// Bytes put on the wire.
    pub wire_bytes: u64,
    /// Time to send the round, without the bitmap sync at its end.
    pub duration: Duration,
    /// Time of the bitmap sync at the round's end.
    pub sync: Duration,
    /// Time since the migration began.
    pub elapsed: Duration,
}

/// Rounds without progress that make a stall. Three: one may be an accident of scheduling.
const STALLED_ROUNDS: u32 = 3;

/// A round makes progress if it leaves less than this share of the best before: 95 %.
const PROGRESS_PERCENT: u64 = 95;

/// Guest bytes below which a round's bandwidth says nothing: fixed costs are most of it. 256 pages.
const MEASURABLE_BYTES: u64 = 1 << 20;

/// Decides after each round whether to go on. No I/O, no clock: a model of a migration can run it,
/// too.
#[derive(Debug)]
pub struct Convergence {
    round: u64,
    /// Guest bytes per second to expect at the switch-over, from the rounds that were large enough
    /// to tell.
    bandwidth: Option<u64>,
    best_remaining: u64,
    rounds_without_progress: u32,
    /// Since the begin of the migration, at the last round with progress.
    progress_at: Duration,
    throttle: Option<Throttle>,
}

impl Convergence {
    /// Before the first round.
    pub fn new(auto_converge: Option<AutoConverge>) -> Self {
        Self {
            round: 0,
            bandwidth: None,
            best_remaining: u64::MAX,
            rounds_without_progress: 0,
            progress_at: Duration::ZERO,
            throttle: auto_converge.map(Throttle::new),
        }
    }

    /// The line of the decision log for the round that has just ended.
    pub fn on_round(&mut self, facts: RoundFacts, limits: &Limits) -> RoundRecord {
        self.round += 1;
        let measured = per_second(facts.content_bytes, facts.duration);
        let estimate = match self.bandwidth {
            None => measured,
            Some(before) if facts.content_bytes < MEASURABLE_BYTES => before,
            Some(before) => cautious(before, measured),
        };
        self.bandwidth = Some(estimate);
        let bandwidth = limits.avail_switchover_bandwidth.map_or(estimate, NonZeroU64::get);
        let most = limits.max_switchover_bandwidth.map_or(u64::MAX, NonZeroU64::get);
        let expected = expected_downtime(facts.remaining_bytes, bandwidth.min(most), facts.sync)
            .saturating_add(limits.device_downtime);
        self.note_progress(&facts);
        let throttle_percent = self.throttle.as_mut().map_or(0, |throttle| {
            throttle.on_sync(facts.duration + facts.sync, facts.remaining_bytes, facts.dirty_bytes)
        });
        let (decision, reason) = self.decide(&facts, limits, expected);
        RoundRecord {
            round: self.round,
            dirty_bytes: facts.dirty_bytes,
            wire_bytes: facts.wire_bytes,
            duration_us: micros(facts.duration),
            sync_us: micros(facts.sync),
            bandwidth_bytes_per_s: measured,
            dirty_rate_bytes_per_s: per_second(facts.remaining_bytes, facts.duration + facts.sync),
            remaining_bytes: facts.remaining_bytes,
            expected_downtime_us: micros(expected),
            throttle_percent,
            decision,
            reason,
        }
    }

    fn note_progress(&mut self, facts: &RoundFacts) {
        let remaining = facts.remaining_bytes;
        let enough = u128::from(self.best_remaining) * u128::from(PROGRESS_PERCENT) / 100;
        if u128::from(remaining) < enough {
            self.rounds_without_progress = 0;
            self.progress_at = facts.elapsed;
        } else {
            self.rounds_without_progress += 1;
        }
        self.best_remaining = self.best_remaining.min(remaining);
    }

    fn decide(&self, facts: &RoundFacts, limits: &Limits, expected: Duration) -> (Decision, String) {
        let limit = limits.downtime_limit;
        if facts.remaining_bytes == 0 || expected <= limit {
            return (
                Decision::SwitchOver,
                format!("switch over: {expected:.1?} is within the limit of {limit:?}"),
            );
        }
        if let Some(deadline) = limits.deadline.filter(|deadline| facts.elapsed >= *deadline) {
            let why = format!(
                "{expected:.1?} is over the limit of {limit:?}, the deadline of {deadline:?} has passed"
            );
            return match limits.on_stall {
                OnStall::Postcopy => (Decision::Postcopy, format!("switch to post-copy: {why}")),
                _ => (Decision::AbortDeadline, format!("give up: {why}")),
            };
        }
        let over = format!("{expected:.1?} is over the limit of {limit:?}");
        if self.rounds_without_progress < STALLED_ROUNDS {
            return (Decision::Continue, format!("go on: {over}"));
        }
        let stalled = format!("{over}, {} rounds without progress", self.rounds_without_progress);
        let for_so_long = facts.elapsed.saturating_sub(self.progress_at);
        let gives_up = limits.stall_deadline.is_some_and(|limit| for_so_long >= limit);
        match limits.on_stall {
            OnStall::Abort => (Decision::AbortStalled, format!("give up: {stalled}")),
            OnStall::Postcopy => (Decision::Postcopy, format!("switch to post-copy: {stalled}")),
            OnStall::SwitchBelow(second) if self.at_minimum(facts) && expected <= second => (
                Decision::SwitchOverStalled,
                format!("switch over: {stalled}, but within the second limit of {second:?}"),
            ),
            _ if gives_up => (Decision::AbortStalled, format!("give up: {stalled} in {for_so_long:.1?}")),
            OnStall::Continue => (Decision::Continue, format!("go on: {stalled}")),
            OnStall::SwitchBelow(second) => {
                (Decision::Continue, format!("go on: {stalled}, waiting for a minimum within {second:?}"))
            }
        }
    }

    /// About as low as it has ever been.
    fn at_minimum(&self, facts: &RoundFacts) -> bool {
        u128::from(facts.remaining_bytes) * u128::from(PROGRESS_PERCENT)
            <= u128::from(self.best_remaining) * 100
    }
}

/// Sending what is left, and collecting the dirty bits once more.
fn expected_downtime(remaining: u64, bandwidth: u64, sync: Duration) -> Duration {
    if remaining == 0 {
        return sync;
    }
    let micros = u128::from(remaining) * 1_000_000 / u128::from(bandwidth.max(1));
    sync + Duration::from_micros(u64::try_from(micros).unwrap_or(u64::MAX / 2))
}

/// Bad news is believed at once, good news by half, min(measured, mean): one fast round does not
/// predict the next.
fn cautious(before: u64, measured: u64) -> u64 {
    measured.min(before.saturating_add(measured.saturating_sub(before) / 2))
}

fn per_second(bytes: u64, time: Duration) -> u64 {
    u64::try_from(u128::from(bytes) * 1_000_000_000 / time.as_nanos().max(1)).unwrap_or(u64::MAX)
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            downtime_limit: Duration::from_millis(300),
            avail_switchover_bandwidth: None,
            max_switchover_bandwidth: None,
            device_downtime: Duration::ZERO,
            on_stall: OnStall::Continue,
            stall_deadline: Some(Duration::from_secs(600)),
            deadline: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    /// A round that sent `dirty` MiB in 1 s and left `remaining` MiB.
    fn facts(dirty: u64, remaining: u64) -> RoundFacts {
        RoundFacts {
            dirty_bytes: dirty * MIB,
            content_bytes: dirty * MIB,
            remaining_bytes: remaining * MIB,
            wire_bytes: dirty * MIB,
            duration: Duration::from_secs(1),
            sync: Duration::ZERO,
            elapsed: Duration::from_secs(1),
        }
    }

    fn decisions(limits: &Limits, rounds: &[(u64, u64)]) -> Vec<Decision> {
        let mut convergence = Convergence::new(None);
        rounds
            .iter()
            .map(|(dirty, left)| convergence.on_round(facts(*dirty, *left), limits).decision)
            .collect()
    }

    #[test]
    fn switches_over_exactly_at_the_limit() {
        let limits = Limits::default();
        assert_eq!(decisions(&limits, &[(1000, 301)]), [Decision::Continue]);
        assert_eq!(decisions(&limits, &[(1000, 300)]), [Decision::SwitchOver]);
    }

    #[test]
    fn a_given_bandwidth_counts_more_than_the_measured_one() {
        let limits = Limits { avail_switchover_bandwidth: NonZeroU64::new(100 * MIB), ..Limits::default() };
        assert_eq!(decisions(&limits, &[(1000, 31)]), [Decision::Continue]);
        assert_eq!(decisions(&limits, &[(1000, 30)]), [Decision::SwitchOver]);
    }

    #[test]
    fn a_limit_at_the_switchover_and_the_devices_are_in_the_estimate() {
        let limits = Limits { max_switchover_bandwidth: NonZeroU64::new(100 * MIB), ..Limits::default() };
        assert_eq!(decisions(&limits, &[(1000, 31)]), [Decision::Continue]);
        assert_eq!(decisions(&limits, &[(10, 30)]), [Decision::Continue], "it makes nothing faster");
        let limits = Limits { device_downtime: Duration::from_millis(200), ..Limits::default() };
        assert_eq!(decisions(&limits, &[(1000, 101)]), [Decision::Continue]);
        assert_eq!(decisions(&limits, &[(1000, 100)]), [Decision::SwitchOver]);
    }

    #[test]
    fn rounds_that_never_shrink_end_by_the_default_and_not_with_qemus_policy() {
        let last = |stall_deadline, on_stall| {
            let limits = Limits { stall_deadline, on_stall, ..Limits::default() };
            let mut convergence = Convergence::new(None);
            (1..=700)
                .map(|second| RoundFacts { elapsed: Duration::from_secs(second), ..facts(1000, 900) })
                .map(|facts| convergence.on_round(facts, &limits).decision)
                .find(|decision| *decision != Decision::Continue)
        };
        let default = Limits::default().stall_deadline;
        assert_eq!(last(default, OnStall::Continue), Some(Decision::AbortStalled));
        assert_eq!(
            last(default, OnStall::SwitchBelow(Duration::from_millis(800))),
            Some(Decision::AbortStalled)
        );
        assert_eq!(
            last(default, OnStall::SwitchBelow(Duration::from_secs(1))),
            Some(Decision::SwitchOverStalled)
        );
        assert_eq!(last(None, OnStall::Continue), None);
    }

    #[test]
    fn zero_pages_do_not_make_the_link_faster() {
        let mut convergence = Convergence::new(None);
        let sparse = RoundFacts { content_bytes: 100 * MIB, ..facts(1000, 31) };
        assert_eq!(convergence.on_round(sparse, &Limits::default()).decision, Decision::Continue);
    }

    #[test]
    fn a_faster_round_is_believed_by_half_and_a_slower_one_at_once() {
        assert_eq!((cautious(100, 200), cautious(200, 100), cautious(100, 100)), (150, 100, 100));
    }

    #[test]
    fn nothing_left_is_always_the_end() {
        let limits = Limits { downtime_limit: Duration::ZERO, ..Limits::default() };
        assert_eq!(decisions(&limits, &[(1000, 0)]), [Decision::SwitchOver]);
    }

    #[test]
    fn a_stall_follows_the_policy() {
        let rounds = [(1000, 500), (500, 490), (490, 500), (500, 495), (495, 480)];
        let last = |on_stall| decisions(&Limits { on_stall, ..Limits::default() }, &rounds).pop();
        assert_eq!(last(OnStall::Continue), Some(Decision::Continue));
        assert_eq!(last(OnStall::Abort), Some(Decision::AbortStalled));
        assert_eq!(last(OnStall::SwitchBelow(Duration::from_secs(1))), Some(Decision::SwitchOverStalled));
        assert_eq!(last(OnStall::SwitchBelow(Duration::from_millis(500))), Some(Decision::Continue));
    }

    #[test]
    fn shrinking_rounds_are_no_stall() {
        let limits = Limits { on_stall: OnStall::Abort, ..Limits::default() };
        let rounds = [(8000, 4000), (4000, 3700), (3700, 3400), (3400, 3100), (3100, 2800)];
        assert!(decisions(&limits, &rounds).iter().all(|decision| *decision == Decision::Continue));
    }

    #[test]
    fn the_deadline_ends_it() {
        let limits = Limits { deadline: Some(Duration::from_secs(1)), ..Limits::default() };
        assert_eq!(decisions(&limits, &[(1000, 900)]), [Decision::AbortDeadline]);
        assert_eq!(decisions(&limits, &[(1000, 100)]), [Decision::SwitchOver], "unless it is done");
    }

    #[test]
    fn a_tiny_round_does_not_change_the_bandwidth() {
        let mut convergence = Convergence::new(None);
        convergence.on_round(facts(1000, 400), &Limits::default());
        let tiny = RoundFacts { dirty_bytes: 4096, content_bytes: 4096, ..facts(0, 250) };
        assert_eq!(convergence.on_round(tiny, &Limits::default()).decision, Decision::SwitchOver);
    }
}
