//! One parallel channel: packets in, pages into guest memory.

use std::io;
use std::sync::Arc;
use std::time::Instant;

use multifd_codecs::{Codec, CodecId, Decoder};
use multifd_transports::Channel;
use multifd_wire::{
    DeviceStatePacket, PACKET_PREFIX_LEN, PacketChecks, PacketKind, RamPacket, codec_stream, header_len,
    pages_per_packet,
};

use super::packet::{
    cannot_be_written, check, codec_error, compare, not_decoded, pages_missing, store, too_large,
};
use crate::destination::place::{BlockSink, BlockSinks, PlacePages};
use crate::destination::postcopy::parallel::LinkPart;
use crate::destination::shared::{DestinationShared, DevicePacket};
use crate::error::{Error, ErrorKind, Phase, Result};
use crate::guest::{PAGE, PAGE_SIZE, hash};
use crate::io::IoVecs;
use crate::run::budget::Share;
use crate::run::counters::{ChannelCounters, Counters};
use crate::run::workers::Crew;
use crate::stream::dialect;

/// Bytes of a packet's pages.
const PAGES_LEN: usize = pages_per_packet(PAGE_SIZE) * PAGE;

/// A codec, and which of its streams.
type StreamId = (CodecId, u8);

/// Most streams of codecs on a channel: a source has no use for more levels at a time.
const MAX_STREAMS: usize = 8;

const HEADER_LEN: usize = header_len(PAGE_SIZE);

/// The worker of one channel. Owns its buffers: at most 1 MiB of payload and 512 KiB of decoded
/// pages.
pub(crate) struct ChannelWorker {
    channel: Arc<Channel>,
    counters: Arc<ChannelCounters>,
    shared: Arc<DestinationShared>,
    /// The number that the peer gave the channel.
    id: u8,
    sinks: Option<Arc<BlockSinks>>,
    /// After the switch to post-copy: the link that it is a part of.
    link: Option<LinkPart>,
    /// One for each stream of a codec that has come, each with its own history of the channel.
    decoders: Vec<(StreamId, Box<dyn Decoder>)>,
    /// The stream of the packet that is being read.
    stream: StreamId,
    payload: Vec<u8>,
    pages: Vec<u8>,
    /// Of the pages of a packet.
    hashes: Vec<u64>,
    ranges: IoVecs,
    /// Of the buffers, and of the decoders' windows.
    memory: Share,
}

impl ChannelWorker {
    /// Reads everything after the initial packet, on a thread of its own. The channel has joined.
    pub(crate) fn start(
        channel: Channel,
        id: u8,
        shared: &Arc<DestinationShared>,
        crew: &Crew,
    ) -> Result<()> {
        let channel = shared.session.adopt(channel, Phase::Accept)?;
        shared.session.close_on_stop(&channel);
        let counters = shared.session.counters.channel(id, &channel);
        Self::spawn((channel, counters), id, None, shared, crew)
    }

    /// The same of a channel that goes on after the switch to post-copy, over a new `link`.
    pub(crate) fn go_on(
        channel: Channel,
        id: u8,
        link: LinkPart,
        shared: &Arc<DestinationShared>,
        crew: &Crew,
    ) -> Result<()> {
        let channel = shared.session.adopt(channel, Phase::Accept)?;
        let counters = shared.session.counters.replaced_channel(id, &channel);
        Self::spawn((channel, counters), id, Some(link), shared, crew)
    }

    fn spawn(
        (channel, counters): (Arc<Channel>, Arc<ChannelCounters>),
        id: u8,
        link: Option<LinkPart>,
        shared: &Arc<DestinationShared>,
        crew: &Crew,
    ) -> Result<()> {
        let mut worker = Self {
            channel,
            counters,
            shared: Arc::clone(shared),
            id,
            sinks: None,
            link,
            decoders: Vec::new(),
            stream: (CodecId::NONE, 0),
            payload: Vec::new(),
            pages: Vec::new(),
            hashes: Vec::new(),
            ranges: IoVecs::default(),
            memory: shared.limits.memory.share(),
        };
        crew.spawn("mig-recv", Phase::Accept, move || worker.run())
    }

    fn run(&mut self) -> Result<()> {
        // A channel that has failed keeps its place: no sync point may pass before the switch has
        // tripped.
        let result = self
            .packets()
            .map_err(|error| error.on(format!("channel {} ({})", self.id, self.channel.peer())));
        if let Some(link) = self.link.take() {
            // The guest has no other memory than the one that is half here: this ends the link and
            // no more.
            self.channel.closer().close();
            self.shared.channels.ended(self.id);
            link.ended(result);
            return Ok(());
        }
        if !self.shared.channels.finished() {
            if result.is_ok() {
                self.shared.channels.ended(self.id);
            }
            return result;
        }
        // After the end of the main stream a channel may end as it likes: all that it was needed
        // for is here.
        if let Err(error) = result {
            self.channel.closer().close();
            match error.kind() {
                ErrorKind::PeerMisbehaved => tracing::warn!("{}", error.chain()),
                _ => tracing::debug!("after the end of the main stream: {}", error.chain()),
            }
        }
        self.shared.channels.ended(self.id);
        Ok(())
    }

    /// Until the peer ends the channel between two packets.
    fn packets(&mut self) -> Result<()> {
        let mut header = [0; HEADER_LEN];
        loop {
            let (prefix, rest) = header.split_at_mut(PACKET_PREFIX_LEN);
            let Some(prefix) = self.next_prefix(prefix)? else { return Ok(()) };
            let kind =
                PacketKind::parse(&prefix).map_err(|invalid| Error::invalid(Phase::Active, invalid))?;
            self.shared.channels.progressed(self.id);
            match kind {
                PacketKind::DeviceState if self.link.is_some() => {
                    let detail = "device state after the switch to post-copy";
                    return Err(Error::misbehaved(Phase::Active, detail));
                }
                PacketKind::DeviceState => self.device_state(&prefix)?,
                PacketKind::Ram => {
                    self.receive(Phase::Active, "the rest of a packet header", rest)?;
                    self.ram(&mut header)?;
                }
            }
        }
    }

    /// The first bytes of the next packet. `None`: the channel ended before it. Waiting for a
    /// packet is no fault of the channel, however long; waiting for the rest of one is.
    fn next_prefix(&self, prefix: &mut [u8]) -> Result<Option<[u8; PACKET_PREFIX_LEN]>> {
        let received = loop {
            match self.channel.recv(prefix) {
                Ok(0) => return Ok(None),
                Ok(received) => break received,
                Err(error) if error.kind() == io::ErrorKind::TimedOut => {}
                Err(error) => return Err(Error::io(Phase::Active, "waiting for a packet", error)),
            }
        };
        let mut whole = [0; PACKET_PREFIX_LEN];
        self.receive(
            Phase::Active,
            "the rest of a packet header",
            prefix
                .get_mut(received..)
                .ok_or_else(|| Error::bug(Phase::Active, "more was received than asked for"))?,
        )?;
        whole.copy_from_slice(prefix);
        Ok(Some(whole))
    }

    fn ram(&mut self, header: &mut [u8; HEADER_LEN]) -> Result<()> {
        let invalid = |invalid| Error::invalid(Phase::Active, invalid);
        let checks = match self.shared.speaks_dialect() {
            true => PacketChecks::open(header, hash).map_err(invalid)?,
            false => None,
        };
        let stream = if self.shared.wishes().mixed { codec_stream(header).map_err(invalid)? } else { 0 };
        let packet = RamPacket::parse(header, PAGE_SIZE).map_err(invalid)?;
        self.stream = (packet.flags().codec(), stream);
        if let Some(block) = packet.block() {
            let sinks = match &self.sinks {
                Some(sinks) => Arc::clone(sinks),
                None => Arc::clone(self.sinks.insert(self.shared.sinks()?)),
            };
            let sink = sinks.find(block)?;
            let shared = Arc::clone(&self.shared);
            let _storing = shared.channels.storing(self.id)?;
            if checks.is_none() && self.shared.wishes().checksums {
                let detail = format!("packet {} has no checksum, as was announced", packet.packet_num());
                return Err(Error::misbehaved(Phase::Active, detail));
            }
            self.pages(sink, &packet, checks)?;
        }
        if packet.flags().sync() { self.sync() } else { Ok(()) }
    }

    /// Waits for main, which may have switched to post-copy meanwhile.
    fn sync(&mut self) -> Result<()> {
        if self.link.is_some() {
            let detail = "a sync point on a channel after the switch to post-copy";
            return Err(Error::misbehaved(Phase::Active, detail));
        }
        let channels = &self.shared.channels;
        channels.arrive(self.id)?;
        if channels.has_switched() {
            let none = || Error::bug(Phase::Active, "a channel that goes on before LISTEN");
            let serving = self.shared.serving_now().ok_or_else(none)?;
            self.link = Some(serving.add_channel(&self.channel));
        }
        Ok(())
    }

    fn pages(
        &mut self,
        sink: &BlockSink,
        packet: &RamPacket<'_>,
        checks: Option<PacketChecks>,
    ) -> Result<()> {
        if let Some(link) = self.link.take() {
            let placed = self.place(sink, packet, checks, &link);
            self.link = Some(link);
            return placed;
        }
        if packet.flags().codec() == CodecId::DIALECT_DELTA && self.shared.speaks_dialect() {
            return self.receive_deltas(sink, packet, checks);
        }
        let codec = self.shared.codec(packet.flags())?;
        if packet.normal_pages() > 0 {
            if codec.id() != CodecId::NONE {
                self.receive_packed(&*codec, packet)?;
                let pages = self.pages.get(..packet.normal_pages() * PAGE);
                let pages = pages.ok_or_else(|| too_large(packet))?;
                check(sink, packet, pages, checks, &mut self.hashes)?;
                store(sink, packet, pages, &self.hashes, &sink.best_place())?;
            } else {
                self.receive_plain(sink, packet, checks)?;
                if self.shared.wishes().mixed {
                    Counters::add(&self.counters.pages_uncompressed, packet.normal_pages());
                }
            }
        }
        let zero: Vec<usize> =
            packet.zero_offsets().map(|offset| sink.page_at(offset)).collect::<Result<_>>()?;
        sink.clear(zero)?;
        self.count(packet);
        Ok(())
    }

    fn count(&self, packet: &RamPacket<'_>) {
        let counters = &self.counters;
        Counters::add(&counters.packets, 1);
        Counters::add(&counters.pages_normal, packet.normal_pages());
        Counters::add(&counters.pages_zero, packet.zero_pages());
    }

    /// After the switch to post-copy: a page is there as a whole or not at all, so that all of them
    /// come into a buffer first.
    fn place(
        &mut self,
        sink: &BlockSink,
        packet: &RamPacket<'_>,
        checks: Option<PacketChecks>,
        link: &LinkPart,
    ) -> Result<()> {
        if packet.flags().codec() == CodecId::DIALECT_DELTA {
            let detail = "differences after the switch to post-copy, expected whole pages";
            return Err(Error::misbehaved(Phase::Active, detail));
        }
        let codec = self.shared.codec(packet.flags())?;
        if packet.normal_pages() > 0 {
            if codec.id() == CodecId::NONE {
                self.receive_pages(packet)?;
            } else {
                self.receive_packed(&*codec, packet)?;
            }
        }
        let pages = self.pages.get(..packet.normal_pages() * PAGE).ok_or_else(|| too_large(packet))?;
        check(sink, packet, pages, checks, &mut self.hashes)?;
        for (offset, content) in packet.normal_offsets().zip(pages.chunks_exact(PAGE)) {
            link.put(sink, sink.page_at(offset)?, Some(content))?;
        }
        for offset in packet.zero_offsets() {
            link.put(sink, sink.page_at(offset)?, None)?;
        }
        self.count(packet);
        link.note_pages();
        Ok(())
    }

    fn have_decoder(&mut self, codec: &dyn Codec) -> Result<()> {
        if self.decoders.iter().any(|(stream, _)| *stream == self.stream) {
            return Ok(());
        }
        if self.decoders.len() >= MAX_STREAMS {
            let detail = format!("more than {MAX_STREAMS} streams of codecs");
            return Err(Error::misbehaved(Phase::Active, detail));
        }
        self.decoders.push((self.stream, codec.decoder().map_err(codec_error)?));
        Ok(())
    }

    /// No codec: fresh pages go through the block's file, if no other thread writes there.
    fn receive_plain(
        &mut self,
        sink: &BlockSink,
        packet: &RamPacket<'_>,
        checks: Option<PacketChecks>,
    ) -> Result<()> {
        if sink.is_read_only() || sink.keeps_digests() || checks.is_some() {
            return self.receive_copied(sink, packet, checks, &sink.best_place());
        }
        let fresh = packet.normal_offsets().next().is_some_and(|offset| sink.is_untouched(offset));
        match sink.try_file_writer().filter(|_| fresh) {
            Some(writer) => self.receive_copied(sink, packet, None, &writer),
            None => self.receive_in_place(sink, packet),
        }
    }

    /// The kernel puts the bytes where they belong.
    fn receive_in_place(&mut self, sink: &BlockSink, packet: &RamPacket<'_>) -> Result<()> {
        let mut ranges = self.ranges.start();
        for offset in packet.normal_offsets() {
            let page = sink.page_at(offset)?;
            let slice = sink.block().run(page, 1);
            ranges.guest(
                &slice.ok_or_else(|| Error::new(ErrorKind::GuestMemory, Phase::Active, "page outside"))?,
            );
        }
        ranges.receive(&self.channel).map_err(|error| match error.raw_os_error() {
            Some(libc::EFAULT) => cannot_be_written(sink, packet, error),
            _ => pages_missing(packet, error),
        })?;
        for offset in packet.normal_offsets() {
            sink.note_written(sink.page_at(offset)?, 1);
        }
        Ok(())
    }

    /// A packet of the multifd dialect: differences to what is in guest memory.
    fn receive_deltas(
        &mut self,
        sink: &BlockSink,
        packet: &RamPacket<'_>,
        checks: Option<PacketChecks>,
    ) -> Result<()> {
        self.receive_payload(packet)?;
        checks.map_or(Ok(()), |checks| compare(packet, hash(&self.payload), checks))?;
        let mut payload = &self.payload[..];
        for offset in packet.normal_offsets() {
            sink.apply(sink.page_at(offset)?, dialect::take_delta(&mut payload)?)?;
        }
        if !payload.is_empty() || packet.zero_pages() > 0 {
            let detail = format!(
                "{} bytes and {} zero pages too many with differences",
                payload.len(),
                packet.zero_pages()
            );
            return Err(Error::misbehaved(Phase::Active, detail));
        }
        Counters::add(&self.counters.packets, 1);
        Counters::add(&self.counters.pages_xbzrle, packet.normal_pages());
        Ok(())
    }

    fn receive_payload(&mut self, packet: &RamPacket<'_>) -> Result<()> {
        self.hold(self.payload.capacity().max(packet.payload_len()) + self.pages.capacity())?;
        let mut payload = std::mem::take(&mut self.payload);
        payload.resize(packet.payload_len(), 0);
        self.receive(Phase::Active, "a packet's payload", &mut payload)?;
        self.payload = payload;
        Ok(())
    }

    /// The packet's pages, decoded, at the beginning of the buffer.
    fn receive_packed(&mut self, codec: &dyn Codec, packet: &RamPacket<'_>) -> Result<()> {
        self.have_decoder(codec)?;
        self.receive_payload(packet)?;
        self.hold(self.payload.capacity() + PAGES_LEN)?;
        self.pages.resize(PAGES_LEN, 0);
        let pages = self.pages.get_mut(..packet.normal_pages() * PAGE).ok_or_else(|| too_large(packet))?;
        let mut decoders = self.decoders.iter_mut();
        let decoder = decoders.find(|(stream, _)| *stream == self.stream).map(|(_, decoder)| decoder);
        let decoder = decoder.ok_or_else(|| Error::bug(Phase::Active, "packed pages without a decoder"))?;
        let begun = Instant::now();
        decoder.recv_pages(&self.payload, pages).map_err(|error| not_decoded(packet, error))?;
        let took = usize::try_from(begun.elapsed().as_micros()).unwrap_or(usize::MAX);
        Counters::add(&self.counters.codec_us, took);
        Counters::add(&self.counters.bytes_saved, pages.len().saturating_sub(self.payload.len()));
        let memory = windows(&self.decoders);
        self.memory.grow_to(
            self.payload.capacity() + PAGES_LEN + memory,
            Phase::Active,
            "the decoder's window",
        )
    }

    fn receive_copied(
        &mut self,
        sink: &BlockSink,
        packet: &RamPacket<'_>,
        checks: Option<PacketChecks>,
        place: &impl PlacePages,
    ) -> Result<()> {
        self.receive_pages(packet)?;
        let pages = self.pages.get(..packet.payload_len()).ok_or_else(|| too_large(packet))?;
        check(sink, packet, pages, checks, &mut self.hashes)?;
        store(sink, packet, pages, &self.hashes, place)
    }

    /// The packet's pages, which are not encoded, at the beginning of the buffer.
    fn receive_pages(&mut self, packet: &RamPacket<'_>) -> Result<()> {
        self.hold(self.payload.capacity() + PAGES_LEN)?;
        self.pages.resize(PAGES_LEN, 0);
        let content = self.pages.get_mut(..packet.payload_len()).ok_or_else(|| too_large(packet))?;
        self.channel.recv_exact(content).map_err(|error| pages_missing(packet, error))
    }

    fn device_state(&mut self, prefix: &[u8; PACKET_PREFIX_LEN]) -> Result<()> {
        let mut header = [0; DeviceStatePacket::LEN];
        let (head, rest) = header.split_at_mut(PACKET_PREFIX_LEN);
        head.copy_from_slice(prefix);
        self.receive(Phase::Device, "the rest of a device-state header", rest)?;
        let device =
            DeviceStatePacket::parse(&header).map_err(|invalid| Error::invalid(Phase::Device, invalid))?;
        self.shared.expect_device_packet(&device)?;
        let mut data = Vec::new();
        let len = device.payload_len as usize;
        data.try_reserve_exact(len).map_err(|error| {
            let detail = format!("no memory for {len} bytes of device state");
            Error::new(ErrorKind::PeerMisbehaved, Phase::Device, detail).because(error)
        })?;
        data.resize(len, 0);
        self.receive(Phase::Device, "device state", &mut data)?;
        self.shared.on_device_packet(DevicePacket { device, data });
        Ok(())
    }

    /// Before buffers of so many bytes are there.
    fn hold(&mut self, bytes: usize) -> Result<()> {
        self.memory.grow_to(bytes + windows(&self.decoders), Phase::Active, "the channel's buffers")
    }

    fn receive(&self, phase: Phase, what: &str, into: &mut [u8]) -> Result<()> {
        let wanted = into.len();
        self.channel
            .recv_exact(into)
            .map_err(|error| Error::io(phase, format_args!("receiving {what} ({wanted} bytes)"), error))
    }
}

/// Bytes that the decoders hold.
fn windows(decoders: &[(StreamId, Box<dyn Decoder>)]) -> usize {
    decoders.iter().map(|(_, decoder)| decoder.memory()).sum()
}
