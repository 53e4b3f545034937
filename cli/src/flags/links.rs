//! Flags of a source for what goes over more than one link.

use std::num::NonZeroU64;
use std::time::Duration;

use clap::Args;
use clap::builder::RangedI64ValueParser;

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
    /// With --postcopy: how many such connections to a multifd destination, 0 to 8; 0: none, such
    /// pages go on main. With --channels also without --postcopy-preempt. Default: 1
    #[arg(long, value_name = "N", requires = "postcopy", value_parser = urgent_channels())]
    pub(crate) postcopy_urgent_channels: Option<u8>,
    /// With --postcopy: limit of what goes before the guest asks for it, such as 100MiB/s; 0:
    /// unlimited. Default: unlimited
    #[arg(long, value_name = "RATE", requires = "postcopy", value_parser = human::rate)]
    pub(crate) max_postcopy_bandwidth: Option<Rate>,
    /// With --postcopy: when the link breaks, dial again for this long, and go on where it broke
    /// (QEMU: migrate-recover). Default: end with exit code 3
    #[arg(long, value_name = "TIME", requires = "postcopy", value_parser = human::duration)]
    pub(crate) recover: Option<Duration>,
}

/// As many as the engine takes.
pub(super) fn urgent_channels() -> RangedI64ValueParser<u8> {
    clap::value_parser!(u8).range(0..=8)
}

impl Following {
    /// Bytes per second of what nothing waits for.
    pub(crate) fn max_bandwidth(&self) -> Option<NonZeroU64> {
        self.max_postcopy_bandwidth.and_then(|Rate(rate)| rate)
    }
}
