//! A packet that has been received: its checksum, its pages into guest memory, and its errors.

use std::io;

use multifd_wire::{PacketChecks, RamPacket};

use crate::destination::place::{BlockSink, PlacePages};
use crate::error::{Error, ErrorKind, Phase, Result};
use crate::guest::{PAGE, hash};
use crate::stream::dialect;

/// Leaves the hashes of `pages` in `hashes`, if anything is made of them. An error if they are not
/// what was sent.
pub(super) fn check(
    sink: &BlockSink,
    packet: &RamPacket<'_>,
    pages: &[u8],
    checks: Option<PacketChecks>,
    hashes: &mut Vec<u64>,
) -> Result<()> {
    hashes.clear();
    if checks.is_some() || sink.keeps_digests() {
        hashes.extend(pages.chunks_exact(PAGE).map(hash));
    }
    checks.map_or(Ok(()), |checks| compare(packet, dialect::checksum_of_pages(hashes), checks))
}

/// Compares the checksum of what followed the header.
pub(super) fn compare(packet: &RamPacket<'_>, seen: u64, checks: PacketChecks) -> Result<()> {
    if seen == checks.content {
        return Ok(());
    }
    let detail = format!(
        "packet {} with {} pages of RAM block {} was changed on the way: its checksum is {seen:#018x}, expected {:#018x}; no \
         page of it was placed",
        packet.packet_num(),
        packet.normal_pages(),
        packet.block().unwrap_or_default(),
        checks.content,
    );
    Err(Error::new(ErrorKind::InvalidStream, Phase::Active, detail))
}

/// Puts the packet's pages where they belong; neighbours go in one write. `hashes`: of the pages,
/// if digests are kept.
pub(super) fn store(
    sink: &BlockSink,
    packet: &RamPacket<'_>,
    pages: &[u8],
    hashes: &[u64],
    place: &impl PlacePages,
) -> Result<()> {
    let mut run: Option<(usize, usize, usize)> = None; // first page, pages, index of the first in the packet
    let store = |(first, count, at): (usize, usize, usize)| {
        let content = pages.get(at * PAGE..(at + count) * PAGE).ok_or_else(|| too_large(packet))?;
        match hashes.get(at..at + count) {
            Some(hashes) => sink.write_hashed(first, content, hashes, place),
            None => sink.write(first, content, place),
        }
    };
    for (index, offset) in packet.normal_offsets().enumerate() {
        let page = sink.page_at(offset)?;
        run = match run {
            Some((first, count, at)) if first + count == page => Some((first, count + 1, at)),
            Some(done) => {
                store(done)?;
                Some((page, 1, index))
            }
            None => Some((page, 1, index)),
        };
    }
    run.map_or(Ok(()), store)
}

/// Names the first of the packet's pages that the kernel could not write.
pub(super) fn cannot_be_written(sink: &BlockSink, packet: &RamPacket<'_>, error: io::Error) -> Error {
    let mut pages = packet.normal_offsets().filter_map(|offset| sink.page_at(offset).ok()).peekable();
    let first = pages.peek().copied().unwrap_or(0);
    let bad = pages.find(|page| !sink.block().can_be_written(*page)).unwrap_or(first);
    sink.fault("writing", bad..bad + 1, error)
}

/// `RamPacket::parse` lets no such packet through.
pub(super) fn too_large(packet: &RamPacket<'_>) -> Error {
    let (pages, payload) = (packet.normal_pages(), packet.payload_len());
    Error::bug(Phase::Active, format_args!("a packet of {pages} pages in {payload} bytes was let through"))
}

pub(super) fn pages_missing(packet: &RamPacket<'_>, error: io::Error) -> Error {
    Error::io(Phase::Active, format_args!("receiving {} bytes of pages", packet.payload_len()), error)
}

/// `packet` may have been changed on the way, too.
pub(super) fn not_decoded(
    packet: &RamPacket<'_>,
    error: impl std::error::Error + Send + Sync + 'static,
) -> Error {
    let (number, block) = (packet.packet_num(), packet.block().unwrap_or_default());
    let detail = format!("packet {number} of RAM block {block}: pages do not decode");
    Error::new(ErrorKind::Codec, Phase::Active, detail).because(error)
}

pub(super) fn codec_error(error: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::new(ErrorKind::Codec, Phase::Active, "no decoder").because(error)
}
