//! Collecting and claiming dirty pages, per million pages, and for a clean guest of 1 TiB.

use std::hint::black_box;
use std::sync::Arc;
use std::time::Instant;

use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use multifd_engine::DirtyBitmap;
use multifd_engine::unstable::{Claim, Next, PerBlock, Place, Requested, Round, UrgentPages, WantedPage};

const MILLION: usize = 1 << 20;

/// A bitmap with one page in `every` set; 0: none.
fn dirty(pages: usize, every: usize) -> DirtyBitmap {
    let bitmap = DirtyBitmap::new(pages);
    match every {
        0 => {}
        1 => bitmap.set_range(0, pages),
        _ => (0..pages).step_by(every).for_each(|page| bitmap.set(page)),
    }
    bitmap
}

/// The blocks of a guest that has one.
fn only(bitmap: DirtyBitmap) -> PerBlock<Arc<DirtyBitmap>> {
    [Arc::new(bitmap)].into_iter().collect()
}

fn walk(bitmaps: &PerBlock<Arc<DirtyBitmap>>) -> usize {
    let round = Round::new(bitmaps, 1);
    let (mut claim, mut pages) = (Claim::default(), 0);
    while let Some(batch) = round.claim(&mut claim, 128) {
        pages += black_box(batch).pages.len();
    }
    pages
}

fn walk_next(bitmaps: &PerBlock<Arc<DirtyBitmap>>, urgent: &UrgentPages) -> usize {
    let round = Round::new(bitmaps, 1);
    let next = Next::new(&round, Some(urgent));
    let (mut place, mut pages) = (Place::default(), 0);
    while let Some(batch) = next.claim(&mut place, 128) {
        pages += black_box(batch).pages.len();
    }
    pages
}

fn sync_and_claim(c: &mut Criterion) {
    for (share, every) in [("0 %", 0), ("1 %", 100), ("10 %", 10), ("100 %", 1)] {
        let mut group = c.benchmark_group("per million pages");
        group.throughput(Throughput::Elements(MILLION as u64)).sample_size(20);
        group.bench_function(BenchmarkId::new("sync", share), |b| {
            let into = DirtyBitmap::new(MILLION);
            b.iter_batched_ref(|| dirty(MILLION, every), |log| log.move_to(&into), BatchSize::LargeInput);
        });
        group.bench_function(BenchmarkId::new("claim", share), |b| {
            b.iter_batched(|| only(dirty(MILLION, every)), |bitmaps| walk(&bitmaps), BatchSize::LargeInput);
        });
        group.finish();
    }
}

/// What workers pay for looking at the queue of wanted pages before each batch: nothing is wanted,
/// and every hundredth page is.
fn urgent(c: &mut Criterion) {
    let mut group = c.benchmark_group("per million pages");
    group.throughput(Throughput::Elements(MILLION as u64)).sample_size(20);
    for (share, every) in [("0 %", 0), ("1 %", 100)] {
        group.bench_function(BenchmarkId::new("claim, wanted", share), |b| {
            let prepare = || {
                let bitmaps = only(dirty(MILLION, 1));
                let urgent = UrgentPages::new(MILLION / 100 + 1, &bitmaps);
                let block = bitmaps.find(|_| true).unwrap();
                // From the end on, so that the cursor has not been there.
                let wanted = (0..MILLION).rev().step_by(every.max(1)).filter(|_| every > 0);
                for page in wanted {
                    assert_eq!(urgent.request(WantedPage { block, page }), Requested::Queued);
                }
                (bitmaps, urgent)
            };
            b.iter_batched(prepare, |(bitmaps, urgent)| walk_next(&bitmaps, &urgent), BatchSize::LargeInput);
        });
    }
    group.finish();
}

/// A clean guest of 1 TiB: 268 million pages, 32 MiB of bitmap. Printed, as one number is what
/// people ask for.
fn terabyte(c: &mut Criterion) {
    let pages = 256 * MILLION;
    let (log, bitmaps) = (DirtyBitmap::new(pages), only(DirtyBitmap::new(pages)));
    let once = || {
        let begun = Instant::now();
        bitmaps.iter().for_each(|bitmap| log.move_to(bitmap));
        let synced = begun.elapsed();
        assert_eq!(walk(&bitmaps), 0);
        (synced, begun.elapsed() - synced)
    };
    let mut runs: Vec<_> = (0..9).map(|_| once()).collect();
    runs.sort_unstable();
    let (synced, walked) = runs[4];
    println!(
        "clean 1 TiB guest, {pages} pages: synced in {synced:.2?}, walked in {walked:.2?} (median of 9)"
    );
    c.bench_function("clean 1 TiB guest, sync and walk", |b| b.iter(once));
}

criterion_group!(benches, sync_and_claim, urgent, terabyte);
criterion_main!(benches);
