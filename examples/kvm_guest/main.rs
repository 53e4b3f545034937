//! A real guest under KVM moves to another process while it writes, and counts on there.
//!
//! `cargo run --release --example kvm_guest [--postcopy] [TIMES]`
//!
//! ```text
//!  this process                                    the other one
//!  2 vCPUs count in memory; KVM logs what they write
//!  rounds over tcp, 4 channels, zstd ───────────>  RAM
//!  vCPUs stand; last pages, registers ──────────>  registers: the same counters, the same RAM
//!                                                  2 vCPUs count on
//! ```

#[path = "../../engine/tests/kvm_guest/mod.rs"]
mod guest;
mod postcopy;
mod vcpus;

use std::error::Error;
use std::hash::{DefaultHasher, Hasher};
use std::io::{BufRead, BufReader};
use std::ops::Range;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::Arc;

use multifd_codecs::Zstd;
use multifd_engine::wire::Configuration;
use multifd_engine::{Destination, HostMemory, KvmDirtyLog, PAGE, RamBlock, Report, Source, UserfaultLog};

use guest::{KvmGuest, Pace};
use vcpus::Vcpus;

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

const RAM: usize = 64 << 20;
const VCPUS: u64 = 2;
/// Additions between two exits: short enough to stop within a millisecond or two.
const PACE: Pace = Pace { lap: 10_000, pause: 20 };
/// Rounds at least: the guest must have written while it moved.
const ROUNDS: usize = 3;

const DESTINATION: &str = "--destination";

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1).peekable();
    match arguments.peek().map(String::as_str) {
        Some(DESTINATION) => return destination(),
        Some(postcopy::DESTINATION) => return postcopy::destination(),
        _ => {}
    }
    if !std::path::Path::new("/dev/kvm").exists() {
        println!("kvm_guest: skipped: there is no /dev/kvm");
        return Ok(());
    }
    let follows = arguments.next_if(|argument| argument == "--postcopy").is_some();
    if let (true, Err(error)) = (follows, UserfaultLog::new()) {
        println!("kvm_guest: skipped: no userfaultfd: {error}");
        return Ok(());
    }
    let times = arguments.next().map_or(Ok(1), |times| times.parse::<u32>())?;
    for time in 1..=times {
        if follows {
            let (report, counted) = postcopy::migrate()?;
            let served = report.postcopy.ok_or("no post-copy")?;
            println!("{time}: counted {counted:?} and went on before its RAM was there: {served}");
            continue;
        }
        let (report, counted) = migrate()?;
        println!(
            "{time}: {} rounds, {:.1} MiB on the wire, stood still for {:.1?}, counted {counted:?} and went on",
            report.progress.rounds,
            report.progress.wire_bytes as f64 / f64::from(1 << 20),
            report.downtime
        );
    }
    let how = if follows { "in post-copy, every page was there and" } else { "RAM was equal and" };
    println!("kvm_guest: {times} times in a row, {how} the count went on");
    Ok(())
}

fn memory() -> Result<RamBlock> {
    Ok(RamBlock::new("guest.ram".try_into()?, HostMemory::anonymous(RAM)?))
}

/// Moves a fresh guest to another process; what its vCPUs had counted when they stood still.
fn migrate() -> Result<(Report, Vec<u64>)> {
    let ram = memory()?;
    let guest = KvmGuest::new(&ram)?;
    let slot = guest.add_memory()?;
    guest.load()?;
    let vcpus = (0..VCPUS).map(|number| guest.add_vcpu(number, PACE)).collect::<Result<Vec<_>>>()?;
    // SAFETY: the VM has this one slot, as `add_memory` made it, for as long as the migration runs.
    #[expect(unsafe_code, reason = "KVM is told the slot's memory again")]
    let log = unsafe { KvmDirtyLog::new(Arc::clone(&guest.vm), vec![slot]) };

    let mut there = There::start(DESTINATION)?;
    let running = Vcpus::start(vcpus);
    let configuration = Configuration::new("kvm-guest-1.0");
    let mut precopy = Source::builder(vec![ram.clone()], configuration)
        .channels(4)
        .codec(Arc::new(Zstd::level(1)?))
        .dirty_log(log)
        .build()?
        .connect(&there.uri.parse()?)?;
    while !precopy.converged() || precopy.decisions().len() < ROUNDS {
        running.wait_for_laps(2);
        precopy.round()?;
    }
    let mut states = running.pause()?;
    let counted = (0..VCPUS).map(|number| guest.counted(number)).collect::<Result<Vec<_>>>()?;
    let report = precopy.stop_copy()?.commit(&vcpus::save(&mut states)?)?;

    let dirtied: u64 = report.decisions.iter().map(|round| round.remaining_bytes).sum();
    assert!(dirtied > 0, "the guest wrote nothing while it moved");
    there.expect(&format!("hash {:016x}", hash(&ram, 0..ram.pages())))?;
    there.expect(&format!("counted {counted:?}"))?;
    there.expect("went on")?;
    there.end()?;
    Ok((report, counted))
}

/// The other process: receives, says what it has, runs the guest on.
fn destination() -> Result<()> {
    let ram = memory()?;
    let destination = Destination::builder(vec![ram.clone()]).listen(&"tcp:127.0.0.1:0".parse()?)?;
    println!("listening on {}", destination.endpoint());
    let arrived = destination.receive()?;
    let states = vcpus::load(VCPUS as usize, &arrived.sections()?)?;

    let guest = KvmGuest::new(&ram)?;
    guest.add_memory()?;
    let vcpus = (0..VCPUS).map(|number| guest.add_vcpu(number, PACE)).collect::<Result<Vec<_>>>()?;
    vcpus.iter().zip(&states).try_for_each(|(vcpu, state)| state.load(vcpu))?;
    arrived.accept()?;

    println!("hash {:016x}", hash(&ram, 0..ram.pages()));
    let before = (0..VCPUS).map(|number| guest.counted(number)).collect::<Result<Vec<_>>>()?;
    println!("counted {before:?}");
    let running = Vcpus::start(vcpus);
    running.wait_for_laps(5);
    running.pause()?;
    for (number, before) in (0..).zip(before) {
        let now = guest.counted(number)?;
        // Every addition is in the data and in the counter; a page that was lost would show here.
        assert!(now > before && guest.sum(number)? == now, "vCPU {number}: {before}, then {now}");
    }
    println!("went on");
    Ok(())
}

fn hash(ram: &RamBlock, pages: Range<usize>) -> u64 {
    let (mut hasher, mut content) = (DefaultHasher::new(), [0; PAGE]);
    for page in pages {
        assert!(ram.read_page(page, &mut content));
        hasher.write(&content);
    }
    hasher.finish()
}

/// The other process, seen from this one.
struct There {
    child: Child,
    said: BufReader<ChildStdout>,
    uri: String,
}

impl There {
    fn start(part: &str) -> Result<Self> {
        let mut child = Command::new(std::env::current_exe()?).arg(part).stdout(Stdio::piped()).spawn()?;
        let mut said = BufReader::new(child.stdout.take().ok_or("no stdout")?);
        let mut line = String::new();
        said.read_line(&mut line)?;
        let uri =
            line.trim().strip_prefix("listening on ").ok_or("the destination did not start")?.to_owned();
        Ok(Self { child, said, uri })
    }

    fn expect(&mut self, expected: &str) -> Result<()> {
        let line = self.line()?;
        if line == expected { Ok(()) } else { Err(format!("{line:?}, expected {expected:?}").into()) }
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        self.said.read_line(&mut line)?;
        Ok(line.trim().to_owned())
    }

    fn end(&mut self) -> Result<()> {
        let status = self.child.wait()?;
        if status.success() { Ok(()) } else { Err(format!("the destination failed: {status}").into()) }
    }
}

impl Drop for There {
    fn drop(&mut self) {
        // Ended already, unless something went wrong on this side.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
