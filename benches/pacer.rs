//! What the rate limit costs a packet when it does not hold it back.

use std::num::NonZeroU64;

use criterion::{Criterion, criterion_group, criterion_main};
use multifd_transports::Pacer;

fn overhead(c: &mut Criterion) {
    let mut group = c.benchmark_group("pacer");
    let unlimited = Pacer::new(None);
    group.bench_function("no limit", |b| b.iter(|| unlimited.take(1 << 19)));
    let never_reached = Pacer::new(NonZeroU64::new(1 << 62));
    group.bench_function("a limit that is never reached", |b| b.iter(|| never_reached.take(1 << 19)));
    group.finish();
}

criterion_group!(benches, overhead);
criterion_main!(benches);
