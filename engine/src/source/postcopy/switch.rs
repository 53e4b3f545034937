//! The switch: what is stale at the destination is discarded there, the devices go, the guest
//! starts.

use std::sync::Arc;
use std::time::Instant;

use multifd_transports::Channel;
use multifd_wire::{Command, DiscardRange, Item, MAX_DISCARD_RANGES, SETUP_PING};

use super::urgent::say_end_of_records;
use super::{Neighbours, Postcopy, PostcopySettings};
use crate::convergence::DowntimeLedger;
use crate::error::{Error, ErrorKind, Phase, Result};
use crate::guest::PAGE;
use crate::run::session::HandOver;
use crate::run::state::MigrationState;
use crate::source::carrier::Carrier;
use crate::source::device_state::DeviceState;
use crate::source::migration::{Migration, micros};
use crate::source::precopy::Precopy;
use crate::source::return_path::LOADED_PING;
use crate::stream::dialect::{FEATURE_NEIGHBOURS, FEATURE_POSTCOPY_CHANNELS, FEATURE_URGENT_CHANNELS};
use crate::work::{ScanPlace, UrgentPages};

/// Pages that may be wanted at a time: 1.5 MiB of queue. A request that finds it full is served in
/// the pages' turn.
const MOST_WANTED: usize = 1 << 16;

/// The values of the PINGs at the switch, which are QEMU's: behind the discards, and behind the
/// device state.
const DISCARDED_PING: u32 = 2;
const DEVICES_PING: u32 = 3;

/// What the switch leaves.
pub(super) struct Switched {
    pub(super) settings: PostcopySettings,
    pub(super) place: ScanPlace,
    /// The channels for pages that are asked for.
    pub(super) urgent: Vec<Arc<Channel>>,
    /// The parallel channels carry the background stream.
    pub(super) keeps_channels: bool,
    pub(super) ledger: DowntimeLedger,
    pub(super) handed_over: Instant,
}

/// Connections for pages that are asked for, before the switch.
#[derive(Default)]
pub(in crate::source) struct UrgentChannels {
    all: Vec<Arc<Channel>>,
    /// Those that have said to a multifd destination what they are.
    known: usize,
}

impl Precopy {
    /// Connects what the switch to post-copy will need, while the guest runs:
    /// [`Precopy::switch_to_postcopy`] does it otherwise, in the downtime.
    ///
    /// # Errors
    /// Anything that broke the migration; the guest may run on.
    pub fn prepare_postcopy(&mut self) -> Result<()> {
        let result = self.migration.prepare_urgent_channels();
        self.migration.caused(result).map(drop)
    }

    /// Takes a connection of the caller's for the pages that the guest waits for, where the others
    /// are the caller's: one where
    /// [`SourceConfig::postcopy_preempt`](crate::SourceConfig::postcopy_preempt) asks for it, and
    /// with parallel channels as many as
    /// [`SourceConfig::postcopy_urgent_channels`](crate::SourceConfig::postcopy_urgent_channels)
    /// says, one a call.
    ///
    /// # Errors
    /// `ApiMisuse` if it was not asked for, or all are there already; the migration ends.
    pub fn with_urgent_channel(mut self, channel: Channel) -> Result<Self> {
        let result = self.migration.take_urgent_channel(channel);
        self.migration.caused(result)?;
        Ok(self)
    }

    /// Hands the guest over now, at any round from before the first on, and leaves the rest of its
    /// RAM to [`Postcopy::serve`], which must follow at once. The guest must be paused, and stay
    /// so; nothing may write to its memory any more.
    ///
    /// # Errors
    /// Anything that broke the migration; the guest may run on. `ApiMisuse` without
    /// [`SourceConfig::postcopy`](crate::SourceConfig::postcopy). After an `Ok` the guest is the
    /// destination's, as far as this end knows: a link that broke in the last moment shows in
    /// [`Postcopy::serve`].
    pub fn switch_to_postcopy(mut self, state: &DeviceState) -> Result<Postcopy> {
        let result = self.migration.switch(state);
        let switched = self.migration.caused(result)?;
        Postcopy::new(self.migration, switched, self.decisions)
    }
}

impl Migration {
    /// The channels for pages that are asked for, as far as they are not there yet. Gives how many
    /// of them serve.
    fn prepare_urgent_channels(&mut self) -> Result<usize> {
        let Some(settings) = self.postcopy else { return Ok(0) };
        if let Some(return_path) = &self.return_path {
            // Main must be known as such before a connection comes that has nothing to say who it
            // is; and what the destination can do, it has said before this.
            return_path.wait_for_pong(1, self.shared.session.timeout)?;
            if self.shared.peer_can(FEATURE_URGENT_CHANNELS) {
                // Behind ADVISE, from which on it takes connections that begin with a record.
                return_path.wait_for_pong(SETUP_PING, self.shared.session.timeout)?;
            }
        }
        let count = settings.urgent(&self.shared, self.can_keep_channels());
        self.open_urgent_channels(count)?;
        let UrgentChannels { all, known } = &mut self.urgent_channels;
        if self.shared.peer_can(FEATURE_URGENT_CHANNELS) {
            // Without a page a channel has said nothing, and a sync point would wait for it to be
            // told from a parallel one.
            for channel in all.iter().skip(*known) {
                say_end_of_records(channel).map_err(|error| {
                    let name = format!("channel of pages that are asked for ({})", channel.peer());
                    Error::io(Phase::Connect, "the first record", error).on(name)
                })?;
            }
            *known = all.len();
        }
        Ok(count.min(all.len()))
    }

    /// Dials until there are `count` channels for pages that are asked for.
    pub(in crate::source) fn open_urgent_channels(&mut self, count: usize) -> Result<()> {
        let stop = &self.shared.session.stop;
        while self.urgent_channels.all.len() < count {
            let Some(endpoint) = &self.dialer.endpoint else {
                let asked_for = self.postcopy.is_some_and(|settings| settings.preempt);
                if !asked_for || !self.urgent_channels.all.is_empty() {
                    break;
                }
                let detail = "a channel for pages that are asked for, but none was given beside the caller's connections";
                return Err(Error::new(ErrorKind::ApiMisuse, Phase::Connect, detail));
            };
            let channel = self.dialer.dial(endpoint, "the channel for pages that are asked for", stop)?;
            self.urgent_channels.all.push(self.dialer.adopt(channel, stop)?);
        }
        Ok(())
    }

    fn take_urgent_channel(&mut self, channel: Channel) -> Result<()> {
        let most = match self.postcopy {
            Some(settings) if settings.preempt => settings.urgent_channels.max(1),
            Some(settings) if matches!(self.carrier, Carrier::Channels(_)) => settings.urgent_channels,
            _ => 0,
        };
        if self.urgent_channels.all.len() >= most {
            let detail =
                "a channel for pages that are asked for, which was not asked for or is there already";
            return Err(Error::new(ErrorKind::ApiMisuse, Phase::Connect, detail));
        }
        self.urgent_channels.all.push(self.dialer.adopt(channel, &self.shared.session.stop)?);
        Ok(())
    }

    /// There are parallel channels, and the destination takes pages on them after the switch.
    fn can_keep_channels(&self) -> bool {
        matches!(self.carrier, Carrier::Channels(_)) && self.shared.peer_can(FEATURE_POSTCOPY_CHANNELS)
    }

    /// The sync point at the switch: behind all pages that went on the parallel channels, before
    /// the discards. The destination lets nothing that follows on them into memory before LISTEN.
    fn keep_channels(&mut self) -> Result<bool> {
        if !self.can_keep_channels() {
            return Ok(false);
        }
        // Without a round before, nothing was agreed on yet.
        self.agree()?;
        let Carrier::Channels(channels) = &self.carrier else { return Ok(false) };
        self.main.command(Command::PostcopyChannels)?;
        channels.sync()?;
        Ok(true)
    }

    fn switch(&mut self, state: &DeviceState) -> Result<Switched> {
        let settings = self.postcopy.ok_or_else(|| {
            let detail = "a switch to post-copy, which was not allowed when the migration began";
            Error::new(ErrorKind::ApiMisuse, Phase::Active, detail)
        })?;
        let urgent_channels = self.prepare_urgent_channels()?;
        let mut ledger = DowntimeLedger::default();
        let busy = self.alive.busy();
        self.begin_switch_over(&mut ledger, &busy)?;
        let begun = Instant::now();
        let keeps_channels = self.keep_channels()?;
        let urgent = UrgentPages::new(MOST_WANTED, &self.shared.ram.dirty);
        if self.shared.urgent.set(urgent).is_err() {
            return Err(Error::bug(Phase::Device, "pages were wanted before the switch to post-copy"));
        }
        let can_push = urgent_channels > 0 && self.shared.peer_can(FEATURE_NEIGHBOURS);
        if can_push && self.shared.neighbours.set(Neighbours::default()).is_err() {
            return Err(Error::bug(Phase::Device, "neighbours before the switch to post-copy"));
        }
        let ram = &self.shared.ram;
        // What was a hole when the migration began may have been written since, and no round
        // follows that would tell.
        ram.forget_holes();
        ram.host_pages.round_up();
        let place = ram.host_pages.first_place();
        let place = place.ok_or_else(|| Error::bug(Phase::Device, "a guest without RAM blocks"))?;
        self.discard()?;
        ledger.last_ram_us = micros(begun.elapsed());
        let begun = Instant::now();
        self.hand_over_early(state)?;
        // The background stream has main from here on.
        self.alive.end();
        ledger.device_state_us = micros(begun.elapsed());
        let mut urgent = std::mem::take(&mut self.urgent_channels.all);
        urgent.truncate(urgent_channels);
        Ok(Switched { settings, place, urgent, keeps_channels, ledger, handed_over: Instant::now() })
    }

    /// Has the destination drop every page that is stale there, or was never sent.
    fn discard(&mut self) -> Result<()> {
        let Self { main, shared, .. } = self;
        for (index, outgoing) in shared.ram.blocks.indexed() {
            for ranges in shared.ram.host_pages.dirty_ranges(index).chunks(MAX_DISCARD_RANGES) {
                let ranges = ranges.iter().map(|pages| DiscardRange {
                    offset: (pages.start * PAGE) as u64,
                    len: (pages.len() * PAGE) as u64,
                });
                let block = outgoing.block.name().clone();
                main.queue(Command::RamDiscard { block, ranges: ranges.collect() })?;
            }
        }
        main.ping(DISCARDED_PING)
    }

    /// The package that lets the destination run the guest before its RAM is there.
    fn hand_over_early(&mut self, state: &DeviceState) -> Result<()> {
        let command = |command: Command, out: &mut Vec<u8>| Item::Command(command).encode(out);
        let mut package = Vec::new();
        command(Command::PostcopyListen, &mut package);
        // Its length comes first, so it is in memory as a whole.
        state.send(|bytes| {
            package.extend_from_slice(bytes);
            Ok(())
        })?;
        command(Command::Ping(DEVICES_PING), &mut package);
        let mut run = Vec::new();
        // Its answer counts from the state below on.
        command(Command::Ping(LOADED_PING), &mut run);
        command(Command::PostcopyRun, &mut run);
        let len = package.len() + run.len();
        let len = u32::try_from(len).map_err(|_| {
            let detail = format!("{len} bytes of device state, expected less than 4 GiB for a post-copy");
            Error::new(ErrorKind::ApiMisuse, Phase::Device, detail)
        })?;
        self.main.command(Command::Packaged(len))?;
        self.main.raw(&package)?;
        // From here on no cancel is taken: one that came before is an error now.
        self.enter(MigrationState::PostcopyDevice)?;
        let session = &self.shared.session;
        session.set_hand_over(HandOver::Begun);
        let channel = self.main.channel();
        let before = channel.bytes_sent();
        // The point of no return: with RUN, the end of the package, the destination has all that it
        // needs to run the guest. If nothing of its last piece has left, the point has not been
        // reached.
        match channel.send_all(&run) {
            Err(error) if channel.bytes_sent() == before => Err(self.main.error(error)),
            // A link that broke shows when it is used next.
            Ok(()) | Err(_) => Ok(()),
        }
    }
}
