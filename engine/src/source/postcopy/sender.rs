//! Pages of a post-copy on one connection: records of whole host pages, in ascending order.

use std::ops::Range;
use std::sync::Arc;

use multifd_transports::Channel;
use multifd_wire::RamRecord;

use crate::error::{Error, Phase, Result};
use crate::guest::{PAGE, PAGE_SIZE};
use crate::io::IoVecs;
use crate::run::counters::{ChannelCounters, Counters};
use crate::source::packet::{Content, Packet};
use crate::source::rounds::BlockNaming;
use crate::source::shared::SourceShared;
use crate::work::BlockIndex;

/// Writes page records to a connection, and names blocks as that connection's reader knows them.
pub(super) struct PageSender {
    channel: Arc<Channel>,
    name: String,
    naming: BlockNaming,
    packet: Packet,
    headers: Vec<u8>,
    /// The records before each page with content.
    spans: Vec<Range<usize>>,
    ranges: IoVecs,
}

impl PageSender {
    /// `name`: what errors call the connection.
    pub(super) fn new(channel: Arc<Channel>, name: String) -> Self {
        Self {
            channel,
            name,
            naming: BlockNaming::default(),
            packet: Packet::default(),
            headers: Vec::new(),
            spans: Vec::new(),
            ranges: IoVecs::default(),
        }
    }

    /// Sends these pages of one block, which are whole host pages; gives the bytes that it took.
    pub(super) fn send(
        &mut self,
        shared: &SourceShared,
        counters: &ChannelCounters,
        index: BlockIndex,
        pages: &[usize],
    ) -> Result<usize> {
        let block = &shared.ram.hold(index);
        self.packet.clear();
        self.packet.sort_out(&shared.ram, block, pages)?;
        self.encode_headers(index, shared);
        let mut list = self.ranges.start();
        let mut end = 0;
        let mut bytes = self.headers.len();
        for (content, span) in self.packet.contents(block).zip(&self.spans) {
            end = span.end;
            let header = self.headers.get(span.clone());
            list.private(header.ok_or_else(|| Error::bug(Phase::Postcopy, "a page without its record"))?);
            bytes += PAGE;
            match content? {
                Content::Private(bytes) => list.private(bytes),
                Content::Guest(page) => list.guest(&page),
            }
        }
        // Zero pages behind the last page with content.
        let zeros = self.headers.get(end..);
        list.private(
            zeros.ok_or_else(|| Error::bug(Phase::Postcopy, "records that end before their pages"))?,
        );
        list.send(&self.channel).map_err(|error| {
            let name = || self.name.clone();
            self.packet
                .fault(block, error, |error| Error::io(Phase::Postcopy, "sending pages", error).on(name()))
        })?;
        Counters::add(&counters.pages_zero, self.packet.zero.len());
        Counters::add(&counters.pages_normal, self.packet.normal.len());
        Ok(bytes)
    }

    /// The connection ends with a record, for a reader that waits for one.
    pub(super) fn end_of_records(channel: &Channel) -> std::io::Result<()> {
        let mut bytes = Vec::new();
        RamRecord::EndOfSection.encode(PAGE_SIZE, &mut bytes);
        channel.send_all(&bytes)
    }

    /// Zero pages and others in one ascending order: the destination puts huge pages together from
    /// them.
    fn encode_headers(&mut self, index: BlockIndex, shared: &SourceShared) {
        let Self { naming, packet, headers, spans, .. } = self;
        headers.clear();
        spans.clear();
        let name = shared.ram.blocks.at(index).block.name();
        let mut zeros = packet.zero.iter().copied().peekable();
        let mut start = 0;
        for offset in &packet.normal {
            while let Some(zero) = zeros.next_if(|zero| zero < offset) {
                RamRecord::Zero { offset: zero, block: naming.refer(index, name) }.encode(PAGE_SIZE, headers);
            }
            RamRecord::Page { offset: *offset, block: naming.refer(index, name) }.encode(PAGE_SIZE, headers);
            spans.push(start..headers.len());
            start = headers.len();
        }
        for zero in zeros {
            RamRecord::Zero { offset: zero, block: naming.refer(index, name) }.encode(PAGE_SIZE, headers);
        }
    }
}
