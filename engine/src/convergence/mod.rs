//! When to stop the guest: after each round, from measured numbers only. No I/O, no clock.

mod decide;
mod record;
mod throttle;

pub use decide::{Limits, OnStall};
pub use record::{Decision, DowntimeLedger, RoundRecord};
pub use throttle::AutoConverge;

pub(crate) use decide::{Convergence, RoundFacts};
