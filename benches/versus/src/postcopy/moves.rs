//! One post-copy: by whom to whom, how long threads waited, and whether the RAM is equal.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use multifd_tests::skip::newest_qemu;
use multifd_tests::{
    CheckpointFiles, CommandReport, Failure, Fill, Host, Multifd, Network, Outcome, Process, Qemu,
    QemuBuilder, Scratch, Settings, Side, ram,
};
use serde_json::{Value, json};

use super::destination::{COMPARED_FROM, Faulting, LISTENING, MAIN_RAM};
use super::guest::{HALTED, write_firmware};
use super::latency::Latency;
use crate::guest::{TIMEOUT, receive};
use crate::scenario::Way;

/// A guest with content, ready to be moved again and again.
pub(crate) struct Stage {
    pub(crate) ram_mib: u32,
    pub(crate) vcpus: u32,
    builder: QemuBuilder,
    checkpoint: PathBuf,
    /// Two hosts and a cable.
    network: Option<Network>,
    /// Of the scenario.
    flags: Faulting,
    _scratch: Scratch,
}

/// What one move cost.
#[derive(Clone, Debug)]
pub(crate) struct Cost {
    pub(crate) latency: Latency,
    /// From the guest's stop until it ran at the destination.
    pub(crate) downtime: Duration,
    /// From the switch until all of RAM was there.
    pub(crate) total: Duration,
}

/// What goes before the switch is next to nothing: at this rate, in bytes a second.
const BEFORE_THE_SWITCH: u64 = 8 << 20;

impl Stage {
    /// `link`: between two hosts of this network, at so many Mbit/s; none: this machine's loopback.
    pub(crate) fn new(ram_mib: u32, flags: &Faulting, link: Option<(Network, u32)>) -> Outcome<Self> {
        let scratch = Scratch::new()?;
        let firmware = scratch.path("firmware");
        let vcpus = flags.threads.max(1);
        write_firmware(&firmware, ram_mib, vcpus)?;
        let builder = Qemu::builder()
            .program(&newest_qemu().map_err(Failure::new)?)
            .ram_mib(ram_mib)
            .firmware(&firmware)
            .argument("-smp")
            .argument(vcpus.to_string());
        if let Some((network, mbit)) = &link {
            network.shape(*mbit)?;
        }
        let network = link.map(|(network, _)| network);
        let checkpoint = scratch.path("checkpoint");
        let stage =
            Self { ram_mib, vcpus, builder, checkpoint, network, flags: flags.clone(), _scratch: scratch };
        // As it runs, so that it runs where it comes: it is halted.
        let mut source = stage.source(&[])?;
        receive(&mut source, &stage.checkpoint, &[])?;
        source.quit()?;
        Ok(stage)
    }

    /// A QEMU whose guest is halted.
    fn source(&self, near: &[&str]) -> Outcome<Qemu> {
        let source = self.builder.clone().inside(near).fill(Fill::new(1)).spawn("source")?;
        let all = usize::try_from(self.vcpus)?;
        source.serial().wait_until("vCPUs that halt", TIMEOUT, |said| {
            (said.iter().filter(|byte| **byte == HALTED).count() >= all).then_some(())
        })?;
        Ok(source)
    }

    fn inside(&self, host: Host) -> Vec<&str> {
        self.network.as_ref().map_or_else(Vec::new, |network| network.inside(host).to_vec())
    }

    fn listen_at(&self) -> String {
        let address = self.network.as_ref().map_or("127.0.0.1", |_| Host::Right.address());
        format!("tcp:{address}:0")
    }

    /// Moves the guest once; fails unless its RAM arrives equal.
    pub(crate) fn once(&self, way: Way) -> Outcome<Cost> {
        match way {
            Way::OursToOurs => self.ours(self.our_destination()?),
            Way::OursToQemu => self.ours(self.their_destination()?),
            Way::QemuToOurs => self.theirs(self.our_destination()?),
            _ => self.theirs(self.their_destination()?),
        }
    }

    fn their_destination(&self) -> Outcome<There> {
        let builder = self.builder.clone().inside(&self.inside(Host::Right)).incoming("defer");
        let mut qemu = builder.spawn("destination")?;
        qemu.set_up(&settings(), Side::Destination)?;
        let uri = qemu.listen(&self.listen_at())?;
        Ok(There { uri, who: Who::Qemu(Box::new(qemu)) })
    }

    fn our_destination(&self) -> Outcome<There> {
        let (inside, own) = (self.inside(Host::Right), std::env::current_exe()?);
        let mut command = match inside.split_first() {
            Some((first, rest)) => {
                let mut command = Command::new(first);
                command.args(rest).arg(own);
                command
            }
            None => Command::new(own),
        };
        let (threads, fault_threads) = (self.flags.threads.to_string(), self.flags.fault_threads.to_string());
        let expected = CheckpointFiles::open(&self.checkpoint)?.block(MAIN_RAM)?;
        command.args(["--destination", &self.listen_at(), "--threads", &threads]);
        command.args(["--fault-threads", &fault_threads, "--expect"]).arg(expected);
        let process = Process::spawn("destination", command.stdin(Stdio::null()).stdout(Stdio::piped()))?;
        let listening = |said: &[u8]| {
            let first = std::str::from_utf8(said).ok()?.split_once('\n')?.0;
            first.strip_prefix(LISTENING).map(str::to_owned)
        };
        let uri = process.stdout()?.wait_until("the address", TIMEOUT, listening);
        let uri = uri.map_err(|failure| process.explain(failure))?;
        Ok(There { uri, who: Who::Ours(process) })
    }

    /// By a QEMU.
    fn theirs(&self, mut there: There) -> Outcome<Cost> {
        let mut source = self.source(&self.inside(Host::Left))?;
        source.set_up(&settings(), Side::Source)?;
        source.set_parameter("max-bandwidth", BEFORE_THE_SWITCH)?;
        source.migrate(&there.uri)?;
        source.wait_transferred(1 << 20, TIMEOUT)?;
        let begun = Instant::now();
        source.start_postcopy()?;
        let mut running = there.run()?;
        let moved = source.wait_event("STOP", TIMEOUT, |event| is(event, "STOP")).and_then(|stopped| {
            source.wait_completed(TIMEOUT)?;
            Ok((at_us(&stopped)?, begun.elapsed()))
        });
        let (stopped, total) = moved.map_err(|failure| there.explain(failure))?;
        let latency = there.end(source.ram(), &mut running)?;
        let running = running.ok_or_else(|| Failure::new("when the guest ran is not known"))?;
        Ok(Cost { latency, downtime: Duration::from_micros(running.saturating_sub(stopped)), total })
    }

    /// By `multifd send`, of the checkpoint.
    fn ours(&self, mut there: There) -> Outcome<Cost> {
        let mut flags = vec!["--postcopy", "--postcopy-preempt", "--quiet"];
        if let Some(size) = &self.flags.send_buffer {
            flags.extend(["--send-buffer", size]);
        }
        let inside = self.inside(Host::Left);
        let mut send = Multifd::send_in(&inside, &self.checkpoint, &there.uri, &settings(), &flags)?;
        let mut running = there.run().map_err(|failure| send.explain(failure))?;
        send.wait_success(TIMEOUT).map_err(|failure| there.explain(failure))?;
        let report = CommandReport::by(&send)?;
        let ram = CheckpointFiles::open(&self.checkpoint)?.block(MAIN_RAM)?;
        let latency = there.end(&ram, &mut running)?;
        let ms = |key| report.number(key).map(Duration::from_millis);
        Ok(Cost { latency, downtime: ms("downtime_ms")?, total: ms("total_ms")? })
    }
}

/// A destination that listens.
struct There {
    uri: String,
    who: Who,
}

enum Who {
    Qemu(Box<Qemu>),
    Ours(Process),
}

impl There {
    /// Waits until the guest runs, and has a QEMU's vCPUs touch their pages. When that was, in µs
    /// of the clock, if it is known.
    fn run(&mut self) -> Outcome<Option<u64>> {
        let Who::Qemu(qemu) = &mut self.who else { return Ok(None) };
        let running = qemu.wait_event("RESUME", TIMEOUT, |event| is(event, "RESUME"))?;
        qemu.execute("inject-nmi", json!({}))?;
        at_us(&running).map(Some)
    }

    fn explain(&self, failure: Failure) -> Failure {
        match &self.who {
            Who::Qemu(qemu) => qemu.explain(failure),
            Who::Ours(process) => process.explain(failure),
        }
    }

    /// Waits for the end, and compares the RAM with `expected`.
    fn end(self, expected: &Path, running: &mut Option<u64>) -> Outcome<Latency> {
        match self.who {
            Who::Qemu(mut qemu) => {
                let report = qemu.wait_completed(TIMEOUT)?;
                qemu.stop()?;
                check_equal(expected, qemu.ram())?;
                Latency::of(report.all.get("postcopy-latency-dist"))
            }
            Who::Ours(mut process) => {
                process.wait_success(TIMEOUT)?;
                let said = process.stdout()?.text();
                let said: Value = serde_json::from_str(said.lines().last().unwrap_or_default())?;
                *running = said.get("running_at_us").and_then(Value::as_str).and_then(|us| us.parse().ok());
                Latency::of(said.pointer("/postcopy/fault_us/histogram"))
            }
        }
    }
}

fn settings() -> Settings {
    Settings {
        return_path: true,
        capabilities: vec!["postcopy-ram", "postcopy-preempt", "postcopy-blocktime"],
        ..Settings::default()
    }
}

fn is(event: &Value, name: &str) -> bool {
    event.get("event").and_then(Value::as_str) == Some(name)
}

/// When QEMU says that an event was, in µs.
fn at_us(event: &Value) -> Outcome<u64> {
    let number = |path| event.pointer(path).and_then(Value::as_u64);
    let parts = number("/timestamp/seconds").zip(number("/timestamp/microseconds"));
    parts.map(|(s, us)| s * 1_000_000 + us).ok_or_else(|| Failure::new(format!("no time in {event}")))
}

/// From where the guest writes nothing.
fn check_equal(left: &Path, right: &Path) -> Outcome {
    let (left, right) = (File::open(left)?, File::open(right)?);
    let page_len = usize::try_from(ram::PAGE)?;
    let (mut here, mut there) = (vec![0; page_len], vec![0; page_len]);
    for page in COMPARED_FROM as u64..left.metadata()?.len() / ram::PAGE {
        left.read_exact_at(&mut here, page * ram::PAGE)?;
        right.read_exact_at(&mut there, page * ram::PAGE)?;
        if here != there {
            return Err(Failure::new(format!("page {page} is not the source's")));
        }
    }
    Ok(())
}
