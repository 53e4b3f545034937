//! A pre-copy move, calculated. docs/tuning.md has the formulas and where they come from.

use super::findings::{Bottleneck, CodecFacts, DirtyFacts, Machine};
use super::rewrites;

/// What is moved, between which machines.
#[derive(Clone, Copy, Debug)]
pub(super) struct Model<'a> {
    pub(super) guest: Guest,
    pub(super) dirty: DirtyFacts,
    pub(super) machine: &'a Machine,
    /// Seconds.
    pub(super) downtime_limit: f64,
}

/// The guest, in bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Guest {
    pub(super) ram: f64,
    /// Of pages that are not zero.
    pub(super) data: f64,
    /// The devices' state.
    pub(super) devices: f64,
}

/// One way to set it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Setting<'a> {
    /// Bits on the wire, in bytes per second; `None`: both ends share this machine.
    pub(super) link: Option<f64>,
    /// Bytes per second that the move itself keeps to, if so.
    pub(super) limit: Option<f64>,
    /// 0: everything on the main channel.
    pub(super) channels: usize,
    pub(super) codec: &'a CodecFacts,
    pub(super) ends: Ends,
}

/// Who sends and receives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ends {
    Multifd,
    Qemu,
}

/// What a move would cost: seconds and bytes.
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

/// One pass over some pages.
#[derive(Clone, Copy, Debug)]
struct Pass {
    seconds: f64,
    wire: f64,
    source_core: f64,
    destination_core: f64,
    bottleneck: Bottleneck,
}

const PAGE: f64 = 4096.0;

/// Header of a packet, and bytes of pages in it (docs/wire.md §7.2).
const PACKET_HEADER: f64 = 1344.0;
const PACKET_BYTES: f64 = 128.0 * PAGE;

/// On the main channel: a header with each page, and a zero page's record (docs/wire.md §5).
const RECORD_HEADER: f64 = 8.0;
const ZERO_RECORD: f64 = 9.0;

/// What TCP carries of what a link can: 1448 bytes in a frame of 1514, and 24 more that Ethernet takes for preamble, checksum
/// and gap.
const GOODPUT: f64 = 1448.0 / 1538.0;

/// Connections, headers, the last word of the destination: what a guest of nothing takes, in seconds.
const FIXED: f64 = 0.015;

/// From the stop of a guest that has written nothing to its start at the other end: a sync of the dirty log, device state, one
/// round trip. Measured with the live guests of docs/performance.md.
const SWITCHOVER: f64 = 0.003;

/// QEMU's zlib against the one that is measured here: its encoder and decoder take so many times as long, its stream has so many
/// bytes (docs/performance.md, 1 Gbit/s).
const QEMU_ZLIB: [f64; 3] = [3.6, 2.9, 0.86];

/// What QEMU's main thread spends on each page to hand it to its channels, in seconds: in `none-2-again` of docs/performance.md
/// its source takes 0.25 s of cores for 262144 pages, of which sending takes 0.06.
const QEMU_PAGE: f64 = 0.7e-6;

/// As the engine decides (`engine/src/convergence`): so many rounds that leave more than this share of the best before.
const STALLED_ROUNDS: u32 = 3;
const PROGRESS: f64 = 0.95;

/// More rounds than any move has that gets somewhere.
const MOST_ROUNDS: u64 = 200;

impl Model<'_> {
    /// The whole move: passes until what is left can be sent within the downtime limit.
    pub(super) fn run(&self, setting: Setting<'_>) -> Move {
        let mut pass = self.first_pass(setting);
        let mut sum = Move {
            total: FIXED + pass.seconds,
            downtime: 0.0,
            // The last one, with the guest stopped, counts.
            rounds: 2,
            wire: self.guest.devices,
            source_core: 0.0,
            destination_core: 0.0,
            converges: true,
            bottleneck: pass.bottleneck,
        };
        sum.add(&pass);
        let (mut best, mut stalled) = (f64::MAX, 0);
        let rate = self.dirty.bytes_per_s as f64;
        loop {
            let left = rewrites::after(rate, self.dirty.working_set_bytes as f64, pass.seconds);
            stalled = if left < best * PROGRESS { 0 } else { stalled + 1 };
            best = best.min(left);
            let next = self.pass(left, 0.0, setting);
            sum.downtime = next.seconds + SWITCHOVER + self.on_link(self.guest.devices, setting);
            let within = match setting.ends {
                Ends::Multifd => next.seconds <= self.downtime_limit,
                // QEMU compares bytes of pages with what went over the wire (docs/wire.md §20).
                Ends::Qemu => left <= pass.wire / pass.seconds * self.downtime_limit,
            };
            if within || stalled >= STALLED_ROUNDS || sum.rounds >= MOST_ROUNDS {
                sum.converges = within;
                if !within {
                    sum.bottleneck = Bottleneck::DirtyRate;
                }
                sum.total += sum.downtime;
                sum.add(&next);
                return sum;
            }
            sum.rounds += 1;
            sum.total += next.seconds;
            sum.add(&next);
            pass = next;
        }
    }

    /// All of the RAM. Its zero pages cost a header, and QEMU makes the ones that its guest never touched when it looks at them.
    fn first_pass(&self, setting: Setting<'_>) -> Pass {
        let zero = self.guest.ram - self.guest.data;
        let mut pass = self.pass(self.guest.data, zero, setting);
        if setting.ends == Ends::Qemu {
            let made = zero * self.machine.touch_byte_s;
            pass.source_core += made;
            // What was touched and what was not lies apart: nothing flows meanwhile.
            pass.seconds += made / self.lanes(setting);
        }
        pass
    }

    /// A pass over so many bytes of pages that are not zero, and of pages that are.
    fn pass(&self, data: f64, zero: f64, setting: Setting<'_>) -> Pass {
        let Machine { send_byte_s, receive_byte_s, .. } = *self.machine;
        let [slower, slower_back, size] = match setting.ends {
            Ends::Qemu if setting.codec.codec.starts_with("zlib") => QEMU_ZLIB,
            _ => [1.0; 3],
        };
        let headers = match setting.channels {
            0 => (data * RECORD_HEADER + zero * ZERO_RECORD) / PAGE,
            _ => (data + zero) / PACKET_BYTES * PACKET_HEADER,
        };
        let wire = data / setting.codec.ratio * size + headers;
        let codec_time = |speed: Option<f64>| speed.map_or(0.0, |speed| data / speed);
        // QEMU has its guest's memory mapped, and finds new memory by page faults.
        let (look, landing) = match setting.ends {
            Ends::Multifd => (self.machine.look_byte_s, self.landing(setting)),
            Ends::Qemu => (0.0, self.machine.fault_byte_s),
        };
        let source_core =
            data * look + wire * send_byte_s + codec_time(setting.codec.encode_bytes_per_s) * slower;
        let destination_core = wire * receive_byte_s
            + codec_time(setting.codec.decode_bytes_per_s) * slower_back
            + data * landing;
        let lanes = self.lanes(setting);
        // One thread's work, beside that of the channels.
        let feeding = if setting.ends == Ends::Qemu { (data + zero) / PAGE * QEMU_PAGE } else { 0.0 };
        let ends = [(source_core / lanes).max(feeding), destination_core / lanes];
        let source_core = source_core + feeding;
        let shared = match setting.link {
            Some(_) => 0.0,
            None => (source_core + destination_core) / self.machine.cores as f64,
        };
        // What both ends wait for together is put down to the one that works more.
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
        Pass { seconds, wire, source_core, destination_core, bottleneck }
    }

    /// One worker writes through the file behind memory, and the others through the mapping (docs/architecture.md).
    fn landing(&self, setting: Setting<'_>) -> f64 {
        let workers = setting.channels.max(1) as f64;
        (self.machine.land_byte_s + (workers - 1.0) * self.machine.fault_byte_s) / workers
    }

    fn on_link(&self, bytes: f64, setting: Setting<'_>) -> f64 {
        let link = setting.link.map_or(0.0, |rate| bytes / (rate * GOODPUT));
        setting.limit.map_or(link, |limit| link.max(bytes / limit))
    }

    /// Threads that work at each end.
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

#[cfg(test)]
mod tests;
