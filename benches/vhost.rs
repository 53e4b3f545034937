//! Merging the log of vhost back-ends into the dirty bitmap, for a guest of 1 TiB: 256 Mi pages, 32
//! MiB of log. Beside it, the loop that looks at every byte of the log.

use std::fs::File;
use std::hint::black_box;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU8, Ordering};

use criterion::{BatchSize, BenchmarkId, Criterion, criterion_group, criterion_main};
use multifd_engine::DirtyBitmap;
use multifd_engine::vhost::SharedLog;

const PAGES: usize = 256 << 20;
const CHUNK: usize = 1 << 20;

/// A log with one page in `every` set, and how its file looks; 0: none.
fn log(every: usize) -> (SharedLog, Vec<u8>) {
    let mut bytes = vec![0_u8; PAGES / 8];
    if every > 0 {
        (0..PAGES).step_by(every).for_each(|page| bytes[page / 8] |= 1 << (page % 8));
    }
    let log = SharedLog::new((PAGES as u64) << 12).expect("32 MiB of memory");
    (log, bytes)
}

fn fill(file: &File, bytes: &[u8]) {
    for (chunk, at) in bytes.chunks(CHUNK).zip((0..).step_by(CHUNK)) {
        file.write_all_at(chunk, at).expect("the log's file takes all of it");
    }
}

/// What a log is in a front-end without words: fetched byte by byte, set bit by bit.
fn byte_by_byte(log: &[AtomicU8], into: &DirtyBitmap) {
    for (index, byte) in log.iter().enumerate() {
        if byte.load(Ordering::Relaxed) == 0 {
            continue;
        }
        let bits = byte.swap(0, Ordering::Acquire);
        (0..8).filter(|bit| bits >> bit & 1 == 1).for_each(|bit| into.set(index * 8 + bit));
    }
}

fn terabyte(c: &mut Criterion) {
    let mut group = c.benchmark_group("log of a 1 TiB guest");
    group.sample_size(10);
    for (share, every) in [("0 %", 0), ("0.1 %", 1000), ("10 %", 10)] {
        let (log, bytes) = log(every);
        let into = DirtyBitmap::new(PAGES);
        group.bench_function(BenchmarkId::new("by words", share), |b| {
            b.iter_batched(
                || fill(log.file(), &bytes),
                |()| log.move_run(0, PAGES, black_box(&into), 0),
                BatchSize::PerIteration,
            );
        });
        group.bench_function(BenchmarkId::new("byte by byte", share), |b| {
            let atomics = || bytes.iter().map(|byte| (*byte).into()).collect::<Vec<_>>();
            b.iter_batched(
                atomics,
                |log| {
                    byte_by_byte(&log, black_box(&into));
                    log
                },
                BatchSize::PerIteration,
            );
        });
    }
    group.finish();
}

criterion_group!(benches, terabyte);
criterion_main!(benches);
