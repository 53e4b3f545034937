//! What checksums and the digest cost: the hash alone, and whole moves over loopback with neither,
//! either and both, in turns, so that a busy machine is one for all. Arguments: MiB of guest (256),
//! turns (9).

use std::hint::black_box;
use std::thread;
use std::time::{Duration, Instant};

use multifd_benches::content::{PAGE, pages};
use multifd_engine::wire::Configuration;
use multifd_engine::{
    Arrived, Codec, Destination, DeviceState, HostMemory, RamBlock, Report, Source, codecs::parse_codec,
    unstable::page_hash,
};
use std::sync::Arc;

/// Checksums, digest.
const WAYS: [(bool, bool); 4] = [(false, false), (true, false), (false, true), (true, true)];

fn main() {
    let numbers: Vec<usize> = std::env::args().filter_map(|argument| argument.parse().ok()).collect();
    let (mib, turns) =
        (numbers.first().copied().unwrap_or(256).max(1), numbers.get(1).copied().unwrap_or(9).max(1));
    hash_alone();
    for kind in ["random", "heap"] {
        let guest = block(mib);
        let content = pages(kind, 256);
        for (index, page) in (0..guest.pages()).zip(content.chunks_exact(PAGE).cycle()) {
            guest.memory().slice(index * PAGE, PAGE).expect("a page").copy_from(page);
        }
        for codec in ["none", "zstd:1"] {
            for channels in [0, 2] {
                if channels > 0 || codec == "none" {
                    compare(&guest, kind, codec, channels, turns);
                }
            }
        }
    }
    println!("{mib} MiB, medians of {turns}; in brackets the time of the same move with neither");
}

fn hash_alone() {
    let page = pages("random", 1);
    let (begun, mut bytes) = (Instant::now(), 0);
    while begun.elapsed() < Duration::from_millis(300) {
        (0..64).for_each(|_| _ = black_box(page_hash(black_box(&page))));
        bytes += 64 * PAGE;
    }
    println!("hash of a page in the cache: {:.1} GB/s", bytes as f64 / begun.elapsed().as_nanos() as f64);
}

fn compare(guest: &RamBlock, kind: &str, codec: &str, channels: usize, turns: usize) {
    let codec: Arc<dyn Codec> = parse_codec(codec).expect("a codec of ours");
    let mut reports = WAYS.map(|_| Vec::new());
    for _ in 0..turns {
        for (way, reports) in WAYS.into_iter().zip(&mut reports) {
            reports.push(moved(guest, &codec, channels, way));
        }
    }
    let mut first = None;
    for ((checksums, digest), mut reports) in WAYS.into_iter().zip(reports) {
        let mut median = |of: fn(&Report) -> Duration| {
            reports.sort_by_key(of);
            of(&reports[reports.len() / 2]).as_secs_f64() * 1000.0
        };
        let (total, downtime) = (median(|report| report.total), median(|report| report.downtime));
        let share = 100.0 * total / *first.get_or_insert(total);
        println!(
            "{kind:7} {:5} {channels} channels, checksums {checksums:5}, digest {digest:5}: {total:8.1} ms ({share:3.0} %), \
             downtime {downtime:6.2} ms",
            codec.name()
        );
    }
}

fn block(mib: usize) -> RamBlock {
    let memory = HostMemory::anonymous(mib << 20).expect("memory");
    RamBlock::new("pc.ram".try_into().expect("a name"), memory)
}

fn moved(
    guest: &RamBlock,
    codec: &Arc<dyn Codec>,
    channels: usize,
    (checksums, digest): (bool, bool),
) -> Report {
    let there = vec![block((guest.pages() * PAGE) >> 20)];
    let anywhere = "tcp:127.0.0.1:0".parse().expect("an endpoint");
    let destination = Destination::builder(there).listen(&anywhere).expect("a port");
    let to = destination.endpoint();
    thread::scope(|scope| {
        let receiving = scope.spawn(move || destination.receive().and_then(Arrived::accept));
        let source = Source::builder(vec![guest.clone()], Configuration::new("bench-10.0"))
            .paused_guest()
            .channels(channels)
            .codec(Arc::clone(codec))
            .checksums(checksums)
            .digest(digest);
        let mut precopy = source.build().and_then(|source| source.connect(&to)).expect("a connection");
        precopy.round().expect("a round");
        let report = precopy.stop_copy().and_then(|last| last.commit(&DeviceState::none())).expect("a move");
        receiving.join().expect("no panic").expect("a guest");
        report
    })
}
