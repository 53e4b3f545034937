//! What a source's script has on the multifd channels.

use multifd_wire::{
    BlockName, DeviceStatePacket, InitialPacket, MAX_PAYLOAD, PacketFlags, PageSize, RamPacketHeader,
};

use super::codec::Packer;
use super::{Lane, Memory, PAGE, PageAt, Step, Style, SyncPackets};

/// Where fields of a packet's header are (docs/wire.md §7.2).
pub mod field {
    /// be32
    pub const FLAGS: usize = 8;
    /// be32
    pub const PAGES_ALLOC: usize = 12;
    /// be32
    pub const NORMAL_PAGES: usize = 16;
    /// be32
    pub const PAYLOAD_LEN: usize = 20;
    /// be32
    pub const ZERO_PAGES: usize = 32;
    /// be32: whether there are checksums
    pub const CHECKS: usize = 36;
    /// 256 bytes
    pub const BLOCK: usize = 64;
    /// be64 each
    pub const OFFSETS: usize = 320;
}

/// Pages that fit in a packet.
const MOST_PAGES: u32 = 128;

/// All channels of a migration.
pub(super) struct Packets {
    channels: Vec<Channel>,
    style: Style,
    next: usize,
    number: u64,
}

struct Channel {
    lane: Lane,
    packer: Packer,
    /// The packet that is still to be sent: it may have to carry a SYNC.
    held: Option<Packet>,
    last_header: Option<Vec<u8>>,
}

struct Packet {
    header: Vec<u8>,
    payload: Vec<u8>,
}

impl Packets {
    /// The channels, which say hello.
    pub(super) fn new(style: &Style, steps: &mut Vec<Step>) -> Self {
        let channel = |id: u8| {
            let lane = Lane::Channel(id);
            let bytes = InitialPacket { uuid: [0; 16], channel: id }.encode().to_vec();
            steps.push(Step::Send { lane, what: "hello", bytes });
            Channel { lane, packer: Packer::new(style.codec), held: None, last_header: None }
        };
        Self {
            channels: (0..style.channels).map(channel).collect(),
            style: style.clone(),
            next: 0,
            number: 0,
        }
    }

    /// Pages in packets, which go round the channels. `zero` says which go as zero pages.
    pub(super) fn pages(
        &mut self,
        memory: &Memory,
        pages: &[PageAt],
        zero: &dyn Fn(&PageAt) -> bool,
        steps: &mut Vec<Step>,
    ) {
        for of_block in pages.chunk_by(|one, next| one.block == next.block) {
            for batch in of_block.chunks(self.style.packet_pages) {
                self.batch(memory, batch, zero, steps);
            }
        }
    }

    /// SYNC on every channel.
    pub(super) fn sync(&mut self, steps: &mut Vec<Step>) {
        for channel in &mut self.channels {
            let carried = channel.held.as_mut().filter(|_| self.style.sync_packets == SyncPackets::WithPages);
            if let Some(packet) = carried {
                packet.header.iter_mut().skip(field::FLAGS + 3).take(1).for_each(|flags| *flags |= 1);
                channel.release(steps);
                continue;
            }
            channel.release(steps);
            let stale = channel.last_header.clone().filter(|_| self.style.sync_packets == SyncPackets::Stale);
            let bytes = match stale {
                Some(mut header) => {
                    put(&mut header, field::FLAGS, 1);
                    put(&mut header, field::NORMAL_PAGES, 0);
                    put(&mut header, field::ZERO_PAGES, 0);
                    header
                }
                None => encode(PacketFlags::SYNC, self.number, None, &[], &[], 0),
            };
            self.number += 1;
            steps.push(Step::Send { lane: channel.lane, what: "sync", bytes });
        }
    }

    /// A packet of device state.
    pub(super) fn device_state(&mut self, channel: u8, idstr: &str, data: &[u8], steps: &mut Vec<Step>) {
        let payload_len = u32::try_from(data.len()).expect("a test's device state is small");
        let header = DeviceStatePacket { idstr: idstr.to_owned(), instance_id: 3, payload_len };
        let lane = Lane::Channel(channel);
        steps.push(Step::Send { lane, what: "device packet", bytes: header.encode().to_vec() });
        steps.push(Step::Send { lane, what: "device state", bytes: data.to_vec() });
    }

    fn batch(
        &mut self,
        memory: &Memory,
        batch: &[PageAt],
        zero: &dyn Fn(&PageAt) -> bool,
        steps: &mut Vec<Step>,
    ) {
        let (zero, normal): (Vec<PageAt>, Vec<PageAt>) = batch.iter().copied().partition(zero);
        let index = self.next % self.channels.len().max(1);
        self.next += 1;
        let Some(channel) = self.channels.get_mut(index) else { return };
        channel.release(steps);
        let content: Vec<u8> = normal.iter().flat_map(|at| memory.page(*at)).copied().collect();
        let payload = if normal.is_empty() { Vec::new() } else { channel.packer.pack(&content) };
        assert!(payload.len() <= MAX_PAYLOAD && content.len() == normal.len() * PAGE);
        let flags = PacketFlags::pages(self.style.codec.id());
        let block = batch.first().map(|at| memory.name(at.block));
        let mut header = encode(flags, self.number, block, &normal, &zero, payload.len());
        put(&mut header, field::PAGES_ALLOC, MOST_PAGES * self.style.pages_alloc_factor);
        self.number += 1;
        channel.last_header = Some(header.clone());
        channel.held = Some(Packet { header, payload });
        if self.style.sync_packets != SyncPackets::WithPages {
            channel.release(steps);
        }
    }
}

impl Channel {
    /// Sends what was held back.
    fn release(&mut self, steps: &mut Vec<Step>) {
        let Some(Packet { header, payload }) = self.held.take() else { return };
        steps.push(Step::Send { lane: self.lane, what: "packet", bytes: header });
        if !payload.is_empty() {
            steps.push(Step::Send { lane: self.lane, what: "payload", bytes: payload });
        }
    }
}

fn encode(
    flags: PacketFlags,
    packet_num: u64,
    block: Option<&BlockName>,
    normal: &[PageAt],
    zero: &[PageAt],
    payload_len: usize,
) -> Vec<u8> {
    let offsets = |pages: &[PageAt]| pages.iter().map(|at| at.offset()).collect::<Vec<_>>();
    let (normal, zero) = (offsets(normal), offsets(zero));
    let payload_len = u32::try_from(payload_len).expect("at most 1 MiB");
    let mut bytes = Vec::new();
    RamPacketHeader { flags, packet_num, block, normal: &normal, zero: &zero, payload_len }
        .encode(PageSize::K4, &mut bytes);
    bytes
}

/// Overwrites a be32 field.
fn put(header: &mut [u8], at: usize, value: u32) {
    for (to, from) in header.iter_mut().skip(at).zip(value.to_be_bytes()) {
        *to = from;
    }
}
