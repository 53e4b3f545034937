//! One cell: the migration, the fault, and what must hold afterwards.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use multifd_tests::peer::command::names;
use multifd_tests::peer::{Messages, Stage};
use multifd_tests::{CheckpointFiles, Failure, Multifd, Outcome, Scratch, Settings, ram};
use serde_json::Value;

use crate::cell::{Cell, End, Fate, Kind, Link};
use crate::ends::{Running, SourceSays, Words, destination, destination_has, is_killed, source, source_says};
use crate::guests::{Guests, PAGES};
use crate::relay::{Relay, Seen};

/// Most memory of a command: the guest's, and this.
const MOST: u64 = (PAGES as u64 * 4096) + (64 << 20);

/// How long a process may be there after the command that started it.
const CHILDREN: Duration = Duration::from_secs(20);

/// What was seen in a cell.
#[derive(Debug)]
pub(crate) struct Trial {
    pub(crate) fate: Fate,
    pub(crate) seen: Seen,
    pub(crate) peak: u64,
}

/// Runs a cell, or a migration without a fault.
pub(crate) fn run(guests: &Guests, link: Link, cell: Option<Cell>) -> Outcome<Trial> {
    let room = Room::new(cell)?;
    let kind = cell.map(|cell| cell.kind);
    let fault = cell.filter(|cell| !cell.kind.is_of_the_machine()).map(|cell| (cell.kind, cell.place));
    let (mut there, uri) = match destination(guests, link, cell, &room.out(), "")? {
        Ok(started) => started,
        // Without a descriptor, for example. No source has begun.
        Err(failure) => {
            room.check_empty(false)?;
            let said = failure.to_string();
            return match kind == Some(Kind::NoDescriptors) && !said.contains("panicked") {
                true => Ok(Trial { fate: Fate::Source, seen: Seen::default(), peak: 0 }),
                false => Err(failure),
            };
        }
    };
    let relay = Relay::to(&uri, fault, link.is_encrypted())?;
    let mut here = source(guests, link, cell, relay.uri())?;
    if let Some(cell) = cell.filter(|cell| cell.kind.is_of_a_process()) {
        let hurt = if cell.hurt == End::Source { &mut here } else { &mut there };
        relay.act(hurt.act(cell.kind)?);
    }
    let (source, destination, seen) = both_end(guests, link, cell, relay, &mut here, &mut there, &room)?;
    if let (Running::Qemu(qemu), SourceSays::Gone, true) = (&here, &source.0, destination.0)
        && !kind.is_some_and(Kind::alters)
    {
        ram::check_equal(qemu.ram(), &CheckpointFiles::open(&room.out())?.block("pc.ram")?)?;
    }
    drop((here, there));
    let sent_all = seen.stage >= Stage::RamSent || link.is_encrypted() || kind == Some(Kind::Reset);
    let fate = fate(link, &source.0, destination.0, sent_all)
        .map_err(|failure| Failure::new(format!("{failure}: {source:?} {destination:?} {seen:?}")))?;
    room.check(cell, destination.0)?;
    room.check_children(&uri)?;
    let mut peak = 0;
    for (end, words) in [(End::Source, &source.1), (End::Destination, &destination.1)] {
        let Some(words) = words else { continue };
        check_words(words, is_killed(cell, end))?;
        peak = peak.max(words.peak);
    }
    let arrived = matches!(fate, Fate::Destination | Fate::DestinationUnknown);
    let must_arrive = kind.is_none_or(Kind::is_harmless);
    if must_arrive && !arrived {
        return Err(Failure::new(format!(
            "{fate:?}, but nothing was in the way: {source:?} {destination:?}"
        )));
    }
    Ok(Trial { fate, seen, peak })
}

type SourceEnd = (SourceSays, Option<Words>);
type DestinationEnd = (bool, Option<Words>);

/// Waits for the ends in an order in which each can end: one that was stopped is the last.
fn both_end(
    guests: &Guests,
    link: Link,
    cell: Option<Cell>,
    relay: Relay,
    here: &mut Running,
    there: &mut Running,
    room: &Room,
) -> Outcome<(SourceEnd, DestinationEnd, Seen)> {
    let stopped = cell.filter(|cell| cell.kind == Kind::Stop).map(|cell| cell.hurt);
    // A QEMU has no timeout: it sees that ours has ended.
    let qemu_waits = link.has_qemu() && cell.is_some_and(|cell| cell.kind == Kind::Stall);
    let mut relay = Some(relay);
    let mut seen = None;
    let source_first = match (stopped, link) {
        (Some(stopped), _) => stopped == End::Destination,
        (None, link) => link != Link::FromQemu,
    };
    let mut between = |hurt: &mut Running| -> Outcome {
        if stopped.is_some() {
            // The other end may have ended before the message came this far.
            relay.iter().for_each(Relay::disarm);
            hurt.go_on()?;
        }
        if qemu_waits {
            seen = relay.take().map(Relay::end);
        }
        Ok(())
    };
    let (source, destination) = if source_first {
        let source = source_says(here, is_killed(cell, End::Source))?;
        between(there)?;
        (source, destination_has(there, guests, link, &room.out(), cell)?)
    } else {
        let destination = destination_has(there, guests, link, &room.out(), cell)?;
        between(here)?;
        (source_says(here, is_killed(cell, End::Source))?, destination)
    };
    let seen = seen.or_else(|| relay.map(Relay::end)).unwrap_or_default();
    Ok((source, destination, seen))
}

/// Never at both ends, never at none.
fn fate(link: Link, source: &SourceSays, arrived: bool, sent_all: bool) -> Outcome<Fate> {
    match (source, arrived) {
        (SourceSays::RunsOn, false) => Ok(Fate::Source),
        (SourceSays::Gone, true) => Ok(Fate::Destination),
        (SourceSays::Unsure, true) => Ok(Fate::DestinationUnknown),
        (SourceSays::Killed, true) => Ok(Fate::Destination),
        (SourceSays::Killed, false) => Ok(Fate::Killed),
        (SourceSays::Unsure, false) if sent_all => Ok(Fate::Undecided),
        // Without a return path the source has not asked, and says so.
        (SourceSays::Gone, false) if !link.is_confirmed() => Ok(Fate::Undecided),
        (SourceSays::RunsOn, true) => Err(Failure::new("the guest runs at both ends")),
        (SourceSays::Gone, false) => {
            Err(Failure::new("the guest runs nowhere: the source was told of success"))
        }
        (SourceSays::Unsure, false) => {
            Err(Failure::new("the source gives its guest up, and has not sent all"))
        }
    }
}

/// A failure has a reason, and none is a panic; memory is bounded.
fn check_words(words: &Words, killed: bool) -> Outcome {
    let error = match &words.json {
        Some(json) => json.get("error").and_then(Value::as_str).unwrap_or_default(),
        // It failed before it knew its flags.
        None => words.stderr.split("multifd: ").nth(1).unwrap_or_default(),
    };
    let reason = words.code == Some(0) || killed || !error.is_empty();
    let wrong = match () {
        () if !reason => "no reason",
        () if words.stderr.contains("panicked") => "a panic",
        () if words.peak > MOST => "too much memory",
        () if words.code.is_none() && !killed => "killed by a signal",
        () => return Ok(()),
    };
    Err(Failure::new(format!("{wrong}: {words:?}")))
}

/// Where the checkpoint is to be; a file system of its own if it is to be full.
struct Room {
    scratch: Scratch,
    mounted: bool,
}

impl Room {
    fn new(cell: Option<Cell>) -> Outcome<Self> {
        let mut room = Self { scratch: Scratch::new()?, mounted: false };
        fs::create_dir(room.dir())?;
        if let Some(Cell { kind: Kind::DiskFull, place, .. }) = cell {
            let size = format!("size={}k", place.message.max(1) * 4);
            let mount =
                Command::new("mount").args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(room.dir()).output()?;
            room.mounted = mount.status.success();
            if !room.mounted {
                return Err(Failure::new("a file system of the test's own needs root"));
            }
        }
        Ok(room)
    }

    fn dir(&self) -> PathBuf {
        self.scratch.path("room")
    }

    fn out(&self) -> PathBuf {
        self.dir().join("checkpoint")
    }

    fn check(&self, cell: Option<Cell>, arrived: bool) -> Outcome {
        // What a killed run leaves is swept by the next one
        // (engine/src/at_rest/checkpoint/partial.rs).
        if is_killed(cell, End::Destination) { Ok(()) } else { self.check_empty(arrived) }
    }

    /// Nothing is there but the checkpoint of a guest that has arrived.
    fn check_empty(&self, arrived: bool) -> Outcome {
        let left = names(&self.dir())?;
        let is_out = |name: &String| name == "checkpoint";
        match left.iter().all(is_out) && (arrived || left.is_empty()) {
            true => Ok(()),
            false => Err(Failure::new(format!("{left:?} is left, arrived: {arrived}"))),
        }
    }

    /// No process that a command has started is left.
    fn check_children(&self, uri: &str) -> Outcome {
        let port = format!("/dev/tcp/127.0.0.1/{}", uri.rsplit(':').next().unwrap_or_default());
        let deadline = Instant::now() + CHILDREN;
        while let Some(process) = running(&port)? {
            if Instant::now() > deadline {
                return Err(Failure::new(format!("{} is still running", process.display())));
            }
            std::thread::yield_now();
        }
        Ok(())
    }
}

fn running(argument: &str) -> Outcome<Option<PathBuf>> {
    for entry in fs::read_dir("/proc")?.flatten() {
        let command = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        if String::from_utf8_lossy(&command).contains(argument) {
            return Ok(Some(entry.path()));
        }
    }
    Ok(None)
}

impl Drop for Room {
    fn drop(&mut self) {
        if self.mounted {
            let _ = Command::new("umount").arg("--lazy").arg(self.dir()).status();
        }
    }
}

/// A stream in a file, and its messages.
pub(crate) fn recorded(guests: &Guests, scratch: &Scratch) -> Outcome<Vec<Vec<u8>>> {
    let file = scratch.path("stream");
    let mut send = Multifd::send(&guests.small(), &format!("file:{}", file.display()), &settings_of_file())?;
    send.wait_success(CHILDREN)?;
    Ok(Messages::of_source().push(&fs::read(&file)?))
}

fn settings_of_file() -> Settings {
    Settings { return_path: true, ..Settings::default() }
}

/// Receives from a file with the fault in it, or with a machine that has it.
pub(crate) fn run_file(guests: &Guests, messages: &[Vec<u8>], cell: Option<Cell>) -> Outcome<Trial> {
    let room = Room::new(cell)?;
    let file = room.scratch.path("broken");
    fs::write(&file, broken(messages, cell))?;
    let from = format!("file:{}", file.display());
    let started = destination(guests, Link::File, cell, &room.out(), &from)?;
    let (mut there, _) = started?;
    let (arrived, words) = destination_has(&mut there, guests, Link::File, &room.out(), cell)?;
    drop(there);
    room.check(cell, arrived)?;
    let words = words.ok_or_else(|| Failure::new("no words"))?;
    check_words(&words, false)?;
    let is_cut = cell.is_some_and(|cell| cell.kind == Kind::Cut && cell.place.message < messages.len());
    if is_cut && arrived {
        return Err(Failure::new("a part of the stream was taken for all of it"));
    }
    if cell.is_none() && !arrived {
        return Err(Failure::new(words.stderr));
    }
    let fate = if arrived { Fate::Destination } else { Fate::Source };
    Ok(Trial { fate, seen: Seen::default(), peak: words.peak })
}

fn broken(messages: &[Vec<u8>], cell: Option<Cell>) -> Vec<u8> {
    let mut messages = messages.to_vec();
    let Some(Cell { kind, place, .. }) = cell else { return messages.concat() };
    match kind {
        Kind::Cut => messages.truncate(place.message),
        Kind::Corrupt => {
            let first = messages.get_mut(place.message).and_then(|message| message.first_mut());
            first.into_iter().for_each(|byte| *byte ^= 0x10);
        }
        Kind::Duplicate => {
            let twice = messages.get(place.message).cloned();
            twice.into_iter().for_each(|message| messages.insert(place.message, message));
        }
        _ => {}
    }
    messages.concat()
}

/// Whether a test may make file systems.
pub(crate) fn may_mount() -> bool {
    let Ok(scratch) = Scratch::new() else { return false };
    let mounted = Command::new("mount").args(["-t", "tmpfs", "tmpfs"]).arg(scratch.dir()).output();
    let may = mounted.is_ok_and(|output| output.status.success());
    if may {
        let _ = Command::new("umount").arg("--lazy").arg(scratch.dir() as &Path).status();
    }
    may
}
