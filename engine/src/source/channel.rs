//! One parallel channel of a source: claims pages, packs them, sends them.

use std::io::IoSlice;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use multifd_codecs::{Encoder, zero};
use multifd_transports::Channel;
use multifd_wire::{InitialPacket, PacketFlags, RamPacketHeader, header_len, pages_per_packet};

use super::outgoing::{OutgoingBlock, ZeroRoute};
use super::rounds::{Work, ZeroMail};
use super::shared::Shared;
use crate::error::{Error, ErrorKind, Phase, Result};
use crate::ram::{Batch, Claim, IoVecs, PAGE, PAGE_SIZE, Round};
use crate::session::Counters;
use crate::workers::Crew;

/// The worker of one channel. Owns its buffers: 512 KiB of pages and at most 1 MiB of payload, none without a codec.
pub(super) struct SendWorker {
    channel: Arc<Channel>,
    shared: Arc<Shared>,
    id: u8,
    /// `None`: pages go as they are, straight from guest memory.
    encoder: Option<Box<dyn Encoder>>,
    flags: PacketFlags,
    packet: Packet,
    ranges: IoVecs,
}

/// The packet that is being made. Its buffers are kept from packet to packet.
#[derive(Default)]
struct Packet {
    normal: Vec<u64>,
    zero: Vec<u64>,
    header: Vec<u8>,
    /// Private copies of the pages: a compressor must not see memory that changes under it.
    pages: Vec<u8>,
    payload: Vec<u8>,
}

impl SendWorker {
    /// Starts the channel's thread; the channel is connected and nothing was sent on it.
    pub(super) fn start(channel: Arc<Channel>, id: u8, shared: &Arc<Shared>, crew: &Crew) -> Result<()> {
        let codec = &shared.codec;
        let encoder = match codec.id() {
            multifd_codecs::CodecId::NONE => None,
            _ => Some(codec.encoder().map_err(|error| {
                Error::new(ErrorKind::Codec, Phase::Setup, format!("no encoder for {}", codec.name()))
                    .because(error)
            })?),
        };
        let flags = PacketFlags::pages(codec.id().value())
            .map_err(|invalid| Error::invalid(Phase::Setup, invalid))?;
        let mut worker = Self {
            channel,
            shared: Arc::clone(shared),
            id,
            encoder,
            flags,
            packet: Packet::default(),
            ranges: IoVecs::default(),
        };
        crew.spawn(&format!("mig-send-{id}"), Phase::Active, move || {
            worker.run().map_err(|error| error.on(format!("channel {id} ({})", worker.channel.peer())))
        })
    }

    fn run(&mut self) -> Result<()> {
        let hello = InitialPacket { uuid: self.shared.uuid, channel: self.id };
        self.send_bytes(Phase::Setup, &hello.encode())?;
        let mut last = 0;
        loop {
            match self.shared.rounds.next(last)? {
                Work::Close => {
                    return self
                        .channel
                        .finish_sending()
                        .map_err(|error| Error::io(Phase::Commit, "ending the channel", error));
                }
                Work::Round(number, round) => {
                    last = number;
                    self.round(&round)?;
                    self.sync()?;
                    self.shared.rounds.done();
                }
            }
        }
    }

    fn round(&mut self, round: &Round) -> Result<()> {
        let (mut claim, mut batch) = (Claim::default(), Batch::default());
        let shared = Arc::clone(&self.shared);
        while round.claim(&mut claim, pages_per_packet(PAGE_SIZE), &mut batch) {
            let Some(block) = shared.ram.blocks.get(batch.block) else { continue };
            self.packet.clear();
            if self.encoder.is_some() {
                self.packet.copy_in(block, &batch.pages)?;
            } else {
                self.packet.sort_out(block, &batch.pages);
            }
            self.route_zero_pages(batch.block, block)?;
            self.send_packet(block)?;
        }
        Ok(())
    }

    /// Zero pages that do not go in packets are announced by the main thread.
    fn route_zero_pages(&mut self, index: usize, block: &OutgoingBlock) -> Result<()> {
        if block.zero_route == ZeroRoute::Main && !self.packet.zero.is_empty() {
            let offsets = std::mem::take(&mut self.packet.zero);
            self.shared.rounds.post(ZeroMail { block: index, offsets })?;
        }
        Ok(())
    }

    fn send_packet(&mut self, block: &OutgoingBlock) -> Result<()> {
        let packet = &mut self.packet;
        if packet.normal.is_empty() && packet.zero.is_empty() {
            return Ok(());
        }
        let payload_len = match &mut self.encoder {
            None => packet.normal.len() * PAGE,
            Some(encoder) if !packet.normal.is_empty() => {
                encoder.prepare(&packet.pages, &mut packet.payload).map_err(|error| {
                    Error::new(ErrorKind::Codec, Phase::Active, "pages do not encode").because(error)
                })?;
                packet.payload.len()
            }
            Some(_) => 0,
        };
        let header = RamPacketHeader {
            flags: self.flags,
            packet_num: self.shared.packets.fetch_add(1, Ordering::Relaxed),
            block: Some(block.block.name()),
            normal: &packet.normal,
            zero: &packet.zero,
            payload_len: u32::try_from(payload_len).unwrap_or(u32::MAX),
        };
        header.encode(PAGE_SIZE, &mut packet.header);
        self.shared.pace(packet.header.len() + payload_len)?;
        self.write_packet(block, payload_len)?;
        let counters = &self.shared.session.counters;
        Counters::add(&counters.pages_normal, self.packet.normal.len());
        Counters::add(&counters.pages_zero, self.packet.zero.len());
        Ok(())
    }

    /// One vectored write: the header, then the payload, or the pages where they are.
    fn write_packet(&mut self, block: &OutgoingBlock, payload_len: usize) -> Result<()> {
        let packet = &self.packet;
        let sent = if self.encoder.is_some() {
            self.channel.send_vectored(&mut [IoSlice::new(&packet.header), IoSlice::new(&packet.payload)])
        } else {
            let mut ranges = self.ranges.start();
            ranges.private(&packet.header);
            for offset in &packet.normal {
                let page = block.block.page_at(*offset).and_then(|page| block.block.run(page, 1));
                ranges.guest(&page.ok_or_else(outside)?);
            }
            ranges.send(&self.channel)
        };
        sent.map_err(|error| {
            Error::io(Phase::Active, format_args!("sending a packet with {payload_len} bytes"), error)
        })
    }

    fn sync(&mut self) -> Result<()> {
        let mut header = Vec::with_capacity(header_len(PAGE_SIZE));
        RamPacketHeader {
            flags: PacketFlags::SYNC,
            packet_num: self.shared.packets.fetch_add(1, Ordering::Relaxed),
            block: None,
            normal: &[],
            zero: &[],
            payload_len: 0,
        }
        .encode(PAGE_SIZE, &mut header);
        self.send_bytes(Phase::Active, &header)
    }

    fn send_bytes(&self, phase: Phase, bytes: &[u8]) -> Result<()> {
        self.channel
            .send_all(bytes)
            .map_err(|error| Error::io(phase, format_args!("sending {} bytes", bytes.len()), error))
    }
}

impl Packet {
    fn clear(&mut self) {
        self.normal.clear();
        self.zero.clear();
        self.header.clear();
        self.pages.clear();
        self.payload.clear();
    }

    /// Tells zero pages from others; the others stay where they are.
    fn sort_out(&mut self, block: &OutgoingBlock, pages: &[usize]) {
        for page in pages {
            let offset = (page * PAGE) as u64;
            if block.goes_as_zero(*page) { self.zero.push(offset) } else { self.normal.push(offset) }
        }
    }

    /// Copies pages to private memory and keeps those that are not zero.
    fn copy_in(&mut self, block: &OutgoingBlock, pages: &[usize]) -> Result<()> {
        let seek_zero = block.zero_route != ZeroRoute::Content;
        for page in pages {
            let offset = (page * PAGE) as u64;
            if seek_zero && block.is_hole(*page) {
                self.zero.push(offset);
                continue;
            }
            let start = self.pages.len();
            self.pages.resize(start + PAGE, 0);
            let copy = self.pages.get_mut(start..).unwrap_or_default();
            if !block.block.read_page(*page, copy) {
                return Err(outside());
            }
            if seek_zero && zero::is_zero(copy) {
                self.pages.truncate(start);
                self.zero.push(offset);
            } else {
                self.normal.push(offset);
            }
        }
        Ok(())
    }
}

fn outside() -> Error {
    Error::new(ErrorKind::GuestMemory, Phase::Active, "a page outside of its block was claimed")
}
