//! One move: who sends to whom, what it cost, and whether the RAM is equal.

use std::fs;
use std::path::Path;
use std::sync::mpsc::channel;
use std::thread;
use std::time::Duration;

use multifd_tests::{
    CheckpointFiles, CommandReport, Host, Multifd, Outcome, Process, Qemu, Receive, Scratch, Side, ram,
};

use crate::account;
use crate::guest::{Stage, TIMEOUT};
use crate::pump::{self, Landing};
use crate::scenario::{Scenario, Transport, Way};

/// What one move cost. The pump has a time only.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Cost {
    /// From the command to the source's report that the guest has arrived.
    pub(crate) total: Duration,
    /// Time on a core at the source and at the destination.
    pub(crate) cpu: [Duration; 2],
    pub(crate) wire_bytes: u64,
    /// How long a live guest was paused.
    pub(crate) downtime: Duration,
    /// How often a live guest's dirty pages were collected.
    pub(crate) rounds: u64,
    /// The most private memory at the source and at the destination, in bytes: what was there
    /// before the move is not counted.
    pub(crate) private_bytes: [u64; 2],
}

/// Moves the guest once; fails unless its RAM arrives equal.
pub(crate) fn once(scenario: &Scenario, way: Way, stage: &mut Stage) -> Outcome<Cost> {
    prepare(scenario, stage)?;
    let lanes = usize::from(scenario.channels.unwrap_or(1));
    let pump = |landing| {
        let total = pump::run(&stage.packed()?, lanes, scenario.transport, landing)?;
        Ok(Cost { total, ..Cost::default() })
    };
    match way {
        Way::QemuToQemu => qemu_to_qemu(scenario, stage, &|qemu, side| as_said(scenario, qemu, side)),
        Way::OursToOurs => ours_to_ours(scenario, stage),
        Way::QemuToOurs => qemu_to_ours(scenario, stage),
        Way::OursToQemu => ours_to_qemu(scenario, stage),
        Way::PumpMapping => pump(Landing::Mapping),
        Way::PumpFile => pump(Landing::File),
    }
}

/// How a QEMU at one end is set up.
pub(crate) type SetUp<'a> = &'a dyn Fn(&mut Qemu, Side) -> Outcome;

/// The same from QEMU to QEMU, set up otherwise than the scenario says.
pub(crate) fn by_qemu(scenario: &Scenario, stage: &mut Stage, set_up: SetUp<'_>) -> Outcome<Cost> {
    prepare(scenario, stage)?;
    qemu_to_qemu(scenario, stage, set_up)
}

fn prepare(scenario: &Scenario, stage: &Stage) -> Outcome {
    if scenario.looked_at { Ok(()) } else { stage.forget_untouched() }
}

fn as_said(scenario: &Scenario, qemu: &mut Qemu, side: Side) -> Outcome {
    qemu.set_up(&scenario.settings(), side)
}

fn qemu_to_qemu(scenario: &Scenario, stage: &mut Stage, set_up: SetUp<'_>) -> Outcome<Cost> {
    let (mut destination, uri) = incoming(scenario, stage, set_up)?;
    let pids = [stage.qemu.process().id(), destination.process().id()];
    let before = Snapshot::of(pids)?;
    let moved = watched(pids, || send_by_qemu(&mut stage.qemu, &uri, set_up));
    let (report, peak) = moved.map_err(|failure| destination.explain(failure))?;
    destination.wait_completed(TIMEOUT)?;
    let after = Snapshot::of(pids)?;
    ram::check_equal(stage.qemu.ram(), destination.ram())?;
    Ok(Cost {
        total: report.0,
        wire_bytes: report.1,
        cpu: after.cpu_since(&before),
        private_bytes: before.growth_to(peak),
        ..Cost::default()
    })
}

fn ours_to_ours(scenario: &Scenario, stage: &mut Stage) -> Outcome<Cost> {
    let scratch = Scratch::new()?;
    let out = scratch.path("out");
    let mut receive = listen(scenario, stage, &scratch, &out)?;
    let mut send = send(scenario, stage, receive.uri())?;
    let pids = [send.id(), receive.process().id()];
    let (usages, private_bytes) = watched(pids, || {
        let source = send.wait_usage(TIMEOUT)?;
        Ok([source, receive.process().wait_usage(TIMEOUT)?])
    })?;
    let report = CommandReport::by(&send)?;
    check_arrived(stage, &out)?;
    Ok(Cost {
        total: Duration::from_millis(report.number("total_ms")?),
        wire_bytes: report.number("wire_bytes")?,
        cpu: usages.map(|usage| usage.cpu),
        private_bytes,
        ..Cost::default()
    })
}

fn qemu_to_ours(scenario: &Scenario, stage: &mut Stage) -> Outcome<Cost> {
    let scratch = Scratch::new()?;
    let out = scratch.path("out");
    let mut receive = listen(scenario, stage, &scratch, &out)?;
    let target = receive.uri().to_owned();
    let pids = [stage.qemu.process().id(), receive.process().id()];
    let before = Snapshot::of(pids)?;
    let set_up: SetUp<'_> = &|qemu, side| as_said(scenario, qemu, side);
    let (report, peak) = watched(pids, || send_by_qemu(&mut stage.qemu, &target, set_up))?;
    let destination = receive.process().wait_usage(TIMEOUT)?.cpu;
    let [source, _] = before.cpu;
    let source = account::cpu(pids[0])?.saturating_sub(source);
    check_arrived(stage, &out)?;
    let [private_source, _] = before.growth_to(peak);
    Ok(Cost {
        total: report.0,
        wire_bytes: report.1,
        cpu: [source, destination],
        private_bytes: [private_source, peak[1]],
        ..Cost::default()
    })
}

fn ours_to_qemu(scenario: &Scenario, stage: &mut Stage) -> Outcome<Cost> {
    let (mut destination, uri) = incoming(scenario, stage, &|qemu, side| as_said(scenario, qemu, side))?;
    let id = destination.process().id();
    let before = Snapshot::of([id, id])?;
    let mut send = send(scenario, stage, &uri)?;
    let (usage, peak) = watched([send.id(), id], || send.wait_usage(TIMEOUT))?;
    destination.wait_completed(TIMEOUT)?;
    let after = Snapshot::of([id, id])?;
    let report = CommandReport::by(&send)?;
    ram::check_equal(stage.qemu.ram(), destination.ram())?;
    Ok(Cost {
        total: Duration::from_millis(report.number("total_ms")?),
        wire_bytes: report.number("wire_bytes")?,
        cpu: [usage.cpu, after.cpu_since(&before)[1]],
        private_bytes: [peak[0], before.growth_to(peak)[1]],
        ..Cost::default()
    })
}

/// A QEMU that listens, and where.
fn incoming(scenario: &Scenario, stage: &Stage, set_up: SetUp<'_>) -> Outcome<(Qemu, String)> {
    let there = stage.inside(far_end(scenario));
    let destination = stage.builder.clone().inside(&there).incoming("defer").paused();
    let mut destination = destination.spawn("destination")?;
    stage.credentials.give_to(&mut destination, "server")?;
    set_up(&mut destination, Side::Destination)?;
    let uri = uri(scenario, destination.scratch());
    let uri = destination.listen(&uri)?;
    Ok((destination, uri))
}

/// QEMU's own time, and the bytes that it counted.
fn send_by_qemu(qemu: &mut Qemu, uri: &str, set_up: SetUp<'_>) -> Outcome<(Duration, u64)> {
    // A guest that has moved away once may only move again after it has run; this one is halted,
    // and stays as it is.
    qemu.resume()?;
    qemu.stop()?;
    set_up(qemu, Side::Source)?;
    qemu.migrate(uri)?;
    let report = qemu.wait_completed(TIMEOUT)?;
    Ok((report.total, report.transferred_bytes))
}

/// A `multifd receive` that listens.
fn listen(scenario: &Scenario, stage: &Stage, scratch: &Scratch, out: &Path) -> Outcome<Receive> {
    let flags = if scenario.tls { Vec::from(stage.credentials.flags()) } else { Vec::new() };
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    Receive::listen_in(&stage.inside(far_end(scenario)), &uri(scenario, scratch), out, &flags)
}

/// A `multifd send` under way.
fn send(scenario: &Scenario, stage: &Stage, uri: &str) -> Outcome<Process> {
    let flags = if scenario.tls { Vec::from(stage.credentials.flags()) } else { Vec::new() };
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    Multifd::send_in(&stage.inside(Host::Left), &stage.checkpoint, uri, &scenario.settings(), &flags)
}

fn uri(scenario: &Scenario, scratch: &Scratch) -> String {
    match (scenario.transport, scenario.link) {
        (Transport::Tcp, Some(_)) => format!("tcp:{}:0", far_end(scenario).address()),
        (Transport::Tcp, None) => "tcp:127.0.0.1:0".to_owned(),
        (Transport::Unix, _) => scratch.unix_uri("socket"),
    }
}

/// Where the destination runs. The source is at the left host.
fn far_end(scenario: &Scenario) -> Host {
    if scenario.link.is_some() { Host::Right } else { Host::Left }
}

fn check_arrived(stage: &Stage, out: &Path) -> Outcome {
    ram::check_equal(stage.qemu.ram(), &CheckpointFiles::open(out)?.block("pc.ram")?)?;
    Ok(fs::remove_dir_all(out)?)
}

/// Two processes, source and destination, at one time.
struct Snapshot {
    cpu: [Duration; 2],
    private_bytes: [u64; 2],
}

impl Snapshot {
    fn of(pids: [u32; 2]) -> Outcome<Self> {
        let [source, destination] = pids;
        Ok(Self {
            cpu: [account::cpu(source)?, account::cpu(destination)?],
            private_bytes: pids.map(account::private_bytes),
        })
    }

    fn cpu_since(&self, before: &Self) -> [Duration; 2] {
        let ([source, destination], [source_then, destination_then]) = (self.cpu, before.cpu);
        [source.saturating_sub(source_then), destination.saturating_sub(destination_then)]
    }

    fn growth_to(&self, peak: [u64; 2]) -> [u64; 2] {
        let ([source, destination], [source_then, destination_then]) = (peak, self.private_bytes);
        [source.saturating_sub(source_then), destination.saturating_sub(destination_then)]
    }
}

/// Runs `action`; the most private memory of the two processes meanwhile.
fn watched<T>(pids: [u32; 2], action: impl FnOnce() -> Outcome<T>) -> Outcome<(T, [u64; 2])> {
    let (done, over) = channel::<()>();
    thread::scope(|scope| {
        let watch = scope.spawn(move || account::watch(pids, &over));
        let result = action();
        drop(done);
        let peak = watch.join().unwrap_or_default();
        Ok((result?, peak))
    })
}
