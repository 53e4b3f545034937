//! One move of a guest, with the attempts that fail before it.

use std::fmt;
use std::thread::{self, ScopedJoinHandle};
use std::time::Duration;

use multifd_codecs::parse_codec;
use multifd_engine::{
    Arrived, Canceller, Configuration, Control, Destination, DeviceState, Endpoint, Error, PAGE, Precopy,
    RamBlock, Report, Source,
};

use crate::Result;
use crate::guest::{Guest, elsewhere};
use crate::random::Random;

const STATE: &str = "soak";
const TIMEOUT: Duration = Duration::from_secs(60);

/// What becomes of an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Arrives,
    /// The source cancels between two rounds, or in the middle of one.
    CancelledHere,
    CancelledThere,
    /// The source drops the migration when all of RAM is over.
    DroppedHere,
    /// The destination refuses the guest after the hand-over.
    Refused,
}

/// What was done so far.
#[derive(Default)]
pub(crate) struct Tally {
    pub(crate) moves: u64,
    failed: u64,
    rounds: u64,
    pages: u64,
    wire_bytes: u64,
    longest_downtime: Duration,
}

/// Moves the guest to another host, where it runs when this returns.
pub(crate) fn hop<G: Guest>(mut guest: G, random: &mut Random, tally: &mut Tally) -> Result<G> {
    loop {
        let fate = match random.below(8) {
            0 => Fate::CancelledHere,
            1 => Fate::CancelledThere,
            2 => Fate::DroppedHere,
            3 => Fate::Refused,
            _ => Fate::Arrives,
        };
        let there = elsewhere(&guest.blocks())?;
        let result = attempt(&mut guest, &there, fate, random)?;
        match result {
            (Ok(report), Some(state)) => {
                tally.count(&report, equal(&guest.blocks(), &there, tally.moves)?);
                let mut arrived = guest.arrive(&there, &state)?;
                arrived.run()?;
                arrived.wait_for_writes()?;
                return Ok(arrived);
            }
            (Err(error), None) if fate != Fate::Arrives && may_resume(error.as_ref()) => {
                tally.failed += 1;
                guest.run()?;
                guest.wait_for_writes()?;
            }
            (Err(error), _) => {
                let error = error.map_or_else(|| "dropped".to_owned(), |error| error.to_string());
                return Err(format!("move {}, {fate:?}: {error}", tally.moves).into());
            }
            (Ok(_), None) => {
                return Err(format!("move {}, {fate:?}: only the source succeeded", tally.moves).into());
            }
        }
    }
}

fn may_resume(error: Option<&Error>) -> bool {
    error.is_none_or(Error::source_may_resume)
}

type Ended = (Result<Report, Failed>, Option<Vec<u8>>);

/// Gives the source's result and the state that the destination has accepted. The guest is paused.
fn attempt<G: Guest>(guest: &mut G, there: &[RamBlock], fate: Fate, random: &mut Random) -> Result<Ended> {
    let destination = Destination::builder(there.to_vec()).timeout(TIMEOUT);
    let destination = destination.listen(&"tcp:127.0.0.1:0".parse()?)?;
    let (to, canceller) = (destination.endpoint(), destination.canceller());
    let source = source(guest, random)?;
    let control = source.control();
    thread::scope(|scope| {
        let receiving = thread::Builder::new().spawn_scoped(scope, move || receive(destination, fate))?;
        let result = send(guest, source, &to, fate, random, &control, &canceller);
        // Without a source it would wait for one.
        canceller.cancel();
        let state = join(receiving)?;
        Ok((result?, state))
    })
}

fn join(receiving: ScopedJoinHandle<'_, Option<Vec<u8>>>) -> Result<Option<Vec<u8>>> {
    Ok(receiving.join().map_err(|_| "the destination panicked")?)
}

fn receive(destination: Destination, fate: Fate) -> Option<Vec<u8>> {
    let arrived = destination.receive().ok()?;
    if fate == Fate::Refused {
        arrived.refuse("as the seed has it");
        return None;
    }
    let state = arrived.opaque_state(STATE).map(|(_, state)| state.to_vec());
    Arrived::accept(arrived).ok().and(state)
}

fn source<G: Guest>(guest: &mut G, random: &mut Random) -> Result<Source> {
    let channels = random.below(4);
    let codec = match random.below(3) {
        _ if channels == 0 => "none",
        0 => "none",
        1 => "zlib:1",
        _ => "zstd:1",
    };
    // Machines of old have their sync points elsewhere.
    let machine = if random.one_in(4) { "pc-q35-8.0" } else { "soak" };
    let mut builder = Source::builder(guest.blocks(), Configuration::new(machine))
        .channels(channels)
        .codec(parse_codec(codec)?)
        .timeout(TIMEOUT);
    if random.one_in(2) {
        builder = builder.xbzrle(4 << 20);
    }
    Ok(guest.log_into(builder, random)?.build()?)
}

/// Why an attempt failed; `None`: the soak has dropped it.
type Failed = Option<Error>;

/// The outer error is the soak's, the inner one the migration's.
fn send<G: Guest>(
    guest: &mut G,
    source: Source,
    to: &Endpoint,
    fate: Fate,
    random: &mut Random,
    control: &Control,
    there: &Canceller,
) -> Result<Result<Report, Failed>> {
    let (rounds, in_the_middle) = (1 + random.below(5), random.one_in(2));
    let result = source.connect(to).and_then(|mut precopy| {
        for round in 0..rounds {
            let last = round + 1 == rounds;
            match fate {
                Fate::CancelledHere if last => cancel(control.clone(), in_the_middle, &mut precopy)?,
                Fate::CancelledThere if last => _ = there.cancel(),
                _ => {}
            }
            precopy.round()?;
        }
        Ok(precopy)
    });
    guest.pause()?;
    let precopy = match result {
        Ok(precopy) => precopy,
        Err(error) => return Ok(Err(Some(error))),
    };
    let stopped = match precopy.stop_copy() {
        Ok(stopped) => stopped,
        Err(error) => return Ok(Err(Some(error))),
    };
    if fate == Fate::DroppedHere {
        drop(stopped);
        return Ok(Err(None));
    }
    Ok(stopped.commit(&DeviceState::opaque(STATE, 1, &guest.state()?)).map_err(Some))
}

/// Between two rounds, or at some moment of one.
fn cancel(control: Control, in_the_middle: bool, precopy: &mut Precopy) -> Result<(), Error> {
    if !in_the_middle {
        control.cancel();
        return Ok(());
    }
    thread::scope(|scope| {
        scope.spawn(move || {
            thread::yield_now();
            control.cancel();
        });
        precopy.round().map(drop)
    })
}

/// Compares all pages; how many there are.
fn equal(here: &[RamBlock], there: &[RamBlock], number: u64) -> Result<u64> {
    let (mut a, mut b) = (Box::new([0; PAGE]), Box::new([1; PAGE]));
    let mut pages = 0;
    for (left, right) in here.iter().zip(there) {
        for page in 0..left.pages() {
            if !left.read_page(page, &mut a[..]) || !right.read_page(page, &mut b[..]) || a != b {
                return Err(format!("move {number}: page {page} of {} differs", left.name()).into());
            }
            pages += 1;
        }
    }
    Ok(pages)
}

impl Tally {
    fn count(&mut self, report: &Report, pages: u64) {
        self.moves += 1;
        self.rounds += report.progress.rounds;
        self.pages += pages;
        self.wire_bytes += report.progress.wire_bytes;
        self.longest_downtime = self.longest_downtime.max(report.downtime);
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} moves in {} rounds, {} failed attempts, {} pages compared, {} MiB on the wire, longest downtime {:.1?}",
            self.moves,
            self.rounds,
            self.failed,
            self.pages,
            self.wire_bytes >> 20,
            self.longest_downtime
        )
    }
}
