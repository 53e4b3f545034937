//! A guest that runs while it moves: a working set that it rewrites again and again, the same at
//! both.
//!
//! QEMU's guest is a boot sector. Ours is a thread of this process that writes the same pages at
//! the same pace, with the engine as a VMM would embed it; its destination is `multifd receive`.

use std::fs::{self, File};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use multifd_codecs::{Codec, Uncompressed, Zstd};
use multifd_engine::wire::Configuration;
use multifd_engine::{DeviceState, DirtyMarker, HostMemory, PAGE, RamBlock, Report, SoftwareLog, Source};
use multifd_tests::{
    BootSector, CheckpointFiles, Compression, Failure, Fill, Outcome, Qemu, Receive, Scratch, migration, ram,
};

use crate::guest::TIMEOUT;
use crate::moves::Cost;
use crate::scenario::Scenario;

/// What the guest rewrites.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub(crate) struct WorkingSet {
    pub(crate) pages: u32,
    /// How often a second it rewrites all of them.
    pub(crate) laps_per_second: u16,
}

/// The working set lies where the boot sector's machine has plain RAM.
const FIRST_PAGE: u32 = 0x1000;

/// QEMU's default xbzrle-cache-size, in bytes.
const QEMU_CACHE: usize = 64 << 20;

/// Laps before a move begins: all of the working set has been written.
const WARM_UP: u32 = 3;

/// By QEMU, from start to end.
pub(crate) fn by_qemu(scenario: &Scenario, set: WorkingSet) -> Outcome<Cost> {
    let scratch = Scratch::new()?;
    let floppy = scratch.path("floppy");
    BootSector::new()
        .pages(FIRST_PAGE, set.pages)
        .laps_per_second(set.laps_per_second)
        .write_floppy(&floppy)?;
    let builder = Qemu::builder().ram_mib(scenario.guest.ram_mib()).floppy(&floppy);
    let mut source = builder.clone().fill(Fill::new(1)).spawn("source")?;
    let mut destination = builder.incoming("defer").paused().spawn("destination")?;
    source.serial().wait_lines(usize::try_from(WARM_UP)?, 0, TIMEOUT)?;
    let uri = scratch.unix_uri("socket");
    let uri = if scenario.over_tcp() { "tcp:127.0.0.1:0" } else { &uri };
    let report = migration::run(&mut source, &mut destination, uri, &scenario.settings(), TIMEOUT)?;
    ram::check_equal(source.ram(), destination.ram())?;
    Ok(Cost {
        total: report.total,
        downtime: report.downtime,
        rounds: report.rounds,
        wire_bytes: report.transferred_bytes,
        ..Cost::default()
    })
}

/// By the engine, from start to end.
pub(crate) fn by_ours(scenario: &Scenario, set: WorkingSet) -> Outcome<Cost> {
    let scratch = Scratch::new()?;
    let (memory, out) = (scratch.path("ram"), scratch.path("out"));
    let len = u64::from(scenario.guest.ram_mib()) << 20;
    Fill::new(1).write(&memory, len)?;
    let mut receive = Receive::listen("tcp:127.0.0.1:0", &out)?;
    let report = run(scenario, set, &memory, len, receive.uri())?;
    receive.wait_success(TIMEOUT)?;
    ram::check_equal(&memory, &CheckpointFiles::open(&out)?.block("pc.ram")?)?;
    fs::remove_dir_all(&out)?;
    Ok(Cost {
        total: report.total,
        downtime: report.downtime,
        rounds: report.progress.rounds,
        wire_bytes: report.progress.wire_bytes,
        ..Cost::default()
    })
}

fn run(scenario: &Scenario, set: WorkingSet, memory: &Path, len: u64, uri: &str) -> Outcome<Report> {
    let file = File::options().read(true).write(true).open(memory)?;
    let host = HostMemory::map_file(file, usize::try_from(len)?)?;
    let ram = [RamBlock::new("pc.ram".try_into().map_err(fail)?, host.clone())];
    let log = SoftwareLog::new(&ram);
    let guest = Guest { memory: host, marker: log.marker(), set, state: Arc::default() };
    let configuration = Configuration::new("versus");
    let settings = scenario.settings();
    let source = Source::builder(ram.to_vec(), configuration)
        .codec(codec(settings.compression)?)
        .channels(settings.channels.unwrap_or(0).into())
        .downtime_limit(settings.downtime_limit)
        .dirty_log(log);
    let source = if settings.xbzrle { source.xbzrle(QEMU_CACHE) } else { source };
    thread::scope(|scope| {
        let vcpu = scope.spawn(|| guest.run());
        guest.wait_laps(WARM_UP);
        let moved = (|| {
            // The clock starts here.
            let source = source.build().map_err(fail)?;
            let mut precopy = source.connect(&uri.parse().map_err(fail)?).map_err(fail)?;
            while !precopy.converged() {
                precopy.round().map_err(fail)?;
            }
            guest.pause();
            let state = DeviceState::opaque("versus", 1, b"nothing");
            precopy.stop_copy().and_then(|last| last.commit(&state)).map_err(fail)
        })();
        guest.pause();
        vcpu.join().map_err(|_| Failure::new("the guest panicked"))?;
        moved
    })
}

fn codec(compression: Compression) -> Outcome<Arc<dyn Codec>> {
    Ok(match compression {
        Compression::None => Arc::new(Uncompressed),
        Compression::Zlib(level) => Arc::new(multifd_codecs::Zlib::level(level).map_err(fail)?),
        Compression::Zstd(level) => Arc::new(Zstd::level(level).map_err(fail)?),
    })
}

fn fail(error: impl std::error::Error) -> Failure {
    Failure::new(error.to_string())
}

/// One vCPU that does what the boot sector does.
struct Guest {
    memory: HostMemory,
    marker: DirtyMarker,
    set: WorkingSet,
    state: Arc<(Mutex<State>, Condvar)>,
}

#[derive(Default)]
struct State {
    laps: u32,
    paused: bool,
}

impl Guest {
    /// Until it is paused.
    fn run(&self) {
        let (state, changed) = &*self.state;
        let lap = Duration::from_secs(1) / u32::from(self.set.laps_per_second);
        let mut next = Instant::now();
        loop {
            let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
            next = (next + lap).max(Instant::now());
            while !state.paused && Instant::now() < next {
                let left = next.saturating_duration_since(Instant::now());
                state = changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
            }
            if state.paused {
                return;
            }
            state.laps += 1;
            self.lap(state.laps);
            changed.notify_all();
        }
    }

    /// The lap's number in two places of each page.
    fn lap(&self, number: u32) {
        for page in (FIRST_PAGE..).take(self.set.pages as usize) {
            let start = page as usize * PAGE;
            for offset in [start, start + 0x800] {
                if let Some(slice) = self.memory.slice(offset, size_of::<u32>()) {
                    slice.copy_from(&number.to_le_bytes());
                }
            }
            self.marker.mark(0, start as u64, PAGE as u64);
        }
    }

    fn wait_laps(&self, laps: u32) {
        let (state, changed) = &*self.state;
        let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
        while state.laps < laps {
            state = changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Returns when nothing is written any more: a lap that has begun is ended first.
    fn pause(&self) {
        let (state, changed) = &*self.state;
        state.lock().unwrap_or_else(PoisonError::into_inner).paused = true;
        changed.notify_all();
    }
}
