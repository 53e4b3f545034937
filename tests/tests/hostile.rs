//! A hostile source over real sockets: streams that are sound but for one lie, on one connection
//! and on many. Each is refused or arrives; nothing panics, hangs or takes memory.
//!
//! `MULTIFD_HOSTILE_STREAMS=100000` tries that many of each way, from `MULTIFD_HOSTILE_SEED` on.

#![allow(clippy::indexing_slicing, clippy::unwrap_used, reason = "test code may panic")]

use std::sync::{Mutex, PoisonError};

use multifd_engine::Destination;
use multifd_tests::peer::command::ReceiveTrial;
use multifd_tests::peer::{
    Codec, Memory, PAGE, Recorder, Recording, Style, SyncPackets, SyncPoints, TIMEOUT, Trial,
};
use multifd_tests::{During, Failure, Outcome, Receive, Scratch, ZeroPages};

/// Streams of each way, and of each way to the command.
const STREAMS: u64 = 200;
const OF_A_COMMAND: u64 = 12;

/// Most memory of a receiver beyond the pages of its guest that were touched.
const OVERHEAD: u64 = 64 << 20;

fn number(variable: &str, default: u64) -> Outcome<u64> {
    std::env::var(variable).map_or(Ok(default), |number| Ok(number.parse()?))
}

fn seeds(default: u64) -> Outcome<std::ops::Range<u64>> {
    let first = number("MULTIFD_HOSTILE_SEED", 0)?;
    Ok(first..first + number("MULTIFD_HOSTILE_STREAMS", default)?)
}

fn memory() -> Memory {
    let mut memory = Memory::zero(&[("pc.ram", 30), ("pc.bios", 4)]);
    memory.refill(&memory.all(), 11);
    memory
}

/// Ways that take turns.
fn style(channels: u8, seed: u64) -> Style {
    let turn = usize::try_from(seed % 8).unwrap();
    Style {
        codec: if channels == 0 { Codec::None } else { Codec::ALL[turn] },
        packet_pages: 1 + turn,
        sync: if seed.is_multiple_of(3) { SyncPoints::PerSection } else { SyncPoints::PerRound },
        sync_packets: [SyncPackets::Clean, SyncPackets::Stale, SyncPackets::WithPages][turn % 3],
        zero_pages: if seed.is_multiple_of(2) { ZeroPages::Legacy } else { ZeroPages::Multifd },
        xbzrle: channels == 0 && seed.is_multiple_of(2),
        return_path: !seed.is_multiple_of(5),
        machine: if seed.is_multiple_of(3) { "pc-q35-7.2" } else { "pc-q35-10.0" },
        ..Style::multifd(channels)
    }
}

fn lying(channels: u8, seed: u64) -> (Recording, String) {
    Recorder::migration(style(channels, seed), &mut memory()).with_a_lie(seed)
}

/// Most memory that this process has had so far.
fn peak() -> Outcome<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.ok_or_else(|| Failure::new("no VmHWM"))?.trim().trim_end_matches(" kB");
    Ok(kib.parse::<u64>()? << 10)
}

/// One way at a time has the memory of the process.
static ALONE: Mutex<()> = Mutex::new(());

/// Refuses or accepts each, within the memory of a guest and what is allowed beyond; gives how many
/// were refused.
fn survives(channels: u8) -> Outcome<u64> {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let trial = Trial::unix()?;
    let mut refused = 0;
    let (touched, before) = (u64::try_from(memory().all().len() * PAGE)?, peak()?);
    for seed in seeds(STREAMS)? {
        let (recording, done) = lying(channels, seed);
        let destination = Destination::builder(memory().provide(0x5a)?).timeout(TIMEOUT);
        let verdict = trial.run(&recording, destination, |arrived| arrived.accept()).during(done)?;
        refused += u64::from(verdict.result.is_err());
    }
    let more = peak()? - before;
    println!("{channels} channels: {refused} refused, {} MiB more memory", more >> 20);
    if more > touched + OVERHEAD {
        return Err(Failure::new(format!("{more} bytes of memory, expected at most {}", touched + OVERHEAD)));
    }
    Ok(refused)
}

#[test]
fn one_lie_on_one_connection_is_refused_or_harmless() -> Outcome {
    // Some lies are none: a page that comes twice, a bit of a page.
    assert!(survives(0)? > 0);
    Ok(())
}

#[test]
fn one_lie_on_three_channels_is_refused_or_harmless() -> Outcome {
    assert!(survives(3)? > 0);
    Ok(())
}

#[test]
fn one_lie_on_sixteen_channels_is_refused_or_harmless() -> Outcome {
    assert!(survives(16)? > 0);
    Ok(())
}

#[test]
fn the_command_takes_no_memory_under_any_lie_and_leaves_nothing() -> Outcome {
    let touched = u64::try_from(memory().all().len() * PAGE)?;
    let mut peak = 0;
    for seed in seeds(OF_A_COMMAND)? {
        for channels in [0, 3, 16] {
            let (recording, done) = lying(channels, seed);
            let mut receive = ReceiveTrial::start(&["--timeout", "300ms"])?;
            let (ended, _) = receive.play(&recording, |_| Ok(())).during(&done)?;
            let left = receive.left()?;
            let sound = match ended.code {
                0 => left == ["checkpoint"],
                1 => left.is_empty(),
                // Told of success, and the source was gone.
                3 => true,
                _ => false,
            };
            peak = peak.max(ended.usage.peak_resident_bytes);
            let bounded = ended.usage.peak_resident_bytes <= touched + OVERHEAD;
            if !sound || !bounded || ended.stderr.contains("panicked") {
                return Err(Failure::new(format!("{done}: {left:?} {ended:?}")));
            }
        }
    }
    println!("peak of the command: {} MiB", peak >> 20);
    Ok(())
}

#[test]
fn the_command_is_restricted_while_it_listens_unless_it_is_told_not_to_be() -> Outcome {
    let scratch = Scratch::new()?;
    for (flags, restricted) in [(&[][..], true), (&["--no-sandbox"], false)] {
        let mut receive = Receive::listen_with(&scratch.unix_uri("socket"), &scratch.path("out"), flags)?;
        let status = std::fs::read_to_string(format!("/proc/{}/status", receive.process().id()))?;
        // A mode of 2 is a filter.
        for (key, value) in [("NoNewPrivs", "1"), ("Seccomp", "2")] {
            let line = status.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
            assert_eq!(line.map(str::trim) == Some(value), restricted, "{flags:?}: {key} is {line:?}");
        }
    }
    Ok(())
}
