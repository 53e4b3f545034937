//! Pages in packets on parallel channels: each has a worker that claims pages, packs them, sends
//! them.

use std::io::IoSlice;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use multifd_codecs::CodecId;
use multifd_transports::{Channel, Closer};
use multifd_wire::{
    Configuration, InitialPacket, MAX_PAYLOAD, PacketChecks, PacketFlags, RamPacketHeader, RamRecord,
    header_len, pages_per_packet, put_codec_stream,
};

use crate::error::{Error, Phase, Result};
use crate::guest::{PAGE_SIZE, hash};
use crate::io::IoVecs;
use crate::run::counters::{ChannelCounters, Counters};
use crate::run::stop::lock;
use crate::run::workers::Crew;
use crate::source::carrier::encoding::{Encoding, micros};
use crate::source::codec_auto::Measured;
use crate::source::main_writer::MainWriter;
use crate::source::outgoing::{OutgoingBlock, ZeroRoute};
use crate::source::packet::{Content, Packet, Treatment};
use crate::source::postcopy::Bulk;
use crate::source::rounds::{RoundContext, Rounds, Work, ZeroReport};
use crate::source::shared::SourceShared;
use crate::source::zero_copy::ZeroCopySender;
use crate::stream::dialect;
use crate::work::{Batch, BlockIndex, Place, Round};

/// The parallel channels of a migration.
pub(in crate::source) struct Channels {
    rounds: Rounds,
    closers: Mutex<Vec<Closer>>,
    sync_points: SyncPoints,
}

/// Where the destination expects the sync points of the parallel channels; its machine type
/// decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::source) enum SyncPoints {
    /// At FLUSH records: machine types from 8.1 on.
    AtFlush,
    /// At every end of a section: machine types up to 8.0.
    AtSectionEnd,
}

impl SyncPoints {
    pub(in crate::source) fn for_machine(configuration: &Configuration) -> Self {
        match configuration.machine_version() {
            Some(version) if version <= (8, 0) => Self::AtSectionEnd,
            _ => Self::AtFlush,
        }
    }
}

impl Channels {
    /// `count` channels, each of which [`Channels::start`] is called for.
    pub(in crate::source) fn new(count: usize, sync_points: SyncPoints, crew: &Crew) -> Self {
        Self { rounds: Rounds::new(crew.stop(), count), closers: Mutex::default(), sync_points }
    }

    /// Starts the worker of channel `id`, which is connected and on which nothing was sent.
    pub(in crate::source) fn start(
        &self,
        channel: Arc<Channel>,
        id: u8,
        shared: &Arc<SourceShared>,
        crew: &Crew,
    ) -> Result<()> {
        let counters = shared.session.counters.channel(id, &channel);
        self.start_worker((channel, counters), id, shared, crew)
    }

    /// The same of a channel that replaces one of that number.
    pub(in crate::source) fn restart(
        &self,
        channel: Arc<Channel>,
        id: u8,
        shared: &Arc<SourceShared>,
        crew: &Crew,
    ) -> Result<()> {
        let counters = shared.session.counters.replaced_channel(id, &channel);
        self.start_worker((channel, counters), id, shared, crew)
    }

    fn start_worker(
        &self,
        (channel, counters): (Arc<Channel>, Arc<ChannelCounters>),
        id: u8,
        shared: &Arc<SourceShared>,
        crew: &Crew,
    ) -> Result<()> {
        lock(&self.closers).push(channel.closer());
        SendWorker::start((channel, counters), id, self.rounds.clone(), shared, crew)
    }

    /// Has every channel say SYNC, behind all that went on it.
    pub(in crate::source) fn sync(&self) -> Result<()> {
        self.rounds.run(Round::empty(), RoundContext { round: 0, last: true }, |_| Ok(()))
    }

    /// Starts the background stream of a post-copy, and returns at once.
    pub(in crate::source) fn start_bulk(&self, bulk: &Arc<Bulk>) {
        self.rounds.start_bulk(bulk);
    }

    pub(super) fn syncs_at_flush(&self) -> bool {
        self.sync_points == SyncPoints::AtFlush
    }

    pub(in crate::source) fn workers(&self) -> usize {
        self.rounds.workers()
    }

    pub(super) fn send_round(
        &self,
        round: Round,
        context: RoundContext,
        main: &mut MainWriter,
        shared: &SourceShared,
    ) -> Result<()> {
        self.rounds.run(round, context, |report| {
            Counters::add(&shared.session.counters.main.pages_zero, report.offsets.len());
            main.zero_pages(&shared.ram, &report)
        })?;
        if self.sync_points == SyncPoints::AtFlush {
            main.record(&RamRecord::Flush);
        }
        Ok(())
    }

    /// Ends the channels of a post-copy that is over.
    pub(in crate::source) fn close(&self) {
        lock(&self.closers).iter().for_each(Closer::close);
        self.rounds.close();
    }

    pub(super) fn dismiss_workers(&self) {
        self.rounds.close();
    }
}

/// The worker of one channel. Owns its buffers: 512 KiB of pages and at most 1 MiB of payload, none
/// without a codec or cache.
struct SendWorker {
    channel: Arc<Channel>,
    counters: Arc<ChannelCounters>,
    shared: Arc<SourceShared>,
    rounds: Rounds,
    id: u8,
    encoding: Encoding,
    packet: Packet,
    header: Vec<u8>,
    payload: Vec<u8>,
    ranges: IoVecs,
    zero_copy: Option<ZeroCopySender>,
    /// After the switch to post-copy: its own limit holds, not that of the rounds.
    follows: bool,
}

impl SendWorker {
    /// Starts the channel's thread; the channel is connected and nothing was sent on it.
    fn start(
        (channel, counters): (Arc<Channel>, Arc<ChannelCounters>),
        id: u8,
        rounds: Rounds,
        shared: &Arc<SourceShared>,
        crew: &Crew,
    ) -> Result<()> {
        let zero_copy = ZeroCopySender::new(&channel, shared.zero_copy)
            .map_err(|error| error.on(format!("channel {id} ({})", channel.peer())))?;
        let mut worker = Self {
            counters,
            channel,
            shared: Arc::clone(shared),
            rounds,
            id,
            encoding: Encoding::new(&*shared.codec, shared.auto_codec)?,
            packet: Packet::default(),
            header: Vec::with_capacity(header_len(PAGE_SIZE)),
            payload: Vec::new(),
            ranges: IoVecs::default(),
            zero_copy,
            follows: false,
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
            match self.rounds.next(last)? {
                Work::Close => {
                    return self
                        .channel
                        .finish_sending()
                        .map_err(|error| Error::io(Phase::Commit, "ending the channel", error));
                }
                Work::Round { number, round, context } => {
                    last = number;
                    self.round(&round, context)?;
                    self.sync()?;
                    self.rounds.done();
                }
                Work::Bulk { bulk } => {
                    self.bulk(&bulk).inspect_err(|_| bulk.broken(&self.shared))?;
                    bulk.done();
                    return bulk
                        .watch(&self.channel, &format!("channel {} ({})", self.id, self.channel.peer()));
                }
            }
        }
    }

    /// The background stream of a post-copy, until nothing is left.
    fn bulk(&mut self, bulk: &Bulk) -> Result<()> {
        self.follows = true;
        let shared = Arc::clone(&self.shared);
        let mut queue = bulk.short_queue(&self.channel);
        let mut pages = Vec::new();
        while let Some(block) = bulk.next(&shared, &mut pages)? {
            let before = self.channel.bytes_sent();
            self.follow(block, &pages, &shared)
                .inspect_err(|_| shared.ram.host_pages.put_back(block, &pages))?;
            let sent = self.channel.bytes_sent().saturating_sub(before);
            bulk.charge(usize::try_from(sent).unwrap_or(usize::MAX));
            queue.sent();
        }
        match &mut self.zero_copy {
            Some(zero_copy) => zero_copy.settle(&self.channel, &self.counters),
            None => Ok(()),
        }
    }

    /// Whole host pages, in order: a huge page takes several packets. Zero pages go with the
    /// others, since the destination places them as it places those.
    fn follow(&mut self, block: BlockIndex, pages: &[usize], shared: &SourceShared) -> Result<()> {
        let block = &shared.ram.hold(block);
        for pages in pages.chunks(pages_per_packet(PAGE_SIZE)) {
            self.packet.clear();
            let (hashed, begun) = (shared.agreed().checksums, Instant::now());
            self.encoding.settle(shared.features_for_packets());
            if self.encoding.encodes() || hashed {
                let treatment = Treatment { hashed, ..Treatment::default() };
                self.packet.copy_in(&shared.ram, block, pages, treatment)?;
            } else {
                self.packet.sort_out(&shared.ram, block, pages)?;
            }
            self.send_pages(block, begun.elapsed())?;
        }
        Ok(())
    }

    /// Waits until the limit of the rounds lets so many bytes go.
    fn pace(&self, bytes: usize) -> Result<()> {
        if self.follows { Ok(()) } else { self.shared.pace(bytes) }
    }

    fn round(&mut self, round: &Round, context: RoundContext) -> Result<()> {
        let shared = Arc::clone(&self.shared);
        let (next, mut place) = (shared.next(round), Place::default());
        while let Some(batch) = next.claim(&mut place, shared.batch_pages()) {
            let sent = self.batch(&batch, &shared, context);
            if sent.is_err() {
                next.put_back(&mut place);
                return sent;
            }
        }
        Ok(())
    }

    fn batch(&mut self, batch: &Batch<'_>, shared: &SourceShared, context: RoundContext) -> Result<()> {
        let block = &shared.ram.hold(batch.block);
        let cache = shared.deltas_for_peer(context).map(|cache| (cache, context));
        self.packet.clear();
        let (agreed, begun) = (shared.agreed(), Instant::now());
        self.encoding.settle(shared.features_for_packets());
        if self.encoding.encodes() || cache.is_some() || agreed.checksums {
            // What a checksum is of may not change before it is sent.
            let apart = agreed.mixed && self.encoding.encodes();
            let treatment = Treatment { cache, hashed: agreed.checksums, apart };
            self.packet.copy_in(&shared.ram, block, batch.pages, treatment)?;
        } else {
            self.packet.sort_out(&shared.ram, block, batch.pages)?;
        }
        if block.zero_route == ZeroRoute::Main && !self.packet.zero.is_empty() {
            let offsets = std::mem::take(&mut self.packet.zero);
            self.rounds.post(ZeroReport { block: batch.block, offsets })?;
        }
        let copying = begun.elapsed();
        self.send_deltas(block)?;
        self.send_raw(block)?;
        self.send_pages(block, copying)
    }

    /// Pages that no codec makes shorter: they take no time of it, at either end.
    fn send_raw(&mut self, block: &OutgoingBlock) -> Result<()> {
        let raw = &self.packet.raw;
        if raw.offsets.is_empty() {
            return Ok(());
        }
        let (flags, pages) = (PacketFlags::pages(CodecId::NONE), raw.offsets.len());
        encode_header(&mut self.header, &self.shared, block, flags, (&raw.offsets, &[]), raw.pages.len())?;
        seal_pages(&mut self.header, &self.shared, pages, &raw.hashes)?;
        self.pace(self.header.len() + raw.pages.len())?;
        send_private(&self.channel, &self.header, &raw.pages)?;
        Counters::add(&self.counters.packets, 1);
        Counters::add(&self.counters.pages_normal, pages);
        Counters::add(&self.counters.pages_uncompressed, pages);
        Ok(())
    }

    /// `copying`: what it took to have the pages.
    fn send_pages(&mut self, block: &OutgoingBlock, copying: Duration) -> Result<()> {
        let packet = &self.packet;
        if packet.normal.is_empty() && packet.zero.is_empty() {
            return Ok(());
        }
        let (normal, zero) = (packet.normal.len(), packet.zero.len());
        if packet.pages.is_empty() {
            self.send_in_place(block)?;
        } else {
            let begun = Instant::now();
            self.payload.clear();
            let encoded = self.encoding.encode(&packet.pages, &mut self.payload)?;
            let encode = begun.elapsed();
            let payload = if encoded.is_plain { &packet.pages } else { &self.payload };
            let offsets = (&packet.normal[..], &packet.zero[..]);
            encode_header(&mut self.header, &self.shared, block, encoded.flags, offsets, payload.len())?;
            put_codec_stream(&mut self.header, encoded.stream)
                .map_err(|invalid| Error::bug(Phase::Active, invalid))?;
            seal_pages(&mut self.header, &self.shared, normal, &packet.hashes)?;
            let begun = Instant::now();
            self.pace(self.header.len() + payload.len())?;
            send_private(&self.channel, &self.header, payload)?;
            let send = begun.elapsed();
            if !encoded.is_plain {
                Counters::add(&self.counters.codec_us, micros(encode));
                Counters::add(&self.counters.bytes_saved, packet.pages.len().saturating_sub(payload.len()));
            }
            let (content, wire) = (packet.pages.len(), self.header.len() + payload.len());
            let measured = Measured { content, wire, encode, send, all: copying + encode + send };
            if let Some(change) = self.encoding.sent(encoded, measured) {
                self.shared.decide(format!("channel {}: {change}", self.id));
            }
        }
        Counters::add(&self.counters.packets, 1);
        Counters::add(&self.counters.pages_normal, normal);
        Counters::add(&self.counters.pages_zero, zero);
        Ok(())
    }

    /// One vectored write: the header, then the pages where they are. With zero-copy sends one
    /// each.
    fn send_in_place(&mut self, block: &OutgoingBlock) -> Result<()> {
        let packet = &self.packet;
        let payload_len = packet.normal.len() * crate::guest::PAGE;
        encode_header(
            &mut self.header,
            &self.shared,
            block,
            self.encoding.flags(),
            (&packet.normal, &packet.zero),
            payload_len,
        )?;
        seal_pages(&mut self.header, &self.shared, packet.normal.len(), &packet.hashes)?;
        self.pace(self.header.len() + payload_len)?;
        let mut ranges = self.ranges.start();
        let zero_copy = self.zero_copy.as_mut().filter(|zero_copy| zero_copy.pays());
        if zero_copy.is_none() {
            ranges.private(&self.header);
        }
        for content in packet.contents(block) {
            match content? {
                Content::Private(bytes) => ranges.private(bytes),
                Content::Guest(page) => ranges.guest(&page),
            }
        }
        match zero_copy {
            Some(zero_copy) => zero_copy.send(&self.header, ranges, &self.channel),
            None => ranges.send(&self.channel),
        }
        .map_err(|error| packet.fault(block, error, |error| packet_error(payload_len, error)))
    }

    fn send_deltas(&mut self, block: &OutgoingBlock) -> Result<()> {
        let packet = &self.packet;
        if packet.delta.is_empty() {
            return Ok(());
        }
        let payload = &packet.delta_payload;
        let flags = PacketFlags::pages(CodecId::DIALECT_DELTA);
        encode_header(&mut self.header, &self.shared, block, flags, (&packet.delta, &[]), payload.len())?;
        if self.shared.agreed().checksums {
            seal(&mut self.header, hash(payload))?;
        }
        self.pace(self.header.len() + payload.len())?;
        send_private(&self.channel, &self.header, payload)?;
        Counters::add(&self.counters.packets, 1);
        Counters::add(&self.counters.pages_xbzrle, packet.delta.len());
        Ok(())
    }

    fn sync(&mut self) -> Result<()> {
        if let Some(zero_copy) = &mut self.zero_copy {
            zero_copy.settle(&self.channel, &self.counters)?;
        }
        self.header.clear();
        RamPacketHeader {
            flags: PacketFlags::SYNC,
            packet_num: self.shared.packets.fetch_add(1, Ordering::Relaxed),
            block: None,
            normal: &[],
            zero: &[],
            payload_len: 0,
        }
        .encode(PAGE_SIZE, &mut self.header);
        if self.shared.agreed().checksums {
            seal(&mut self.header, dialect::checksum_of_pages(&[]))?;
        }
        self.send_bytes(Phase::Active, &self.header)
    }

    fn send_bytes(&self, phase: Phase, bytes: &[u8]) -> Result<()> {
        self.channel
            .send_all(bytes)
            .map_err(|error| Error::io(phase, format_args!("sending {} bytes", bytes.len()), error))
    }
}

fn encode_header(
    header: &mut Vec<u8>,
    shared: &SourceShared,
    block: &OutgoingBlock,
    flags: PacketFlags,
    (normal, zero): (&[u64], &[u64]),
    payload_len: usize,
) -> Result<()> {
    let (pages, most) = (normal.len() + zero.len(), pages_per_packet(PAGE_SIZE));
    let len = u32::try_from(payload_len).ok().filter(|len| *len as usize <= MAX_PAYLOAD && pages <= most);
    let payload_len = len.ok_or_else(|| {
        Error::bug(
            Phase::Active,
            format_args!("a packet of {pages} pages and {payload_len} bytes of payload"),
        )
    })?;
    header.clear();
    RamPacketHeader {
        flags,
        packet_num: shared.packets.fetch_add(1, Ordering::Relaxed),
        block: Some(block.block.name()),
        normal,
        zero,
        payload_len,
    }
    .encode(PAGE_SIZE, header);
    Ok(())
}

/// Adds checksums to the header of a packet with pages, if the destination looks at them.
fn seal_pages(header: &mut [u8], shared: &SourceShared, pages: usize, hashes: &[u64]) -> Result<()> {
    if !shared.agreed().checksums {
        return Ok(());
    }
    if hashes.len() != pages {
        let detail = format!("{} hashes of {pages} pages in a packet", hashes.len());
        return Err(Error::bug(Phase::Active, detail));
    }
    seal(header, dialect::checksum_of_pages(hashes))
}

fn seal(header: &mut [u8], content: u64) -> Result<()> {
    PacketChecks::seal(header, content, hash).map_err(|invalid| Error::bug(Phase::Active, invalid))
}

/// One vectored write of a packet whose payload is private memory.
fn send_private(channel: &Channel, header: &[u8], payload: &[u8]) -> Result<()> {
    channel
        .send_vectored(&mut [IoSlice::new(header), IoSlice::new(payload)])
        .map_err(|error| packet_error(payload.len(), error))
}

fn packet_error(payload_len: usize, error: std::io::Error) -> Error {
    Error::io(Phase::Active, format_args!("sending a packet with {payload_len} bytes of pages"), error)
}
