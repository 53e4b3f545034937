//! The two ends, ours or QEMU, and how each of them ended.

use std::path::Path;
use std::time::Duration;

use multifd_tests::process::Signal;
use multifd_tests::{
    CheckpointFiles, Compression, Failure, Multifd, Outcome, Process, Qemu, Receive, Settings, Side, ram,
};
use rustix::process::{Pid, PidfdFlags, pidfd_open, pidfd_send_signal};
use serde_json::Value;

use crate::cell::{Cell, End, Kind, Link};
use crate::guests::Guests;
use crate::relay::Act;

/// Nothing may take longer, on a machine that is busy with others, too.
const LIMIT: Duration = Duration::from_secs(100);

/// The timeout of the commands.
fn timeout(kind: Option<Kind>) -> &'static str {
    match kind {
        Some(kind) if !kind.is_harmless() => "2s",
        // A hold-up, or none, that may become long on a busy machine.
        _ => "60s",
    }
}

pub(crate) fn settings(link: Link) -> Settings {
    let compression = if link == Link::Zstd { Compression::Zstd(1) } else { Compression::None };
    Settings { channels: link.channels(), compression, return_path: true, ..Settings::default() }
}

/// One end of a migration.
pub(crate) enum Running {
    Command(Process),
    Qemu(Box<Qemu>),
}

/// How a source ended.
#[derive(Debug, PartialEq)]
pub(crate) enum SourceSays {
    RunsOn,
    Gone,
    /// It must not run on, and does not know whether the guest has arrived.
    Unsure,
    Killed,
}

/// What one of our commands said at its end.
#[derive(Debug)]
pub(crate) struct Words {
    pub(crate) code: Option<i32>,
    pub(crate) stderr: String,
    pub(crate) json: Option<Value>,
    pub(crate) peak: u64,
}

impl Running {
    pub(crate) fn act(&mut self, kind: Kind) -> Outcome<Act> {
        let id = match self {
            Self::Command(process) => process.id(),
            Self::Qemu(qemu) => qemu.process().id(),
        };
        let pid = i32::try_from(id).ok().and_then(Pid::from_raw).ok_or_else(|| Failure::new("no pid"))?;
        let process = pidfd_open(pid, PidfdFlags::empty())?;
        let signal = match kind {
            Kind::Kill => Signal::KILL,
            Kind::Stop => Signal::STOP,
            _ => Signal::INT,
        };
        // A process that has ended already cannot be hurt any more.
        Ok(Box::new(move || {
            let _ = pidfd_send_signal(&process, signal);
        }))
    }

    /// Goes on after a stop.
    pub(crate) fn go_on(&mut self) -> Outcome {
        match self {
            Self::Command(process) => process.signal(Signal::CONT),
            Self::Qemu(qemu) => qemu.process().signal(Signal::CONT),
        }
    }
}

/// The end of a command, whatever it is.
pub(crate) fn words(process: &mut Process) -> Outcome<Words> {
    let (status, usage) = process.wait_end(LIMIT)?;
    process.stderr().settle(LIMIT);
    process.stdout()?.settle(LIMIT);
    Ok(Words {
        code: status.code(),
        stderr: process.stderr().text(),
        json: serde_json::from_str(&process.stdout()?.text()).ok(),
        peak: usage.peak_resident_bytes,
    })
}

/// By a shell's limit or none.
fn limited(cell: Option<Cell>, end: End) -> Vec<String> {
    match cell {
        Some(Cell { kind: Kind::NoDescriptors, hurt, place, .. }) if hurt == end => {
            vec!["prlimit".to_owned(), format!("--nofile={}", place.message)]
        }
        _ => Vec::new(),
    }
}

/// A destination that waits at the URI that comes with it. `Err` in the inner result: the words of
/// one that did not come so far.
pub(crate) fn destination(
    guests: &Guests,
    link: Link,
    cell: Option<Cell>,
    out: &Path,
    from: &str,
) -> Outcome<Result<(Running, String), Failure>> {
    if link == Link::ToQemu {
        let mut qemu = guests.vm().incoming("defer").paused().spawn("destination")?;
        qemu.set_up(&settings(link), Side::Destination)?;
        let uri = qemu.listen("tcp:127.0.0.1:0")?;
        return Ok(Ok((Running::Qemu(Box::new(qemu)), uri)));
    }
    let mut flags = vec!["--timeout", timeout(cell.map(|cell| cell.kind))];
    let tls = guests.tls().display().to_string();
    if link.is_encrypted() {
        flags.extend(["--tls-dir", &tls]);
    }
    let wrapper = limited(cell, End::Destination);
    let wrapper: Vec<_> = wrapper.iter().map(String::as_str).collect();
    if link == Link::File {
        let mut command = vec!["receive", from, "--json", "--out"];
        let out = out.display().to_string();
        command.push(&out);
        command.extend(flags);
        let process = match wrapper.is_empty() {
            true => Multifd::spawn("receive", command)?,
            false => {
                let binary = Multifd::binary()?;
                let mut program = std::process::Command::new(wrapper[0]);
                program.args(&wrapper[1..]).arg(binary).args(command);
                Process::spawn("receive", program.stdout(std::process::Stdio::piped()))?
            }
        };
        return Ok(Ok((Running::Command(process), String::new())));
    }
    Ok(match Receive::listen_in(&wrapper, "tcp:127.0.0.1:0", out, &flags) {
        Ok(receive) => {
            let uri = receive.uri().to_owned();
            Ok((Running::Command(receive.into_process()), uri))
        }
        Err(failure) => Err(failure),
    })
}

/// A source that sends to `uri`.
pub(crate) fn source(guests: &Guests, link: Link, cell: Option<Cell>, uri: &str) -> Outcome<Running> {
    if link == Link::FromQemu {
        let mut qemu = guests.running()?;
        qemu.set_up(&settings(link), Side::Source)?;
        qemu.migrate(uri)?;
        return Ok(Running::Qemu(Box::new(qemu)));
    }
    let mut flags = vec!["--timeout", timeout(cell.map(|cell| cell.kind))];
    let tls = guests.tls().display().to_string();
    if link.is_encrypted() {
        flags.extend(["--tls-dir", &tls, "--tls-hostname", "localhost"]);
    }
    let uri = match (link, uri.rsplit_once(':')) {
        (Link::Exec, Some((_, port))) => format!("exec:exec bash -c 'cat > /dev/tcp/127.0.0.1/{port}'"),
        _ => uri.to_owned(),
    };
    let wrapper = limited(cell, End::Source);
    let wrapper: Vec<_> = wrapper.iter().map(String::as_str).collect();
    let checkpoint = if link == Link::ToQemu { guests.of_qemu()?.to_owned() } else { guests.small() };
    let process = Multifd::send_in(&wrapper, &checkpoint, &uri, &settings(link), &flags)?;
    Ok(Running::Command(process))
}

pub(crate) fn is_killed(cell: Option<Cell>, end: End) -> bool {
    cell.is_some_and(|cell| cell.kind == Kind::Kill && cell.hurt == end)
}

/// What the source says at its end.
pub(crate) fn source_says(source: &mut Running, killed: bool) -> Outcome<(SourceSays, Option<Words>)> {
    match source {
        Running::Command(process) => {
            let words = words(process)?;
            let says = match words.code {
                Some(0) => SourceSays::Gone,
                // 2: TLS files that cannot be opened, for want of descriptors.
                Some(1 | 2 | 130) => SourceSays::RunsOn,
                Some(3) => SourceSays::Unsure,
                None if killed => SourceSays::Killed,
                code => return Err(Failure::new(format!("exit code {code:?}: {}", words.stderr))),
            };
            Ok((says, Some(words)))
        }
        Running::Qemu(qemu) => {
            // A QEMU that was killed answers no more.
            let report = match qemu.wait_end(LIMIT) {
                Err(_) if killed => return Ok((SourceSays::Killed, None)),
                ended => ended?,
            };
            let says = match (report.status.as_str(), qemu.run_state()?.as_str()) {
                ("completed", "postmigrate") => SourceSays::Gone,
                (_, "running") => SourceSays::RunsOn,
                (status, state) => {
                    return Err(Failure::new(format!("QEMU: migration {status}, guest {state}")));
                }
            };
            Ok((says, None))
        }
    }
}

/// Whether the destination has the guest, and what it said. The RAM is compared with the source's.
pub(crate) fn destination_has(
    destination: &mut Running,
    guests: &Guests,
    link: Link,
    out: &Path,
    cell: Option<Cell>,
) -> Outcome<(bool, Option<Words>)> {
    // Under TLS an altered record is refused.
    let alters = cell.is_some_and(|cell| cell.kind.alters()) && !link.is_encrypted();
    let killed = is_killed(cell, End::Destination);
    match destination {
        Running::Command(process) => {
            let words = words(process)?;
            // 3: it is there, and the source may not have heard so. Killed: that was too late.
            let has = matches!(words.code, Some(0 | 3)) || killed && out.exists();
            if has && !alters && link != Link::FromQemu {
                CheckpointFiles::open(&guests.small())?.check_equal(&CheckpointFiles::open(out)?)?;
            }
            Ok((has, Some(words)))
        }
        Running::Qemu(qemu) => {
            let report = match qemu.wait_end(LIMIT) {
                Err(_) if killed => return Ok((false, None)),
                ended => ended?,
            };
            let has = report.status == "completed";
            if has && !alters {
                let sent = CheckpointFiles::open(guests.of_qemu()?)?.block("pc.ram")?;
                ram::check_equal(&sent, qemu.ram())?;
            }
            Ok((has, None))
        }
    }
}
