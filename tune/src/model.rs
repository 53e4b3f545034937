//! A model of a pre-copy move. docs/tuning.md has the formulas and their sources.
//!
//! The model calculates what each round takes; whether another follows is decided by the engine's
//! own [`Convergence`].

use std::num::NonZeroU64;
use std::time::Duration;

use multifd_codecs::CodecFamily;
use multifd_engine::unstable::{Convergence, RoundFacts};
use multifd_engine::{Decision, Limits, OnStall};

use super::findings::{Bottleneck, CodecFacts, DirtyFacts, Machine};
use super::rewrites;

/// A guest between two machines.
#[derive(Clone, Copy, Debug)]
pub(super) struct Model<'a> {
    pub(super) guest: Guest,
    pub(super) dirty: DirtyFacts,
    pub(super) machine: &'a Machine,
    pub(super) downtime_limit: Duration,
}

/// Sizes of the guest, in bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Guest {
    pub(super) ram: f64,
    /// Bytes of pages that are not zero.
    pub(super) data: f64,
    /// Bytes of device state.
    pub(super) devices: f64,
}

/// Settings of one move.
#[derive(Clone, Copy, Debug)]
pub(super) struct Setting<'a> {
    /// Bits on the wire, in bytes per second; `None`: both ends share this machine.
    pub(super) link: Option<f64>,
    /// `max-bandwidth`, in bytes per second.
    pub(super) limit: Option<f64>,
    /// Parallel channels; 0: everything on the main channel.
    pub(super) channels: usize,
    pub(super) codec: &'a CodecFacts,
    pub(super) ends: Ends,
}

/// The program at both ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ends {
    Multifd,
    Qemu,
}

/// The cost of a move, in seconds and bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Move {
    pub(super) total: f64,
    pub(super) downtime: f64,
    pub(super) rounds: u64,
    pub(super) wire: f64,
    pub(super) source_core: f64,
    pub(super) destination_core: f64,
    pub(super) converges: bool,
    pub(super) bottleneck: Bottleneck,
}

/// The cost of one round.
#[derive(Clone, Copy, Debug)]
struct Pass {
    /// Bytes of pages that are not zero.
    data: f64,
    seconds: f64,
    wire: f64,
    source_core: f64,
    destination_core: f64,
    bottleneck: Bottleneck,
}

const PAGE: f64 = 4096.0;

/// Bytes of a packet's header, and of the pages that it describes (docs/wire.md §7.2).
const PACKET_HEADER: f64 = 1344.0;
const PACKET_BYTES: f64 = 128.0 * PAGE;

/// Bytes on the main channel of a page's header, and of a zero page's record (docs/wire.md §5).
const RECORD_HEADER: f64 = 8.0;
const ZERO_RECORD: f64 = 9.0;

/// TCP's share of a link: 1448 bytes of payload in a frame of 1514, and 24 bytes of preamble,
/// checksum and gap around it.
const GOODPUT: f64 = 1448.0 / 1538.0;

/// Fixed costs of a move, in seconds: connections, headers, the destination's acknowledgement. The
/// time that an empty guest takes.
const FIXED: f64 = 0.015;

/// Downtime of a guest that has written nothing, in seconds: a sync of the dirty log, device state,
/// one round trip. Measured with the live guests of docs/performance.md.
const SWITCHOVER: f64 = 0.003;

/// QEMU's zlib relative to the one measured here: time to encode, time to decode, bytes of the
/// stream (docs/performance.md, 1 Gbit/s).
const QEMU_ZLIB: [f64; 3] = [3.6, 2.9, 0.86];

/// Seconds that QEMU's main thread spends per page to hand it to a channel: in `none-2-again` of
/// docs/performance.md its source takes 0.25 s of cores for 262144 pages, of which sending takes
/// 0.06.
const QEMU_PAGE: f64 = 0.7e-6;

/// Limit of rounds. A move that converges has far fewer: each round leaves at most 95 % of the one
/// before.
const MOST_ROUNDS: u64 = 200;

/// Longest time that is calculated with, in seconds: 30 years.
const LONGEST: f64 = 1e9;

impl Model<'_> {
    /// The whole move: rounds until the engine would stop the guest, or finds that they no longer
    /// shrink.
    pub(super) fn run(&self, setting: Setting<'_>) -> Move {
        let mut convergence = Convergence::new(None);
        let mut pass = self.first_pass(setting);
        let mut dirty = self.guest.ram;
        let mut sum = Move {
            total: FIXED + pass.seconds,
            downtime: 0.0,
            // The last one, with the guest paused, counts.
            rounds: 2,
            wire: self.guest.devices,
            source_core: 0.0,
            destination_core: 0.0,
            converges: true,
            bottleneck: pass.bottleneck,
        };
        sum.add(&pass);
        let (rate, working_set) = (self.dirty.bytes_per_s as f64, self.dirty.working_set_bytes as f64);
        loop {
            let left = rewrites::after(rate, working_set, pass.seconds);
            let facts = RoundFacts {
                dirty_bytes: whole(dirty),
                content_bytes: whole(pass.data),
                remaining_bytes: whole(left),
                wire_bytes: whole(pass.wire),
                duration: duration(pass.seconds),
                sync: Duration::ZERO,
                elapsed: duration(sum.total),
            };
            let decision = convergence.on_round(facts, &self.limits(setting, &pass)).decision;
            let next = self.pass(left, 0.0, setting);
            if decision != Decision::Continue || sum.rounds >= MOST_ROUNDS {
                sum.downtime = next.seconds + SWITCHOVER + self.on_link(self.guest.devices, setting);
                sum.converges = decision == Decision::SwitchOver;
                if !sum.converges {
                    sum.bottleneck = Bottleneck::DirtyRate;
                }
                sum.total += sum.downtime;
                sum.add(&next);
                return sum;
            }
            sum.rounds += 1;
            sum.total += next.seconds;
            sum.add(&next);
            (dirty, pass) = (left, next);
        }
    }

    /// What the source decides by. A stall ends the calculation: a guest that goes on like this
    /// never moves.
    fn limits(&self, setting: Setting<'_>, pass: &Pass) -> Limits {
        let avail_switchover_bandwidth = match setting.ends {
            Ends::Multifd => None,
            // QEMU compares bytes of pages with the rate of the wire (docs/wire.md §20).
            Ends::Qemu => NonZeroU64::new(whole(pass.wire / pass.seconds)),
        };
        let downtime_limit = self.downtime_limit;
        Limits { downtime_limit, avail_switchover_bandwidth, on_stall: OnStall::Abort, ..Limits::default() }
    }

    /// The round over all of the RAM. A zero page costs a header; QEMU also allocates the pages
    /// that its guest never touched, by looking for zeros in them.
    fn first_pass(&self, setting: Setting<'_>) -> Pass {
        let zero = self.guest.ram - self.guest.data;
        let mut pass = self.pass(self.guest.data, zero, setting);
        if setting.ends == Ends::Qemu {
            let made = zero * self.machine.touch_byte_s;
            pass.source_core += made;
            // Touched and untouched pages lie apart: nothing is sent meanwhile.
            pass.seconds += made / self.lanes(setting);
        }
        pass
    }

    /// A round over `data` bytes of pages that are not zero, and `zero` bytes of pages that are.
    fn pass(&self, data: f64, zero: f64, setting: Setting<'_>) -> Pass {
        let Machine { send_byte_s, receive_byte_s, .. } = *self.machine;
        let [slower, slower_back, size] = match setting.ends {
            Ends::Qemu if setting.codec.codec.family() == CodecFamily::Zlib => QEMU_ZLIB,
            _ => [1.0; 3],
        };
        let headers = match setting.channels {
            0 => (data * RECORD_HEADER + zero * ZERO_RECORD) / PAGE,
            _ => (data + zero) / PACKET_BYTES * PACKET_HEADER,
        };
        let wire = data / setting.codec.ratio * size + headers;
        let codec_time = |speed: Option<f64>| speed.map_or(0.0, |speed| data / speed);
        // QEMU has its guest's memory mapped, and populates new memory by page faults.
        let (look, store) = match setting.ends {
            Ends::Multifd => (self.machine.look_byte_s, self.store(setting)),
            Ends::Qemu => (0.0, self.machine.fault_byte_s),
        };
        let source_core =
            data * look + wire * send_byte_s + codec_time(setting.codec.encode_bytes_per_s) * slower;
        let destination_core =
            wire * receive_byte_s + codec_time(setting.codec.decode_bytes_per_s) * slower_back + data * store;
        let lanes = self.lanes(setting);
        // The work of one thread beside the channels'.
        let feeding = if setting.ends == Ends::Qemu { (data + zero) / PAGE * QEMU_PAGE } else { 0.0 };
        let ends = [(source_core / lanes).max(feeding), destination_core / lanes];
        let source_core = source_core + feeding;
        let shared = match setting.link {
            Some(_) => 0.0,
            None => (source_core + destination_core) / self.machine.cores as f64,
        };
        // A wait for shared cores counts for the end that works more.
        let [source, destination] = if source_core > destination_core {
            [ends[0].max(shared), ends[1]]
        } else {
            [ends[0], ends[1].max(shared)]
        };
        let link = self.on_link(wire, setting);
        let times = [
            (link, Bottleneck::Link),
            (source, Bottleneck::SourceCpu),
            (destination, Bottleneck::DestinationCpu),
        ];
        let (seconds, bottleneck) =
            times.into_iter().max_by(|(a, _), (b, _)| a.total_cmp(b)).unwrap_or((link, Bottleneck::Link));
        Pass { data, seconds, wire, source_core, destination_core, bottleneck }
    }

    /// Seconds to store a byte of new memory: one worker writes through the block's file, the
    /// others through the mapping (docs/architecture.md).
    fn store(&self, setting: Setting<'_>) -> f64 {
        let workers = setting.channels.max(1) as f64;
        (self.machine.land_byte_s + (workers - 1.0) * self.machine.fault_byte_s) / workers
    }

    /// Seconds that these bytes take on the wire.
    fn on_link(&self, bytes: f64, setting: Setting<'_>) -> f64 {
        let link = setting.link.map_or(0.0, |rate| bytes / (rate * GOODPUT));
        setting.limit.map_or(link, |limit| link.max(bytes / limit))
    }

    /// Threads that run at once at each end.
    fn lanes(&self, setting: Setting<'_>) -> f64 {
        setting.channels.clamp(1, self.machine.cores.max(1)) as f64
    }
}

impl Move {
    fn add(&mut self, pass: &Pass) {
        self.wire += pass.wire;
        self.source_core += pass.source_core;
        self.destination_core += pass.destination_core;
    }
}

fn duration(seconds: f64) -> Duration {
    // A time that is not a number never passes.
    Duration::try_from_secs_f64(seconds.clamp(0.0, LONGEST)).unwrap_or(Duration::MAX)
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "saturates, and is not negative")]
fn whole(bytes: f64) -> u64 {
    bytes as u64
}

#[cfg(test)]
mod tests;
