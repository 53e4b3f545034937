//! The hot paths, each on an input that is always the same.

use std::hint::black_box;
use std::sync::Arc;

use multifd_benches::content::{PAGE, pages};
use multifd_codecs::{parse_codec, xbzrle, zero};
use multifd_engine::DirtyBitmap;
use multifd_engine::unstable::{Claim, Round, page_hash};
use multifd_wire::{BlockName, CodecId, PacketFlags, PageSize, RamPacket, RamPacketHeader};

use crate::{MOST_TIMES, Problem};

/// Pages in a packet.
const BATCH: usize = 128;

/// Pages of the bitmaps: 1 GiB of guest.
const GUEST: usize = 1 << 18;

/// One hot path: the name says what is done.
pub(crate) struct Case {
    pub(crate) name: &'static str,
    /// Makes the input, and does the work so many times.
    pub(crate) run: fn(usize) -> Result<(), Problem>,
}

pub(crate) const CASES: &[Case] = &[
    Case { name: "scan 1024 zero pages", run: |times| scan("zero", times) },
    Case { name: "scan 1024 pages of data", run: |times| scan("heap", times) },
    Case { name: "encode zlib:1", run: |times| encode("zlib:1", times) },
    Case { name: "encode zstd:1", run: |times| encode("zstd:1", times) },
    Case { name: "encode zstd:3", run: |times| encode("zstd:3", times) },
    Case { name: "encode lz4", run: |times| encode("lz4", times) },
    Case { name: "decode zlib:1", run: |times| decode("zlib:1", times) },
    Case { name: "decode zstd:1", run: |times| decode("zstd:1", times) },
    Case { name: "decode zstd:3", run: |times| decode("zstd:3", times) },
    Case { name: "decode lz4", run: |times| decode("lz4", times) },
    Case { name: "difference of 64 bytes", run: difference },
    Case { name: "hash 128 pages", run: hash },
    Case { name: "sync 1 % of 1 GiB", run: sync },
    Case { name: "claim 10 % of 1 GiB", run: claim },
    Case { name: "header of a packet", run: header },
];

fn scan(kind: &str, times: usize) -> Result<(), Problem> {
    let memory = pages(kind, 1024);
    for _ in 0..times {
        black_box(memory.chunks_exact(PAGE).filter(|page| zero::is_zero(black_box(page))).count());
    }
    Ok(())
}

/// Batches of text, pointers and random bytes, as guests have them side by side; none is like
/// another.
fn batches() -> Result<Vec<Vec<u8>>, Problem> {
    let kinds = ["text", "heap", "heap", "random"];
    let share = BATCH / kinds.len() * PAGE;
    let memory = kinds.map(|kind| pages(kind, 2 * BATCH * MOST_TIMES));
    // Pages of one kind are not taken twice.
    let part = |(kind, memory): (usize, &'_ Vec<u8>), number: usize| {
        memory.chunks_exact(share).nth(kind * MOST_TIMES + number).map(<[u8]>::to_vec)
    };
    let batch =
        |number| -> Option<Vec<_>> { memory.iter().enumerate().map(|memory| part(memory, number)).collect() };
    let batches = (0..MOST_TIMES).map(|number| batch(number).map(|parts| parts.concat()));
    batches.collect::<Option<_>>().ok_or_else(|| "fewer pages than the batches take".into())
}

fn encode(codec: &str, times: usize) -> Result<(), Problem> {
    let mut out = Vec::new();
    let mut encoder = parse_codec(codec)?.encoder()?;
    for batch in batches()?.iter().take(times) {
        out.clear();
        encoder.prepare(black_box(batch), &mut out)?;
    }
    black_box(out);
    Ok(())
}

fn decode(codec: &str, times: usize) -> Result<(), Problem> {
    let codec = parse_codec(codec)?;
    let (mut encoder, mut decoder) = (codec.encoder()?, codec.decoder()?);
    let batches = batches()?;
    // All packets are made whatever `times` is, so that only decoding differs.
    let packets = batches.iter().map(|batch| {
        let mut packet = Vec::new();
        encoder.prepare(batch, &mut packet).map(|()| packet)
    });
    let packets = packets.collect::<Result<Vec<_>, _>>()?;
    let mut decoded = vec![0; BATCH * PAGE];
    for packet in packets.iter().take(times) {
        decoder.recv_pages(black_box(packet), &mut decoded)?;
    }
    if times > 0 && batches.get(times - 1) != Some(&decoded) {
        return Err("decoded to other pages".into());
    }
    Ok(())
}

fn difference(times: usize) -> Result<(), Problem> {
    let old = pages("heap", 1);
    let mut new = old.clone();
    new.iter_mut().step_by(PAGE / 64).for_each(|byte| *byte = !*byte);
    let (mut delta, mut page) = ([0; PAGE], old.clone());
    for _ in 0..times {
        let xbzrle::Outcome::Delta(len) = xbzrle::encode(black_box(&old), black_box(&new), &mut delta) else {
            return Err("no difference".into());
        };
        page.copy_from_slice(&old);
        xbzrle::decode(delta.get(..len).ok_or("a longer delta than its buffer")?, &mut page)?;
    }
    black_box(page);
    Ok(())
}

fn hash(times: usize) -> Result<(), Problem> {
    for batch in batches()?.iter().take(times) {
        black_box(batch.chunks_exact(PAGE).fold(0, |all, page| all ^ page_hash(black_box(page))));
    }
    Ok(())
}

fn sync(times: usize) -> Result<(), Problem> {
    let into = DirtyBitmap::new(GUEST);
    for _ in 0..times {
        let log = DirtyBitmap::new(GUEST);
        (0..GUEST).step_by(100).for_each(|page| log.set(page));
        log.move_to(&into);
    }
    black_box(into);
    Ok(())
}

fn claim(times: usize) -> Result<(), Problem> {
    for _ in 0..times {
        let bitmap = DirtyBitmap::new(GUEST);
        (0..GUEST).step_by(10).for_each(|page| bitmap.set(page));
        let bitmaps = [Arc::new(bitmap)].into_iter().collect();
        let round = Round::new(&bitmaps, 1);
        let (mut claim, mut claimed) = (Claim::default(), 0);
        while let Some(batch) = round.claim(&mut claim, BATCH) {
            claimed += black_box(batch).pages.len();
        }
        if claimed != GUEST.div_ceil(10) {
            return Err(format!("{claimed} pages were claimed").into());
        }
    }
    Ok(())
}

fn header(times: usize) -> Result<(), Problem> {
    let name = BlockName::try_from("pc.ram")?;
    let normal: Vec<u64> = (0..100).map(|at| at * PAGE as u64).collect();
    let zero: Vec<u64> = (100..128).map(|at| at * PAGE as u64).collect();
    let mut out = Vec::new();
    for number in 0..times {
        out.clear();
        let header = RamPacketHeader {
            flags: PacketFlags::pages(CodecId::NONE),
            payload_len: 409_600,
            packet_num: number as u64,
            block: Some(&name),
            normal: &normal,
            zero: &zero,
        };
        header.encode(PageSize::K4, &mut out);
        let packet = RamPacket::parse(black_box(&out), PageSize::K4)?;
        black_box(packet.normal_offsets().chain(packet.zero_offsets()).sum::<u64>());
    }
    Ok(())
}
