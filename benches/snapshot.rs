//! A guest to a mapped-ram file and back, ours against QEMU's: the same RAM, turn by turn, in a
//! file system in memory: a disk would be all that is measured.

use std::fs::File;
use std::path::Path;
use std::time::{Duration, Instant};

use multifd_engine::{Destination, DeviceState, HostMemory, RamBlock, Source};
use multifd_tests::{Fill, Outcome, Qemu, QemuBuilder, Scratch, Settings, Side};
use multifd_transports::Endpoint;
use multifd_wire::Configuration;

const RAM_MIB: u32 = 512;
const RUNS: usize = 9;
const LONG: Duration = Duration::from_secs(300);

fn main() -> Outcome {
    if let Some(why) = multifd_tests::skip::missing_qemu() {
        println!("skipped: {why}");
        return Ok(());
    }
    println!("{RAM_MIB} MiB, 3/8 of them zero; median of {RUNS}, ms");
    println!("{:<24} {:>8} {:>8} {:>12}", "", "QEMU", "ours", "QEMU / ours");
    for workers in [0, 1, 2] {
        let (saved, loaded) = measure(workers)?;
        for (what, [qemu, ours]) in [("save", saved), ("load", loaded)] {
            let name = format!("{what}, {workers} threads");
            println!("{name:<24} {qemu:>8.0} {ours:>8.0} {:>12.2}", qemu / ours);
        }
    }
    Ok(())
}

/// Medians of QEMU's and ours: saving, loading. Without `workers`, the main thread does it alone.
fn measure(workers: u8) -> Outcome<([f64; 2], [f64; 2])> {
    let scratch = Scratch::new()?;
    let (theirs, ours) = (scratch.path("theirs"), scratch.path("ours"));
    let vm = Qemu::builder().ram_mib(RAM_MIB).paused();
    let mut source = vm.clone().fill(Fill::new(1)).spawn("source")?;
    source.set_up(&settings(workers), Side::Source)?;
    // Mapped once, as QEMU has it.
    let memory = HostMemory::map_file_read_only(File::open(source.ram())?, (RAM_MIB as usize) << 20)?;
    let block = RamBlock::new("pc.ram".try_into()?, memory);
    let (mut saved, mut loaded) = ([vec![], vec![]], [vec![], vec![]]);
    for _ in 0..RUNS {
        saved[0].push(save_by_qemu(&mut source, &theirs)?);
        saved[1].push(save(workers, block.clone(), &ours)?);
        loaded[0].push(load_by_qemu(workers, &vm, &theirs)?);
        loaded[1].push(load(workers, &scratch.path("ram"), &ours)?);
    }
    Ok((saved.map(median), loaded.map(median)))
}

fn settings(workers: u8) -> Settings {
    let channels = Some(workers).filter(|workers| *workers > 0);
    Settings { channels, capabilities: vec!["mapped-ram"], ..Settings::default() }
}

fn save_by_qemu(source: &mut Qemu, path: &Path) -> Outcome<f64> {
    // It saves no guest that has been saved and did not run since.
    source.resume()?;
    source.stop()?;
    timed(|| {
        source.migrate(&format!("file:{}", path.display()))?;
        source.wait_completed(LONG).map(drop)
    })
}

fn save(workers: u8, block: RamBlock, path: &Path) -> Outcome<f64> {
    let configuration = Configuration::new("bench");
    timed(|| {
        let source = Source::builder(vec![block], configuration)
            .paused_guest()
            .mapped_ram(true)
            .channels(workers.into());
        let mut precopy = source.build()?.connect(&endpoint(path))?;
        precopy.round()?;
        precopy.stop_copy()?.commit(&DeviceState::none())?;
        Ok(())
    })
}

fn load_by_qemu(workers: u8, vm: &QemuBuilder, path: &Path) -> Outcome<f64> {
    let mut destination = vm.clone().incoming("defer").spawn("destination")?;
    destination.set_up(&settings(workers), Side::Destination)?;
    timed(|| {
        destination.listen(&format!("file:{}", path.display()))?;
        destination.wait_completed(LONG).map(drop)
    })
}

/// Into memory of the kind that QEMU's is here: a new file in memory.
fn load(workers: u8, ram: &Path, path: &Path) -> Outcome<f64> {
    let file = File::options().read(true).write(true).create(true).truncate(true).open(ram)?;
    file.set_len(u64::from(RAM_MIB) << 20)?;
    let memory = HostMemory::map_file(file, (RAM_MIB as usize) << 20)?;
    let block = RamBlock::new("pc.ram".try_into()?, memory).fresh();
    timed(|| {
        let destination = Destination::builder(vec![block]).channels(workers.max(1).into());
        destination.listen(&endpoint(path))?.receive()?.accept()?;
        Ok(())
    })
}

fn endpoint(path: &Path) -> Endpoint {
    Endpoint::File { path: path.to_owned(), offset: 0 }
}

fn timed(body: impl FnOnce() -> Outcome) -> Outcome<f64> {
    let begun = Instant::now();
    body()?;
    Ok(begun.elapsed().as_secs_f64() * 1000.0)
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times.get(times.len() / 2).copied().unwrap_or(f64::NAN)
}
