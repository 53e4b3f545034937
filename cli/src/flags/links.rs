//! Flags of a source for what goes over more than one link.

use std::num::NonZeroU64;
use std::time::Duration;

use clap::Args;

use super::Rate;
use crate::human;

/// What becomes of a link that breaks.
#[derive(Debug, Args)]
pub(crate) struct Resumption {
    /// When the link to a multifd destination with --resume-for breaks before the guest is handed
    /// over, dial again for this long, and send only what has not come, or is newer. Default: fail
    #[arg(long, value_name = "TIME", value_parser = human::duration)]
    pub(crate) resume_for: Option<Duration>,
    /// With --resume-for: send everything again to a destination that has ended meanwhile and knows
    /// nothing of the move. Default: fail
    #[arg(long, requires = "resume_for")]
    pub(crate) resume_anew: bool,
}

/// How RAM follows a guest that runs at the destination.
#[derive(Debug, Args)]
pub(crate) struct Following {
    /// With --postcopy: a connection of its own for pages that the guest waits for (QEMU:
    /// capability postcopy-preempt)
    #[arg(long, requires = "postcopy")]
    pub(crate) postcopy_preempt: bool,
    /// With --postcopy: limit of what goes before the guest asks for it, such as 100MiB/s; 0:
    /// unlimited. Default: unlimited
    #[arg(long, value_name = "RATE", requires = "postcopy", value_parser = human::rate)]
    pub(crate) max_postcopy_bandwidth: Option<Rate>,
    /// With --postcopy: when the link breaks, dial again for this long, and go on where it broke
    /// (QEMU: migrate-recover). Default: end with exit code 3
    #[arg(long, value_name = "TIME", requires = "postcopy", value_parser = human::duration)]
    pub(crate) recover: Option<Duration>,
}

impl Following {
    /// Bytes per second of what nothing waits for.
    pub(crate) fn max_bandwidth(&self) -> Option<NonZeroU64> {
        self.max_postcopy_bandwidth.and_then(|Rate(rate)| rate)
    }
}
