//! When to stop the guest: after each round, from measured numbers only. No I/O, no clock.

mod decide;
mod record;
mod throttle;

pub use decide::{Convergence, Limits, OnStall, RoundFacts};
pub use record::{Decision, DowntimeLedger, RoundRecord};
pub use throttle::AutoConverge;
