//! Pages on the main channel, for a migration without parallel channels.

use std::ops::Range;

use multifd_wire::RamRecord;

use crate::error::{Error, Phase, Result};
use crate::guest::{PAGE, PAGE_SIZE};
use crate::io::IoVecs;
use crate::run::session::Counters;
use crate::source::main_writer::MainWriter;
use crate::source::outgoing::OutgoingBlock;
use crate::source::packet::{Content, Packet};
use crate::source::rounds::{RoundContext, ZeroReport};
use crate::source::shared::SourceShared;
use crate::stream::dialect;
use crate::work::{Batch, Claim, Round};

/// Sends the pages of a round as records of the section that is open on `main`. One call writes a batch: with a header a page,
/// at most 256 of the 1024 ranges that the kernel takes.
pub(super) fn send_round(
    round: &Round,
    context: RoundContext,
    main: &mut MainWriter,
    shared: &SourceShared,
) -> Result<()> {
    let (mut claim, mut batch, mut ranges) = (Claim::default(), Batch::default(), IoVecs::default());
    let mut packet = Packet::default();
    while round.claim(&mut claim, shared.batch_pages(), &mut batch) {
        let sent = send_batch(main, &batch, context, shared, &mut packet, &mut ranges);
        if sent.is_err() {
            round.put_back(&mut claim, &batch);
            return sent;
        }
    }
    main.flush()
}

fn send_batch(
    main: &mut MainWriter,
    batch: &Batch,
    context: RoundContext,
    shared: &SourceShared,
    packet: &mut Packet,
    ranges: &mut IoVecs,
) -> Result<()> {
    let block = shared.ram.block(batch.block)?;
    packet.clear();
    match shared.deltas_for_main(context) {
        Some(cache) => packet.copy_in(&shared.ram, block, &batch.pages, Some((cache, context)))?,
        None => packet.sort_out(&shared.ram, block, &batch.pages)?,
    }
    let counters = &shared.session.counters;
    Counters::add(&counters.pages_zero, packet.zero.len());
    Counters::add(&counters.pages_normal, packet.normal.len());
    Counters::add(&counters.pages_xbzrle, packet.delta.len());
    if !packet.zero.is_empty() {
        shared.pace(packet.zero.len() * (size_of::<u64>() + 1))?;
        main.zero_pages(
            &shared.ram,
            &ZeroReport { block: batch.block, offsets: std::mem::take(&mut packet.zero) },
        )?;
    }
    send_deltas(main, batch.block, block, packet, shared)?;
    if packet.normal.is_empty() {
        Ok(())
    } else {
        send_pages(main, ranges, batch.block, block, packet, shared)
    }
}

/// Differences are small: they are buffered like other records.
fn send_deltas(
    main: &mut MainWriter,
    index: usize,
    block: &OutgoingBlock,
    packet: &Packet,
    shared: &SourceShared,
) -> Result<()> {
    shared.pace(packet.delta_payload.len())?;
    let mut payload = &packet.delta_payload[..];
    for offset in &packet.delta {
        let delta = dialect::take_delta(&mut payload)?;
        let name = main.naming().refer(index, block.block.name());
        let len = dialect::delta_len(delta)?;
        main.record(&RamRecord::Xbzrle { offset: *offset, block: name, len });
        main.unsent().extend_from_slice(delta);
    }
    Ok(())
}

/// One vectored write: what is buffered on main, then header, page, header, page, ... The pages are not copied, unless the
/// cache has made a copy that must go instead of them.
fn send_pages(
    main: &mut MainWriter,
    ranges: &mut IoVecs,
    index: usize,
    block: &OutgoingBlock,
    packet: &Packet,
    shared: &SourceShared,
) -> Result<()> {
    let mut headers = std::mem::take(main.unsent());
    let mut spans: Vec<Range<usize>> = Vec::with_capacity(packet.normal.len());
    let mut start = 0;
    for offset in &packet.normal {
        let name = main.naming().refer(index, block.block.name());
        RamRecord::Page { offset: *offset, block: name }.encode(PAGE_SIZE, &mut headers);
        spans.push(start..headers.len());
        start = headers.len();
    }
    shared.pace(headers.len() + packet.normal.len() * PAGE)?;
    let mut list = ranges.start();
    for (content, span) in packet.contents(block).zip(spans) {
        let header =
            headers.get(span).ok_or_else(|| Error::bug(Phase::Active, "a page record without its header"))?;
        list.private(header);
        match content? {
            Content::Private(bytes) => list.private(bytes),
            Content::Guest(page) => list.guest(&page),
        }
    }
    list.send(main.channel()).map_err(|error| packet.fault(block, error, |error| main.error(error)))?;
    headers.clear();
    *main.unsent() = headers;
    Ok(())
}
