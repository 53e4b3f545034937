//! Records of the RAM section.

use multifd_tests::Outcome;
use multifd_tests::peer::{PAGE, Recording};
use multifd_wire::{BlockName, BlockRef, PageSize, RamRecord};

use crate::fixture::{refused, single};

fn named(name: &str) -> BlockRef {
    BlockRef::Named(BlockName::try_from(name).unwrap())
}

/// A record, and what follows it, at the start of PART.
fn with(record: &RamRecord, then: &[u8]) -> Recording {
    let mut bytes = Vec::new();
    record.encode(PageSize::K4, &mut bytes);
    bytes.extend(then);
    single().inserted("page", 0, &bytes)
}

/// A word with these flags, and nothing else.
fn word(word: u64) -> Recording {
    single().inserted("page", 0, &word.to_be_bytes())
}

#[test]
fn flags() -> Outcome {
    refused([
        (
            "unknown",
            word(0x400),
            &["active, main (unix:", "a RAM record at byte", "ram record: 0x400 (unknown flags)"],
        ),
        ("two kinds", word(0x00a), &["0xa (more than one kind of record)", "expected one of ZERO"]),
        ("none", word(0x1000), &["0x1000 (no kind of record)"]),
        ("FULL", word(0x001), &["FULL"]),
        ("HOOK", word(0x080), &["HOOK"]),
        ("an address on EOS", word(0x1010), &["an address or CONTINUE on a record that has no page"]),
        ("CONTINUE on FLUSH", word(0x220), &["an address or CONTINUE"]),
        ("a second list", word(0x1004), &["main", "a second list of RAM blocks"]),
    ])
}

#[test]
fn compressed_pages() -> Outcome {
    let compressed = |len: u32, bytes: &[u8]| {
        with(&RamRecord::Compressed { offset: 0x3000, block: named("pc.ram"), len }, bytes)
    };
    let packed = |bytes: &[u8]| {
        let mut out = Vec::with_capacity(1 << 13);
        let mut zlib = flate2::Compress::new(flate2::Compression::fast(), true);
        zlib.compress_vec(bytes, &mut out, flate2::FlushCompress::Finish).unwrap();
        compressed(u32::try_from(out.len()).unwrap(), &out)
    };
    let where_: &str = "compressed page 3 of RAM block pc.ram";
    refused([
        ("no zlib stream", compressed(9, &[7; 9]), &["active, main (unix:", where_]),
        ("less than a page", packed(&[7; PAGE - 1]), &[where_]),
        ("more than a page", packed(&[7; PAGE + 1]), &[where_]),
        ("no bytes", compressed(0, &[]), &["length of a compressed page: 0, expected 1..=4110"]),
        ("more than zlib makes of it", compressed(4111, &[]), &["4111, expected 1..=4110"]),
    ])
}

#[test]
fn pages() -> Outcome {
    let page = |offset, block| with(&RamRecord::Page { offset, block }, &[1; PAGE]);
    let zero = |offset, block| with(&RamRecord::Zero { offset, block }, &[]);
    let past = "pages of 4096 bytes below 0x8000 are there";
    let mut filled = zero(0, named("pc.ram"));
    filled.write("inserted", 0)[15] = 7;
    refused([
        (
            "CONTINUE before any name",
            page(0, BlockRef::Same),
            &["main", "CONTINUE", "no RAM block was named before"],
        ),
        ("an unknown block", page(0, named("pc.rom")), &["main", "unknown RAM block \"pc.rom\""]),
        (
            "one page past the end",
            page(0x8000, named("pc.ram")),
            &["offset 0x8000 in RAM block pc.ram", past],
        ),
        ("far past the end", zero(!0xfff, named("pc.ram")), &["offset 0xfffffffffffff000", past]),
        (
            "another block's length",
            page(0x2000, named("pc.bios")),
            &["0x2000 in RAM block pc.bios", "below 0x2000"],
        ),
        ("a fill byte", filled, &["fill byte of a zero page: 7, expected 0"]),
    ])
}

#[test]
fn differences() -> Outcome {
    let delta = |bytes: &[u8]| {
        let len = u16::try_from(bytes.len()).unwrap();
        with(&RamRecord::Xbzrle { offset: 0x3000, block: named("pc.ram"), len }, bytes)
    };
    let head = |encoding: u8, len: u16| {
        let mut recording = delta(&[0, 1, 9]);
        let bytes = recording.write("inserted", 0);
        let at = bytes.len() - 6;
        bytes[at] = encoding;
        bytes[at + 1..at + 3].copy_from_slice(&len.to_be_bytes());
        recording
    };
    let where_: &str = "xbzrle record for page 3 of RAM block pc.ram";
    // 4095 bytes are left alone, two are changed.
    let overrun = [0xff, 0x1f, 0x02, 1, 2];
    refused([
        ("a run past the page", delta(&overrun), &["active, main (unix:", where_]),
        ("an unchanged run past the page", delta(&[0x81, 0x20, 0x01, 1]), &[where_]),
        ("fewer bytes than it says", delta(&[0, 9, 1, 2]), &[where_]),
        ("half a pair", delta(&[1]), &[where_]),
        ("an empty run", delta(&[0, 0, 1]), &[where_]),
        ("an empty run between others", delta(&[0, 1, 5, 0, 1, 5]), &[where_]),
        ("no bytes", head(1, 0), &["xbzrle length: 0, expected 1..=4096"]),
        ("more than a page", head(1, 4097), &["xbzrle length: 4097, expected 1..=4096"]),
        ("another encoding", head(2, 3), &["xbzrle encoding: 2, expected 1"]),
    ])
}
