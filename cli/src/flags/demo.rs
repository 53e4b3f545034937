//! Flags of the demo, and when its source gives up.

use std::time::Duration;

use clap::{Args, ValueEnum};
use multifd_engine::{Limits, OnStall};

use super::{Proof, Rate};
use crate::human;

#[derive(Debug, Args)]
pub(crate) struct Demo {
    /// The guest's RAM
    #[arg(long, value_name = "SIZE", default_value = "512M", value_parser = human::size)]
    pub(crate) ram: u64,
    /// What the guest writes, in whole pages per second; 0 is nothing
    #[arg(long, value_name = "RATE", default_value = "32MiB/s", value_parser = human::rate)]
    pub(crate) dirty_rate: Rate,
    /// Hold the guest back when it writes faster than its pages are sent
    #[arg(long)]
    pub(crate) auto_converge: bool,
    /// Send pages that are written again as differences, with a cache of this size (a power of two)
    #[arg(long, value_name = "SIZE", value_parser = human::cache)]
    pub(crate) xbzrle_cache: Option<u64>,
    /// Start the guest at the destination at once, and have its RAM follow while it runs
    #[arg(long)]
    pub(crate) postcopy: bool,
    /// With --postcopy: a connection of its own for pages that the guest waits for
    #[arg(long, requires = "postcopy")]
    pub(crate) postcopy_preempt: bool,
    /// In post-copy: how many such connections, 0 to 8; 0: such pages go on main. With --channels
    /// also without --postcopy-preempt. Default: 1
    #[arg(long, value_name = "N", value_parser = super::links::urgent_channels())]
    pub(crate) postcopy_urgent_channels: Option<u8>,
    /// When the guest is paused, compare all of its RAM with what was sent: finds writes that the
    /// dirty log has missed
    #[arg(long, conflicts_with = "postcopy")]
    pub(crate) audit: bool,
    #[command(flatten)]
    pub(crate) proof: Proof,
    #[command(flatten)]
    pub(crate) convergence: Convergence,
}

impl Demo {
    /// The guest may go on at the destination before its RAM is there.
    pub(crate) fn may_switch(&self) -> bool {
        self.postcopy || matches!(self.convergence.on_stall, Stall::Postcopy)
    }
}

#[derive(Debug, Args)]
pub(crate) struct DemoDestination {
    /// The guest may run here before its RAM is here
    #[arg(long)]
    pub(crate) postcopy: bool,
}

/// When a live source gives up, or stops its guest although that takes longer than it should.
#[derive(Debug, Args)]
pub(crate) struct Convergence {
    /// When rounds no longer shrink: continue, abort, switch over at a minimum within
    /// --stall-limit, or have the rest of RAM follow the guest (post-copy); the last also when
    /// --deadline has passed
    #[arg(long, value_enum, value_name = "WHAT", default_value_t = Stall::Continue)]
    pub(crate) on_stall: Stall,
    /// The second downtime limit, for --on-stall switch
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = human::duration)]
    pub(crate) stall_limit: Duration,
    /// Total time after which to give up
    #[arg(long, value_name = "TIME", value_parser = human::duration)]
    pub(crate) deadline: Option<Duration>,
    /// Limit over all channels while the guest is paused, such as 10Gbit/s, where --max-bandwidth
    /// does not hold; 0: unlimited. Default: unlimited
    #[arg(long, value_name = "RATE", value_parser = human::rate)]
    pub(crate) max_switchover_bandwidth: Option<Rate>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum Stall {
    Abort,
    Continue,
    Postcopy,
    Switch,
}

impl Convergence {
    pub(crate) fn limits(&self, downtime_limit: Duration) -> Limits {
        let on_stall = match self.on_stall {
            Stall::Abort => OnStall::Abort,
            Stall::Continue => OnStall::Continue,
            Stall::Postcopy => OnStall::Postcopy,
            Stall::Switch => OnStall::SwitchBelow(self.stall_limit),
        };
        let max_switchover_bandwidth = self.max_switchover_bandwidth.and_then(|Rate(limit)| limit);
        Limits {
            downtime_limit,
            on_stall,
            deadline: self.deadline,
            max_switchover_bandwidth,
            ..Limits::default()
        }
    }
}
