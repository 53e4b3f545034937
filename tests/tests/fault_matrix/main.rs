//! The fault matrix: each kind of fault, before each message of a small migration, at either end,
//! over each way of moving. Always: the guest runs at the source or at the destination, never at
//! both, never nowhere; a failure has a reason; memory is bounded; nothing is left behind.
//!
//! Each test runs some cells of one way, chosen by a seed; `./test fault-matrix-all` runs all
//! (hours), and prints the table. `MULTIFD_FAULT_CELLS` says how many of each way, `all` or a
//! number, `MULTIFD_FAULT_SEED` which; `MULTIFD_FAULT_CELL` is one alone, by the name that its
//! failure has.
//!
//! ```text
//!  multifd send, QEMU ──> Relay: knows messages, does harm before one ──> multifd receive, QEMU
//!                              └────── or to a process, a disk, the descriptors
//! ```
#![allow(clippy::indexing_slicing, reason = "test code may panic")]

mod cell;
mod ends;
mod guests;
mod relay;
mod trial;

use std::collections::BTreeMap;

use multifd_tests::{Failure, Outcome, Scratch, skip_without_qemu};

use cell::{Cell, End, Fate, Kind, Link, Place};
use guests::{Guests, PAGES};
use trial::{Trial, may_mount, recorded, run, run_file};

/// Cells of each way in a usual run.
const CELLS: usize = 14;

/// The same with a QEMU, which starts anew for each.
const CELLS_WITH_QEMU: usize = 4;

/// Of a lane with more messages, so many are chosen, evenly: a guest of QEMU has thousands.
const MOST_MESSAGES: usize = 120;

/// Descriptors of a process: too few to begin, too few to go on, enough.
const DESCRIPTORS: std::ops::Range<usize> = 4..26;

/// All places at which a kind can happen to an end.
fn places(link: Link, kind: Kind, hurt: End, messages: &BTreeMap<(End, u8), usize>) -> Vec<Place> {
    let all = |end, lane, count: usize| {
        let step = count.div_ceil(MOST_MESSAGES).max(1);
        (0..count).step_by(step).map(move |message| Place { end, lane, message })
    };
    match kind {
        Kind::DiskFull => all(hurt, 0, PAGES + 4).collect(),
        Kind::NoDescriptors => DESCRIPTORS.map(|message| Place { end: hurt, lane: 0, message }).collect(),
        kind => {
            // What happens to a process happens at any message of the source.
            let of = |end: End| if kind.is_of_a_process() { end == End::Source } else { end == hurt };
            let lanes = messages.iter().filter(|((end, lane), _)| {
                // A lane alone cannot be out of order.
                of(*end) && (kind != Kind::Reorder || link.channels().is_some() || *lane > 0)
            });
            lanes.flat_map(|((end, lane), count)| all(*end, *lane, *count)).collect()
        }
    }
}

fn cells(link: Link, messages: &BTreeMap<(End, u8), usize>) -> Vec<Cell> {
    let mut cells = Vec::new();
    for kind in Kind::ALL {
        for hurt in [End::Source, End::Destination].into_iter().filter(|hurt| link.has(kind, *hurt)) {
            let places = places(link, kind, hurt, messages).into_iter();
            cells.extend(places.map(|place| Cell { link, kind, hurt, place }));
        }
    }
    cells
}

/// So many of them: of each kind the same number, as far as that goes.
fn chosen(mut cells: Vec<Cell>, count: Option<usize>, mut seed: u64) -> Vec<Cell> {
    let Some(count) = count else { return cells };
    let mut chosen = Vec::new();
    for kind in Kind::ALL.into_iter().cycle().take(count.saturating_mul(2)) {
        // The multiplier of Knuth's MMIX; the high bits are the good ones.
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let of_kind: Vec<_> = (0..cells.len()).filter(|cell| cells[*cell].kind == kind).collect();
        if let Some(at) = of_kind.get(usize::try_from(seed >> 33).unwrap_or(0) % of_kind.len().max(1))
            && chosen.len() < count
        {
            chosen.push(cells.swap_remove(*at));
        }
    }
    chosen
}

/// Fates by kind, for the table.
#[derive(Default)]
struct Table {
    fates: BTreeMap<(Kind, Fate), usize>,
    peak: u64,
    wrong: Vec<String>,
}

impl Table {
    fn note(&mut self, cell: Cell, trial: Outcome<Trial>) {
        match trial {
            Ok(trial) => {
                *self.fates.entry((cell.kind, trial.fate)).or_default() += 1;
                self.peak = self.peak.max(trial.peak);
            }
            Err(failure) => self.wrong.push(format!("{cell}: {failure}")),
        }
    }

    fn print(&self, link: Link) {
        println!("{link:?}: peak of a command {} MiB", self.peak >> 20);
        for ((kind, fate), count) in &self.fates {
            println!("{link:?} | {kind:?} | {fate:?} | {count}");
        }
    }

    fn check(self) -> Outcome {
        match self.wrong.is_empty() {
            true => Ok(()),
            false => Err(Failure::new(self.wrong.join("\n"))),
        }
    }
}

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

fn matrix(link: Link) -> Outcome {
    let mut guests = Guests::new()?;
    if link == Link::ToQemu {
        guests.receive_from_qemu()?;
    }
    let scratch = Scratch::new()?;
    let recorded = if link == Link::File { recorded(&guests, &scratch)? } else { Vec::new() };
    let go = |cell| match link {
        Link::File => run_file(&guests, &recorded, cell),
        _ => run(&guests, link, cell),
    };
    let without = go(None)?;
    let messages = match link {
        Link::File => BTreeMap::from([((End::Source, 0), recorded.len())]),
        _ => without.seen.messages,
    };
    let mounts = may_mount();
    let mut all = cells(link, &messages);
    all.retain(|cell| cell.kind != Kind::DiskFull || mounts);
    // A QEMU runs a guest whose description is cut, and says that it failed
    // (docs/reliability.md).
    let behind_eof = |cell: &Cell| {
        let is_main = cell.place.end == End::Source && cell.place.lane == 0;
        is_main && without.seen.behind_eof.is_some_and(|first| cell.place.message >= first)
    };
    all.retain(|cell| link != Link::ToQemu || cell.kind != Kind::HalfClose || !behind_eof(cell));
    let count = match variable("MULTIFD_FAULT_CELLS").as_deref() {
        Some("all") => None,
        Some(number) => Some(number.parse()?),
        None if link.has_qemu() => Some(CELLS_WITH_QEMU),
        None => Some(CELLS),
    };
    let seed = variable("MULTIFD_FAULT_SEED").map_or(Ok(1), |seed| seed.parse())?;
    let cells = match variable("MULTIFD_FAULT_CELL") {
        Some(name) => all.into_iter().filter(|cell| cell.to_string() == name).collect(),
        None => chosen(all, count, seed),
    };
    let mut table = Table::default();
    for cell in cells {
        table.note(cell, go(Some(cell)));
    }
    table.print(link);
    table.check()
}

#[test]
fn over_one_connection() -> Outcome {
    matrix(Link::Single)
}

#[test]
fn over_channels() -> Outcome {
    matrix(Link::Channels)
}

#[test]
fn over_channels_with_zstd() -> Outcome {
    matrix(Link::Zstd)
}

#[test]
fn over_tls() -> Outcome {
    matrix(Link::Tls)
}

#[test]
fn over_a_command() -> Outcome {
    matrix(Link::Exec)
}

#[test]
fn from_a_file() -> Outcome {
    matrix(Link::File)
}

#[test]
fn from_qemu() -> Outcome {
    skip_without_qemu!();
    matrix(Link::FromQemu)
}

#[test]
fn to_qemu() -> Outcome {
    skip_without_qemu!();
    matrix(Link::ToQemu)
}

/// All cells of one kind at one end.
fn every(link: Link, kind: Kind, hurt: End) -> Outcome {
    let guests = Guests::new()?;
    let scratch = Scratch::new()?;
    let recorded = if link == Link::File { recorded(&guests, &scratch)? } else { Vec::new() };
    let mut table = Table::default();
    for place in places(link, kind, hurt, &BTreeMap::new()) {
        let cell = Cell { link, kind, hurt, place };
        let trial = match link {
            Link::File => run_file(&guests, &recorded, Some(cell)),
            _ => run(&guests, link, Some(cell)),
        };
        table.note(cell, trial);
    }
    table.check()
}

#[test]
fn a_receiver_with_any_number_of_descriptors_leaves_nothing() -> Outcome {
    every(Link::File, Kind::NoDescriptors, End::Destination)
}

#[test]
fn every_kind_is_in_the_matrix_and_a_sample_has_each() {
    let messages = BTreeMap::from([
        ((End::Source, 0), 40),
        ((End::Source, 1), 9),
        ((End::Source, 2), 9),
        ((End::Destination, 0), 5),
    ]);
    let all = cells(Link::Channels, &messages);
    assert!(all.len() > 700, "{}", all.len());
    let sample = chosen(all.clone(), Some(CELLS), 1);
    assert_eq!(sample.len(), CELLS);
    assert!(Kind::ALL.iter().all(|kind| sample.iter().any(|cell| cell.kind == *kind)));
    assert_ne!(sample, chosen(all.clone(), Some(CELLS), 2));
    assert_eq!(chosen(all.clone(), None, 1).len(), all.len());
}
