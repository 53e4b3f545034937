//! Pages on the main channel, for a migration without parallel channels.

use std::ops::Range;

use multifd_wire::RamRecord;

use crate::error::{Error, Phase, Result};
use crate::guest::{PAGE, PAGE_SIZE};
use crate::io::IoVecs;
use crate::run::counters::Counters;
use crate::source::main_writer::MainWriter;
use crate::source::outgoing::OutgoingBlock;
use crate::source::packet::{Content, Packet, Treatment};
use crate::source::rounds::{RoundContext, ZeroReport};
use crate::source::shared::SourceShared;
use crate::stream::dialect;
use crate::work::{Batch, BlockIndex, Place, Round};

/// Sends the pages of a round as records of the section that is open on `main`. One call writes a
/// batch: with a header a page, at most 256 of the 1024 ranges that the kernel takes.
pub(super) fn send_round(
    round: &Round,
    context: RoundContext,
    main: &mut MainWriter,
    shared: &SourceShared,
) -> Result<()> {
    let (next, mut place) = (shared.next(round), Place::default());
    let (mut packet, mut ranges) = (Packet::default(), IoVecs::default());
    while let Some(batch) = next.claim(&mut place, shared.batch_pages()) {
        let sent = send_batch(main, &batch, context, shared, &mut packet, &mut ranges);
        if sent.is_err() {
            next.put_back(&mut place);
            return sent;
        }
    }
    main.flush()
}

fn send_batch(
    main: &mut MainWriter,
    batch: &Batch<'_>,
    context: RoundContext,
    shared: &SourceShared,
    packet: &mut Packet,
    ranges: &mut IoVecs,
) -> Result<()> {
    let block = &shared.ram.hold(batch.block);
    packet.clear();
    match shared.deltas_for_main(context) {
        Some(cache) => {
            let treatment = Treatment { cache: Some((cache, context)), ..Treatment::default() };
            packet.copy_in(&shared.ram, block, batch.pages, treatment)?;
        }
        None => packet.sort_out(&shared.ram, block, batch.pages)?,
    }
    let counters = &shared.session.counters.main;
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
    index: BlockIndex,
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

/// One vectored write: what is buffered on main, then header, page, header, page, ... The pages are
/// not copied, unless the cache has made a copy that must go instead of them.
fn send_pages(
    main: &mut MainWriter,
    ranges: &mut IoVecs,
    index: BlockIndex,
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
    main.ranges(list).map_err(|error| packet.fault(block, error, |error| main.error(error)))?;
    headers.clear();
    *main.unsent() = headers;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use multifd_transports::Channel;
    use multifd_wire::BlockRef;

    use super::*;
    use crate::source::shared::tests::{ram, shared};
    use crate::work::{Requested, UrgentPages, WantedPage};

    /// Block and page of every record in `bytes`, each with what the page begins with.
    fn records(mut bytes: &[u8]) -> Vec<(String, u64)> {
        let (mut block, mut seen) = (String::new(), Vec::new());
        while let Some((record, used)) = RamRecord::parse(bytes, PAGE_SIZE).unwrap() {
            let RamRecord::Page { offset, block: reference } = record else { panic!("{record:?}") };
            if let BlockRef::Named(name) = reference {
                block = name.as_str().to_owned();
            }
            let page = offset / PAGE as u64;
            assert_eq!(u64::from(bytes[used]), page % 256, "the content is that of the page");
            seen.push((block.clone(), page));
            bytes = &bytes[used + PAGE..];
        }
        assert!(bytes.is_empty());
        seen
    }

    #[test]
    fn wanted_pages_leave_before_their_turn_and_every_page_leaves_once() {
        let shared = shared(ram(&[("a", 1000), ("b", 50)]));
        let urgent = UrgentPages::new(16, &shared.ram.dirty);
        for (name, page) in [("a", 999), ("a", 500), ("b", 7), ("a", 999)] {
            let block = shared.ram.find(name).unwrap();
            assert_ne!(urgent.request(WantedPage { block, page }), Requested::Unknown);
        }
        shared.urgent.set(urgent).unwrap();
        let (sender, receiver) = Channel::pair().unwrap();
        let destination = std::thread::scope(|scope| {
            let reading = scope.spawn(|| {
                let (mut bytes, mut piece) = (Vec::new(), vec![0; 1 << 16]);
                loop {
                    match receiver.recv(&mut piece).unwrap() {
                        0 => break bytes,
                        len => bytes.extend_from_slice(&piece[..len]),
                    }
                }
            });
            let mut main = MainWriter::new(Arc::new(sender), None);
            let context = RoundContext { round: 1, last: false };
            send_round(&shared.ram.round(1), context, &mut main, &shared).unwrap();
            main.channel().finish_sending().unwrap();
            reading.join().unwrap()
        });
        let sent = records(&destination);
        let first: Vec<_> = sent.iter().take(4).map(|(block, page)| (&block[..], *page)).collect();
        assert_eq!(first, [("a", 500), ("a", 999), ("b", 7), ("a", 0)]);
        assert_eq!(sent.iter().collect::<std::collections::BTreeSet<_>>().len(), 1050);
        assert_eq!(sent.len(), 1050);
        let progress = shared.session.progress();
        assert_eq!((progress.pages_normal, progress.per_channel[0].pages_normal), (1050, 1050));
    }
}
