use std::sync::Arc;

use super::*;
use crate::testing::spawn;

const MS: Duration = Duration::from_millis(1);

fn rate(bytes_per_second: u64) -> Option<NonZeroU64> {
    NonZeroU64::new(bytes_per_second)
}

/// Lets one sender take packets back to back for `span` of virtual time; gives the bytes that it
/// got.
fn taken_in(line: &mut Line, now: &mut Instant, span: Duration, packet: usize) -> u64 {
    let (end, mut taken) = (*now + span, 0);
    loop {
        line.advance(*now);
        let place = line.reserve(packet);
        while let Some(wait) = line.wait(place) {
            *now += wait;
            line.advance(*now);
        }
        if *now >= end {
            return taken;
        }
        taken += packet as u64;
    }
}

#[test]
fn the_average_over_a_second_is_the_rate() {
    for bytes_per_second in [10_000_000, 125_000_000, 1_250_000_000, 25_000_000_007] {
        let mut now = Instant::now();
        let mut line = Line::new(rate(bytes_per_second), now);
        // An hour of idleness is worth no more than 20 ms.
        now += 3_600_000 * MS;
        for _ in 0..3 {
            let taken = taken_in(&mut line, &mut now, 1000 * MS, 64 << 10 /* bytes */);
            let error = taken.abs_diff(bytes_per_second);
            assert!(error <= bytes_per_second * 3 / 100, "{taken} of {bytes_per_second}");
        }
    }
}

#[test]
fn no_window_exceeds_the_rate_by_more_than_credit_and_a_packet() {
    let mut now = Instant::now();
    let mut line = Line::new(rate(1_000_000), now);
    now += 5000 * MS;
    let taken = taken_in(&mut line, &mut now, 100 * MS, 1000);
    assert!(taken <= 100_000 + 20_000 + 1000, "{taken}");
}

#[test]
fn a_packet_larger_than_a_second_goes_at_once_and_is_paid_after() {
    let now = Instant::now();
    let mut line = Line::new(rate(1000), now);
    let (large, next) = (line.reserve(3000), line.reserve(1));
    assert_eq!(line.wait(large), None);
    line.advance(now + 2999 * MS);
    assert_eq!(line.wait(next), Some(MS + Duration::from_nanos(1)));
    line.advance(now + 3000 * MS);
    assert_eq!(line.wait(next), None);
}

#[test]
fn fractions_of_a_byte_add_up() {
    let mut now = Instant::now();
    let mut line = Line::new(rate(3), now);
    line.reserve(3);
    let next = line.reserve(1);
    for _ in 0..1000 {
        assert!(line.wait(next).is_some());
        now += MS;
        line.advance(now);
    }
    now += MS;
    line.advance(now);
    assert_eq!(line.wait(next), None);
}

#[test]
fn a_new_rate_counts_for_those_who_wait() {
    let now = Instant::now();
    let mut line = Line::new(rate(1000), now);
    line.reserve(1000);
    let place = line.reserve(1);
    line.change_rate(rate(10_000), now + 500 * MS);
    assert_eq!(line.wait(place), Some(50 * MS + Duration::from_nanos(1)));
    line.change_rate(None, now + 501 * MS);
    assert_eq!(line.wait(place), None);
}

#[test]
fn credit_of_a_high_rate_is_not_spent_at_a_low_one() {
    let mut now = Instant::now();
    let mut line = Line::new(rate(10_000_000_000), now);
    now += 1000 * MS;
    line.advance(now);
    line.change_rate(rate(1000), now);
    line.reserve(20);
    let place = line.reserve(1);
    assert_eq!(line.wait(place), None);
    let place = line.reserve(1);
    assert!(line.wait(place).is_some());
}

#[test]
fn senders_share_the_real_rate_evenly() {
    // 60 packets of 10 kB at 2 MB/s are 300 ms, less one packet and at most 20 ms of credit.
    let pacer = Arc::new(Pacer::new(rate(2_000_000)));
    let begun = Instant::now();
    let senders: Vec<_> = (0..4)
        .map(|_| {
            let pacer = Arc::clone(&pacer);
            spawn("pacer-share", move || {
                (0..15).for_each(|_| pacer.take(10_000).unwrap());
                begun.elapsed()
            })
        })
        .collect();
    let ends: Vec<_> = senders.into_iter().map(|sender| sender.join()).collect();
    let last = *ends.iter().max().unwrap();
    assert!(last >= 270 * MS, "{ends:?}");
    // Upper bounds are for broken code only: the machine may be busy.
    assert!(last < 3000 * MS, "{ends:?}");
    assert!(*ends.iter().min().unwrap() >= 100 * MS, "one was served before the others: {ends:?}");
}

#[test]
fn no_rate_is_no_wait() {
    let pacer = Pacer::new(None);
    for _ in 0..1000 {
        pacer.take(usize::MAX >> 12).unwrap();
    }
    assert_eq!(pacer.rate(), None);
}

#[test]
fn a_new_rate_wakes_whoever_waits() {
    let pacer = Arc::new(Pacer::new(rate(1)));
    pacer.take(1 << 40).unwrap();
    let waiter = Arc::clone(&pacer);
    let waiting = spawn("pacer-rate", move || waiter.take(1));
    waiting.until_asleep();
    pacer.set_rate(rate(1 << 50));
    assert_eq!(waiting.join(), Ok(()));
    assert_eq!(pacer.rate(), rate(1 << 50));
}

#[test]
fn stop_wakes_whoever_waits_and_all_who_come_later() {
    let pacer = Arc::new(Pacer::new(rate(1)));
    pacer.take(1 << 40).unwrap();
    let waiter = Arc::clone(&pacer);
    let waiting = spawn("pacer-stop", move || waiter.take(1));
    waiting.until_asleep();
    pacer.stop();
    assert_eq!(waiting.join(), Err(Stopped));
    pacer.set_rate(None);
    assert_eq!(pacer.take(0), Err(Stopped));
}
