//! A guest to a mapped-ram file and back, ours against QEMU's: the same RAM, the same disk, turn by turn. What is saved counts
//! as saved when it lies on the disk.

use std::fs::File;
use std::path::Path;
use std::time::{Duration, Instant};

use multifd_engine::{Destination, DeviceState, HostMemory, RamBlock, Source};
use multifd_tests::{Fill, Outcome, Qemu, QemuBuilder, Settings, Side};
use multifd_transports::Endpoint;
use multifd_wire::Configuration;

const RAM_MIB: u32 = 1024;
const RUNS: usize = 5;
const LONG: Duration = Duration::from_secs(300);

/// How the file is written and read.
#[derive(Clone, Copy)]
struct Way {
    /// 0: on the main thread alone.
    workers: u8,
    direct: bool,
}

fn main() -> Outcome {
    if let Some(why) = multifd_tests::skip::missing_qemu() {
        println!("skipped: {why}");
        return Ok(());
    }
    println!("{RAM_MIB} MiB, 3/8 of them zero; median of {RUNS}, ms");
    println!("{:<24} {:>8} {:>8} {:>12}", "", "QEMU", "ours", "QEMU / ours");
    for way in [0, 2].into_iter().flat_map(|workers| [false, true].map(|direct| Way { workers, direct })) {
        let figures = measure(way)?;
        let name = format!("{} threads{}", way.workers, if way.direct { ", direct" } else { "" });
        for (what, [qemu, ours]) in [("save", figures.0), ("load", figures.1)] {
            println!("{:<24} {qemu:>8.0} {ours:>8.0} {:>12.2}", format!("{what}, {name}"), qemu / ours);
        }
    }
    Ok(())
}

/// Medians of QEMU's and ours: saving, loading.
fn measure(way: Way) -> Outcome<([f64; 2], [f64; 2])> {
    let disk = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    let (theirs, ours) = (disk.path().join("theirs"), disk.path().join("ours"));
    let vm = Qemu::builder().ram_mib(RAM_MIB).paused();
    let mut source = vm.clone().fill(Fill::new(1)).spawn("source")?;
    source.set_up(&settings(way), Side::Source)?;
    let (mut saved, mut loaded) = ([vec![], vec![]], [vec![], vec![]]);
    for _ in 0..RUNS {
        saved[0].push(save_by_qemu(&mut source, &theirs)?);
        saved[1].push(save(way, source.ram(), &ours)?);
        loaded[0].push(load_by_qemu(way, &vm, &theirs)?);
        loaded[1].push(load(way, &disk.path().join("ram"), &ours)?);
    }
    Ok((saved.map(median), loaded.map(median)))
}

fn settings(way: Way) -> Settings {
    let channels = Some(way.workers).filter(|workers| *workers > 0);
    let mut settings = Settings { channels, capabilities: vec!["mapped-ram"], ..Settings::default() };
    settings.parameters.insert("direct-io".into(), way.direct.into());
    settings
}

fn save_by_qemu(source: &mut Qemu, path: &Path) -> Outcome<f64> {
    timed(|| {
        source.migrate(&format!("file:{}", path.display()))?;
        source.wait_completed(LONG)?;
        Ok(File::open(path)?.sync_all()?)
    })
}

fn save(way: Way, ram: &Path, path: &Path) -> Outcome<f64> {
    let configuration =
        Configuration { machine: "bench".into(), page_bits: None, capabilities: Vec::new(), uuid: None };
    let memory = HostMemory::map_file_read_only(File::open(ram)?, (RAM_MIB as usize) << 20)?;
    let block = RamBlock::new("pc.ram".try_into()?, memory);
    timed(|| {
        let source = Source::builder(vec![block], configuration).mapped_ram(true).direct_io(way.direct);
        let mut precopy = source.channels(way.workers.into()).build()?.connect(&endpoint(path))?;
        precopy.round()?;
        precopy.stop_copy()?.commit(&DeviceState::none())?;
        Ok(())
    })
}

fn load_by_qemu(way: Way, vm: &QemuBuilder, path: &Path) -> Outcome<f64> {
    let mut destination = vm.clone().incoming("defer").spawn("destination")?;
    destination.set_up(&settings(way), Side::Destination)?;
    timed(|| {
        destination.listen(&format!("file:{}", path.display()))?;
        destination.wait_completed(LONG).map(drop)
    })
}

/// Into memory of the kind that QEMU's is here: a new file in memory.
fn load(way: Way, ram: &Path, path: &Path) -> Outcome<f64> {
    let shm = tempfile::tempfile_in("/dev/shm").or_else(|_| File::create_new(ram))?;
    shm.set_len(u64::from(RAM_MIB) << 20)?;
    let memory = HostMemory::map_file(shm, (RAM_MIB as usize) << 20)?;
    let block = RamBlock::new("pc.ram".try_into()?, memory).fresh();
    timed(|| {
        let destination = Destination::builder(vec![block]).direct_io(way.direct);
        let arrived =
            destination.channels(usize::from(way.workers).max(1)).listen(&endpoint(path))?.receive()?;
        arrived.accept()?;
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
