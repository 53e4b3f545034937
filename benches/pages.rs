//! What is done to pages: zero scan, xbzrle, codecs.

use std::hint::black_box;

use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use multifd_benches::content::{PAGE, pages};
use multifd_codecs::{parse_codec, xbzrle, zero};

/// Pages in a packet.
const BATCH: usize = 128;

fn zero_scan(c: &mut Criterion) {
    let mut group = c.benchmark_group("zero scan");
    // 16 MiB: out of the caches, as guest memory is.
    let (zeros, text) = (pages("zero", 4096), pages("text", 4096));
    group.throughput(Throughput::Bytes(zeros.len() as u64)).sample_size(20);
    for (kind, memory) in [("zero", &zeros), ("text", &text)] {
        group.bench_function(kind, |b| {
            b.iter(|| memory.chunks_exact(PAGE).filter(|page| zero::is_zero(black_box(page))).count());
        });
    }
    group.finish();
}

fn differences(c: &mut Criterion) {
    let old = pages("heap", 1);
    let mut group = c.benchmark_group("xbzrle");
    group.throughput(Throughput::Bytes(PAGE as u64));
    for changed in [0, 64, 512, 2048] {
        let mut new = old.clone();
        new.iter_mut().step_by(PAGE / changed.max(1)).take(changed).for_each(|byte| *byte = !*byte);
        let mut out = [0; PAGE];
        group.bench_function(BenchmarkId::new("encode", changed), |b| {
            b.iter(|| xbzrle::encode(black_box(&old), black_box(&new), &mut out));
        });
        if let xbzrle::Outcome::Delta(len) = xbzrle::encode(&old, &new, &mut out) {
            let mut page = old.clone();
            group.bench_function(BenchmarkId::new("decode", changed), |b| {
                b.iter(|| xbzrle::decode(black_box(&out[..len]), &mut page));
            });
        }
    }
    group.finish();
}

/// Batches that follow each other in a stream: together more than any codec's window at these
/// levels, so that none is found in the history of the stream.
const BATCHES: usize = 32;

fn codecs(c: &mut Criterion) {
    for name in ["none", "zlib:1", "zstd:1", "zstd:3"] {
        let mut group = c.benchmark_group(name);
        group.throughput(Throughput::Bytes((BATCH * PAGE) as u64)).sample_size(20);
        for kind in ["text", "heap", "random"] {
            let memory = pages(kind, BATCH * BATCHES);
            let mut batches = memory.chunks_exact(BATCH * PAGE).cycle();
            let codec = parse_codec(name).expect("a codec of ours");
            let (mut encoder, mut out) = (codec.encoder().expect("an encoder"), Vec::new());
            group.bench_function(BenchmarkId::new("encode", kind), |b| {
                b.iter(|| {
                    out.clear();
                    encoder.prepare(black_box(batches.next().expect("endless")), &mut out)
                });
            });
            // The decoder follows an encoder's stream from its first packet on.
            let (mut encoder, mut decoder) =
                (codec.encoder().expect("an encoder"), codec.decoder().expect("a decoder"));
            let mut batches = memory.chunks_exact(BATCH * PAGE).cycle();
            let mut decoded = vec![0; BATCH * PAGE];
            group.bench_function(BenchmarkId::new("decode", kind), |b| {
                b.iter_batched(
                    || {
                        let mut payload = Vec::new();
                        encoder.prepare(batches.next().expect("endless"), &mut payload).map(|()| payload)
                    },
                    |payload| decoder.recv_pages(&payload.expect("encodes"), &mut decoded),
                    BatchSize::PerIteration,
                );
            });
        }
        group.finish();
    }
}

criterion_group!(benches, zero_scan, differences, codecs);
criterion_main!(benches);
