//! Pages on the main channel, for a migration without parallel channels.

use std::ops::Range;

use multifd_wire::RamRecord;

use super::main_stream::MainStream;
use super::outgoing::OutgoingBlock;
use super::rounds::ZeroMail;
use super::shared::Shared;
use crate::error::{Error, ErrorKind, Phase, Result};
use crate::ram::{Batch, Claim, IoVecs, PAGE, Round};
use crate::session::Counters;

/// Pages written in one call: with a header each, 256 of the 1024 ranges that the kernel takes.
const BATCH_PAGES: usize = 128;

/// Sends the pages of a round as records of the section that is open on `main`.
pub(super) fn send_round(main: &mut MainStream, round: &Round, shared: &Shared) -> Result<()> {
    let (mut claim, mut batch, mut ranges) = (Claim::default(), Batch::default(), IoVecs::default());
    while round.claim(&mut claim, BATCH_PAGES, &mut batch) {
        let Some(block) = shared.ram.blocks.get(batch.block) else { continue };
        let (zero, normal): (Vec<usize>, Vec<usize>) =
            batch.pages.iter().copied().partition(|page| block.goes_as_zero(*page));
        if !zero.is_empty() {
            let offsets: Vec<u64> = zero.iter().map(|page| (page * PAGE) as u64).collect();
            shared.pace(zero.len() * (size_of::<u64>() + 1))?;
            main.zero_pages(&shared.ram, &ZeroMail { block: batch.block, offsets })?;
        }
        if !normal.is_empty() {
            send_pages(main, &mut ranges, batch.block, block, &normal, shared)?;
        }
        let counters = &shared.session.counters;
        Counters::add(&counters.pages_zero, zero.len());
        Counters::add(&counters.pages_normal, normal.len());
    }
    main.flush()
}

/// One vectored write: what is buffered on main, then header, page, header, page, ... The pages never leave guest memory.
fn send_pages(
    main: &mut MainStream,
    ranges: &mut IoVecs,
    index: usize,
    block: &OutgoingBlock,
    pages: &[usize],
    shared: &Shared,
) -> Result<()> {
    let mut headers = std::mem::take(main.unsent());
    let mut spans: Vec<Range<usize>> = Vec::with_capacity(pages.len());
    let mut start = 0;
    for page in pages {
        let name = main.naming().refer(index, block.block.name());
        let record = RamRecord::Page { offset: (page * PAGE) as u64, block: name };
        record.encode(crate::ram::PAGE_SIZE, &mut headers);
        spans.push(start..headers.len());
        start = headers.len();
    }
    shared.pace(headers.len() + pages.len() * PAGE)?;
    let mut list = ranges.start();
    for (page, span) in pages.iter().zip(spans) {
        list.private(headers.get(span).unwrap_or_default());
        list.guest(&block.block.run(*page, 1).ok_or_else(|| {
            Error::new(ErrorKind::GuestMemory, Phase::Active, "a page outside of its block was claimed")
        })?);
    }
    list.send(main.channel()).map_err(|error| main.error(error))?;
    headers.clear();
    *main.unsent() = headers;
    Ok(())
}
