//! The matrix of releases: a guest under KVM comes in from each QEMU, and goes out to the same one
//! and to another, in every way that it knows. RAM is the same at each place, and the guest goes
//! on; or the QEMU says that it does not do this, in its own words.
//!
//! `./test` runs some cells, chosen by a seed; `./test interop-all` runs all and writes the tables
//! of docs/interop.md. `MULTIFD_INTEROP_CELLS` says how many of each test, `MULTIFD_INTEROP_SEED`
//! which, `MULTIFD_INTEROP_ONLY` what their names have in them.
//!
//! TCG is no judge of RAM: its dirty log loses pages by itself.
#![allow(clippy::indexing_slicing, reason = "test code may panic")]

mod cell;
mod refusals;
mod table;
mod way;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

use multifd_tests::{Failure, Outcome, Release, skip, skip::missing_kvm, skip::skipped};

use cell::Cell;
use table::Table;
use way::ways;

/// Cells at a time, when all of them run: most of a cell's time is waiting.
const WORKERS: usize = 3;

/// Cells of each test in a usual run.
const CELLS: usize = 12;

/// Which cells a test has.
#[derive(Clone, Copy)]
enum Pair {
    /// In from a release, and out to the same one: the ways at even places, or those at odd ones.
    Same { odd: bool },
    /// Out to a later one.
    Later,
    /// Out to an earlier one.
    Earlier,
}

fn cells(pair: Pair, releases: &[Release]) -> Vec<Cell> {
    let Some((newest, older)) = releases.split_last() else { return Vec::new() };
    let all = ways().into_iter().enumerate().flat_map(|(place, way)| {
        let pairs: Vec<_> = match pair {
            Pair::Same { odd } if odd == (place % 2 == 1) => releases.iter().map(|one| (one, one)).collect(),
            Pair::Same { .. } => Vec::new(),
            _ if !way.across => Vec::new(),
            Pair::Later => older.iter().map(|one| (one, newest)).collect(),
            Pair::Earlier => older.iter().map(|one| (newest, one)).collect(),
        };
        pairs.into_iter().map(move |(from, to)| {
            let (from, to) = (from.clone(), to.clone());
            Cell { from, to, way: way.clone() }
        })
    });
    all.collect()
}

/// So many of them, each release as often as another.
fn chosen(mut cells: Vec<Cell>, releases: &[Release], count: usize, mut seed: u64) -> Vec<Cell> {
    let mut chosen = Vec::new();
    for release in releases.iter().cycle().take(count) {
        // The multiplier of Knuth's MMIX; the high bits are the good ones.
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let of_it = |cell: &Cell| cell.from == *release || cell.to == *release;
        let places: Vec<_> = (0..cells.len()).filter(|place| of_it(&cells[*place])).collect();
        if let Some(place) = places.get(usize::try_from(seed >> 33).unwrap_or(0) % places.len().max(1)) {
            chosen.push(cells.swap_remove(*place));
        }
    }
    chosen
}

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

/// The releases that run here. Those that do not are named as skipped.
fn releases() -> Outcome<&'static [Release]> {
    let (found, missing) = Release::all();
    missing.iter().try_for_each(|why| skipped(why))?;
    Ok(found)
}

fn sample(pair: Pair) -> Outcome {
    if let Some(why) = missing_kvm() {
        skip!("{why}");
    }
    let releases = releases()?;
    let count = variable("MULTIFD_INTEROP_CELLS").map_or(Ok(CELLS), |count| count.parse())?;
    let seed = variable("MULTIFD_INTEROP_SEED").map_or(Ok(1), |seed| seed.parse())?;
    let mut table = Table::default();
    for cell in chosen(cells(pair, releases), releases, count, seed) {
        table.note(&cell, cell.run());
    }
    table.check()
}

#[test]
fn a_guest_comes_in_from_each_release_and_goes_out_to_it() -> Outcome {
    sample(Pair::Same { odd: false })
}

#[test]
fn a_guest_comes_in_from_each_release_and_goes_out_to_it_in_other_ways() -> Outcome {
    sample(Pair::Same { odd: true })
}

#[test]
fn a_guest_of_an_older_release_goes_on_in_the_newest() -> Outcome {
    sample(Pair::Later)
}

#[test]
fn a_guest_of_the_newest_release_goes_on_in_an_older_one() -> Outcome {
    sample(Pair::Earlier)
}

#[test]
#[ignore = "half an hour: ./test interop-all"]
fn all() -> Outcome {
    let only = variable("MULTIFD_INTEROP_ONLY");
    let releases = releases()?;
    let mut all = Vec::new();
    for pair in [Pair::Same { odd: false }, Pair::Same { odd: true }, Pair::Later, Pair::Earlier] {
        all.extend(cells(pair, releases));
    }
    all.retain(|cell| only.as_ref().is_none_or(|only| cell.to_string().contains(only)));
    let next = AtomicUsize::new(0);
    let table = Mutex::new(Table::default());
    let work = || {
        while let Some(cell) = all.get(next.fetch_add(1, Ordering::Relaxed)) {
            let fate = cell.run();
            table.lock().unwrap_or_else(PoisonError::into_inner).note(cell, fate);
        }
    };
    thread::scope(|scope| (0..WORKERS).for_each(|_| drop(scope.spawn(work))));
    let table = table.into_inner().unwrap_or_else(PoisonError::into_inner);
    if only.is_none() {
        table.write(releases)?;
    }
    table.check()
}

#[test]
fn a_sample_has_each_release_and_another_seed_other_cells() -> Outcome {
    let (releases, _) = Release::all();
    if releases.len() < 2 {
        return Err(Failure::new("fewer than two releases")).or_else(|failure| skipped(&failure.to_string()));
    }
    let all = cells(Pair::Same { odd: false }, releases);
    let names = |seed| {
        let chosen = chosen(all.clone(), releases, releases.len(), seed);
        assert!(releases.iter().all(|release| chosen.iter().any(|cell| cell.from == *release)));
        chosen.iter().map(Cell::to_string).collect::<Vec<_>>()
    };
    assert_eq!(names(1), names(1));
    assert_ne!(names(1), names(2));
    Ok(())
}
