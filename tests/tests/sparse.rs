//! A guest whose RAM is mostly untouched costs what it has touched: on disk, on the wire, and in
//! the sender's memory.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::Duration;

use multifd_tests::{
    BootSector, CheckpointFiles, CommandReport, Compression, Multifd, Outcome, Process, Qemu, QemuBuilder,
    Receive, Scratch, Settings, Side, Usage, ram, skip, skip_without_qemu,
};

const SOON: Duration = Duration::from_secs(120);

const RAM_MIB: u32 = 4096;
const PAGES: u64 = (RAM_MIB as u64) << 8;

/// What the guest writes to: 64 MiB from 16 MiB on.
const FIRST_PAGE: u32 = 0x1000;
const TOUCHED_PAGES: u32 = 0x4000;
const TOUCHED: u64 = (TOUCHED_PAGES as u64) << 12;

/// What the firmware and the other blocks come to, at most.
const FIRMWARE: u64 = 4 << 20;

/// A zero page costs 8 bytes in its packet, and its share of the packet's header, or 9 bytes on the
/// main channel.
const ZERO_PAGE: u64 = 11;

/// A QEMU that migrates looks at all of its RAM, which gives memory to every page of a file in
/// memory.
const MEMORY_NEEDED: u64 = 6 << 30;

fn settings(channels: Option<u8>) -> Settings {
    // The guest writes all of its 64 MiB all the time: that is few enough for the switch-over.
    let downtime_limit = SOON;
    Settings { channels, return_path: true, downtime_limit, ..Settings::default() }
}

#[test]
fn untouched_memory_costs_nothing() -> Outcome {
    skip_without_qemu!();
    let available = memory_available()?;
    if available < MEMORY_NEEDED {
        skip!("{} MiB of memory available, {} needed", available >> 20, MEMORY_NEEDED >> 20);
    }
    let scratch = Scratch::new()?;
    let floppy = scratch.path("floppy");
    BootSector::new().pages(FIRST_PAGE, TOUCHED_PAGES).laps_per_second(19).write_floppy(&floppy)?;
    let vm = Qemu::builder().ram_mib(RAM_MIB).floppy(&floppy);

    let checkpoint = check_in(&vm, &scratch.path("checkpoint"))?;
    let size = check_sparse(&checkpoint)?;
    // On a real file system, and not only in one that is in memory.
    let disk = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    for (channels, out) in [(None, scratch.path("copy")), (Some(2), disk.path().join("copy"))] {
        let copy = ours_to_ours(&checkpoint, &out, &settings(channels))?;
        check_sparse(&copy)?;
        checkpoint.check_equal(&copy)?;
    }
    into_qemu(&checkpoint, &vm)?;
    // Reading a hole through a mapping would have filled it: no sender has.
    assert_eq!(stored(&checkpoint)?, size);
    Ok(())
}

/// Boots the guest and moves it into a checkpoint.
fn check_in(vm: &QemuBuilder, out: &Path) -> Outcome<CheckpointFiles> {
    let mut source = vm.spawn("source")?;
    source.serial().wait_lines(2, 0, SOON)?;
    let mut receive = Receive::listen("tcp:127.0.0.1:0", out)?;
    source.set_up(&settings(Some(2)), Side::Source)?;
    source.migrate(receive.uri())?;
    source.wait_completed(SOON).map_err(|failure| receive.process().explain(failure))?;
    receive.wait_success(SOON)?;
    let checkpoint = CheckpointFiles::open(out)?;
    ram::check_equal(source.ram(), &checkpoint.block("pc.ram")?)?;
    Ok(checkpoint)
}

fn ours_to_ours(checkpoint: &CheckpointFiles, out: &Path, settings: &Settings) -> Outcome<CheckpointFiles> {
    let mut receive = Receive::listen("tcp:127.0.0.1:0", out)?;
    let mut send = Multifd::send(checkpoint.directory(), receive.uri(), settings)?;
    check_sender(&mut send).map_err(|failure| receive.process().explain(failure))?;
    check_small(receive.process().wait_usage(SOON)?);
    CheckpointFiles::open(out)
}

/// Over parallel channels: on a single one, QEMU looks at every page before it clears it.
fn into_qemu(checkpoint: &CheckpointFiles, vm: &QemuBuilder) -> Outcome {
    let settings = Settings { compression: Compression::None, ..settings(Some(4)) };
    let mut destination = vm.clone().incoming("defer").paused().spawn("destination")?;
    destination.set_up(&settings, Side::Destination)?;
    let uri = destination.listen("tcp:127.0.0.1:0")?;
    let mut send = Multifd::send(checkpoint.directory(), &uri, &settings)?;
    check_sender(&mut send).map_err(|failure| destination.explain(failure))?;
    destination.wait_completed(SOON)?;
    ram::check_equal(&checkpoint.block("pc.ram")?, destination.ram())?;
    assert!(stored_bytes(destination.ram())? < TOUCHED + FIRMWARE);
    destination.resume()?;
    destination.serial().wait_lines(2, 0, SOON)
}

/// The sender sends and looks at what the guest has touched, and no more.
fn check_sender(send: &mut Process) -> Outcome {
    let usage = send.wait_usage(SOON)?;
    let report = CommandReport::by(send)?;
    println!("{usage:?} {report}");
    assert!(report.number("ram_bytes")? >= PAGES << 12, "{report}");
    assert!(report.number("pages_normal")? << 12 < TOUCHED + FIRMWARE, "{report}");
    assert!(report.number("pages_normal")? + report.number("pages_zero")? >= PAGES, "{report}");
    assert!(report.number("wire_bytes")? < TOUCHED + FIRMWARE + PAGES * ZERO_PAGE, "{report}");
    check_small(usage);
    Ok(())
}

fn check_small(usage: Usage) {
    // Twice what has to be: the program itself, its buffers.
    assert!(usage.minor_faults < 2 * u64::from(TOUCHED_PAGES), "{usage:?}");
    assert!(usage.peak_resident_bytes < 2 * TOUCHED, "{usage:?}");
}

/// The RAM file has its full length, and room on disk for what was touched. Gives that room.
fn check_sparse(checkpoint: &CheckpointFiles) -> Outcome<u64> {
    assert_eq!(fs::metadata(checkpoint.block("pc.ram")?)?.len(), PAGES << 12);
    let stored = stored(checkpoint)?;
    assert!((TOUCHED..TOUCHED + FIRMWARE).contains(&stored), "{stored} bytes on disk");
    Ok(stored)
}

fn stored(checkpoint: &CheckpointFiles) -> Outcome<u64> {
    stored_bytes(&checkpoint.block("pc.ram")?)
}

/// Bytes that the file takes in its file system.
fn stored_bytes(file: &Path) -> Outcome<u64> {
    const BLOCK: u64 = 512;
    Ok(fs::metadata(file)?.blocks() * BLOCK)
}

fn memory_available() -> Outcome<u64> {
    let meminfo = fs::read_to_string("/proc/meminfo")?;
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:")).unwrap_or_default();
    let kib: u64 = line.trim().trim_end_matches(" kB").parse()?;
    Ok(kib << 10)
}
