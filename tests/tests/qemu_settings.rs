//! A QEMU at the other end that is set differently: the error says which settings to compare, and
//! the guest stays; or the difference is none that matters, and the guest arrives.

#![allow(clippy::unwrap_used, reason = "test code may panic")]

use std::path::{Path, PathBuf};
use std::time::Duration;

use multifd_tests::{
    BootSector, CheckpointFiles, Compression, Failure, Fill, Multifd, Outcome, Qemu, QemuBuilder, Receive,
    Scratch, Settings, Side, ram, skip_without_qemu,
};
use serde_json::Value;

const SOON: Duration = Duration::from_secs(60);

/// That of a command whose peer waits for something that it is not set to do.
const TIMEOUT: &str = "3s";

/// What is set at one end.
#[derive(Clone, Default)]
struct Set {
    channels: Option<u8>,
    compression: Option<Compression>,
    capabilities: Vec<&'static str>,
}

impl Set {
    fn channels(channels: u8) -> Self {
        Self { channels: Some(channels), ..Self::default() }
    }

    fn capability(name: &'static str) -> Self {
        Self { capabilities: vec![name], ..Self::default() }
    }

    fn settings(&self) -> Settings {
        Settings {
            channels: self.channels,
            compression: self.compression.unwrap_or(Compression::None),
            return_path: true,
            capabilities: self.capabilities.clone(),
            ..Settings::default()
        }
    }
}

fn vm(scratch: &Scratch) -> Outcome<QemuBuilder> {
    let floppy = scratch.path("floppy");
    BootSector::new().write_floppy(&floppy)?;
    Ok(Qemu::builder().ram_mib(16).floppy(&floppy))
}

fn running(scratch: &Scratch) -> Outcome<Qemu> {
    let source = vm(scratch)?.fill(Fill::new(1)).spawn("source")?;
    source.serial().wait_lines(1, 0, SOON)?;
    Ok(source)
}

/// A guest of QEMU, as a checkpoint.
fn checkpoint(scratch: &Scratch) -> Outcome<PathBuf> {
    let out = scratch.path("checkpoint");
    let mut source = running(scratch)?;
    source.set_up(&Set::default().settings(), Side::Source)?;
    let mut receive = Receive::listen("tcp:127.0.0.1:0", &out)?;
    source.migrate(receive.uri())?;
    source.wait_completed(SOON)?;
    receive.wait_success(SOON)?;
    Ok(out)
}

/// What `multifd send` said at its end to a QEMU that is set so: exit code and report.
fn sent(checkpoint: &Path, ours: &Set, there: &QemuBuilder, theirs: &Set) -> Outcome<(Option<i32>, Value)> {
    let mut destination = there.clone().incoming("defer").paused().spawn("destination")?;
    destination.set_up(&theirs.settings(), Side::Destination)?;
    let uri = destination.listen("tcp:127.0.0.1:0")?;
    let mut send = Multifd::send_with(checkpoint, &uri, &ours.settings(), &["--timeout", TIMEOUT])?;
    let (status, _) = send.wait_end(SOON)?;
    send.stdout()?.settle(SOON);
    let report: Value = serde_json::from_str(&send.stdout()?.text())?;
    if status.success() {
        destination.wait_completed(SOON)?;
        ram::check_equal(&CheckpointFiles::open(checkpoint)?.block("pc.ram")?, destination.ram())?;
    }
    Ok((status.code(), report))
}

#[test]
fn a_source_to_a_qemu_that_is_set_differently_says_what_to_compare() -> Outcome {
    skip_without_qemu!();
    let scratch = Scratch::new()?;
    let checkpoint = checkpoint(&scratch)?;
    let same = vm(&scratch)?;
    let zlib = Set { compression: Some(Compression::Zlib(1)), ..Set::channels(2) };
    let zstd = Set { compression: Some(Compression::Zstd(1)), ..Set::channels(2) };
    let cases = [
        ("multifd there only", Set::default(), same.clone(), Set::channels(2), "capability multifd off"),
        ("multifd here only", Set::channels(2), same.clone(), Set::default(), "multifd-channels 2"),
        ("more channels there", Set::channels(2), same.clone(), Set::channels(3), "multifd-channels 2"),
        ("more channels here", Set::channels(3), same.clone(), Set::channels(2), "multifd-channels 3"),
        ("another codec", zlib, same.clone(), zstd, "multifd-compression zlib"),
        (
            "another machine type",
            Set::default(),
            same.clone().machine("q35"),
            Set::default(),
            "machine pc-i440fx",
        ),
        ("more RAM", Set::default(), same.clone().ram_mib(32), Set::default(), "pc.ram 16.0 MiB"),
    ];
    for (what, ours, there, theirs, says) in cases {
        let (code, report) = sent(&checkpoint, &ours, &there, &theirs)?;
        let hint = report["hint"].as_str().unwrap_or_default();
        if code != Some(1) || !hint.contains(says) || !hint.contains("The destination's own log says why") {
            return Err(Failure::new(format!("{what}: exit code {code:?}, expected {says:?} in {report:#}")));
        }
    }
    Ok(())
}

#[test]
fn a_capability_that_is_on_at_a_qemu_destination_and_not_used_hinders_nothing() -> Outcome {
    skip_without_qemu!();
    let scratch = Scratch::new()?;
    let checkpoint = checkpoint(&scratch)?;
    let same = vm(&scratch)?;
    for capability in ["postcopy-ram", "dirty-bitmaps", "late-block-activate"] {
        let (code, report) = sent(&checkpoint, &Set::default(), &same, &Set::capability(capability))?;
        assert_eq!(code, Some(0), "{capability}: {report:#}");
    }
    Ok(())
}

/// What `multifd receive` said at its end to a QEMU that is set so; whether the guest is here.
fn received(flags: &[&str], theirs: &Set) -> Outcome<(Option<i32>, String)> {
    let scratch = Scratch::new()?;
    let out = scratch.path("checkpoint");
    let mut source = running(&scratch)?;
    source.set_up(&theirs.settings(), Side::Source)?;
    let flags = [&["--timeout", TIMEOUT], flags].concat();
    let receive = Receive::listen_with("tcp:127.0.0.1:0", &out, &flags)?;
    source.migrate(receive.uri())?;
    let mut receive = receive.into_process();
    let (status, _) = receive.wait_end(SOON)?;
    receive.stderr().settle(SOON);
    let report = source.wait_end(SOON)?;
    match status.code() {
        Some(0) => {
            report.check_completed()?;
            ram::check_equal(source.ram(), &CheckpointFiles::open(&out)?.block("pc.ram")?)?;
        }
        code => {
            let state = source.run_state()?;
            assert_eq!((state.as_str(), out.exists()), ("running", false), "{code:?}");
        }
    }
    Ok((status.code(), receive.stderr().text()))
}

#[test]
fn a_destination_that_is_set_differently_than_its_qemu_says_what_it_expected() -> Outcome {
    skip_without_qemu!();
    let zstd = Set { compression: Some(Compression::Zstd(1)), ..Set::channels(2) };
    for (what, flags, theirs, says) in [
        ("multifd here only", &["--channels", "2"][..], Set::default(), "channel 0 (never came)"),
        ("more channels here", &["--channels", "3"], Set::channels(2), "channel 2 (never came)"),
        ("more channels there", &["--channels", "2"], Set::channels(3), "channel id 2, expected 0..2"),
        ("another codec", &["--codec", "zlib"], zstd, "packet with codec 0x4 (zstd); known here: zlib"),
    ] {
        let (code, stderr) = received(flags, &theirs)?;
        if code != Some(1) || !stderr.contains(says) {
            return Err(Failure::new(format!("{what}: exit code {code:?}, expected {says:?}: {stderr}")));
        }
    }
    Ok(())
}

#[test]
fn a_capability_that_is_on_at_a_qemu_source_and_not_used_hinders_nothing() -> Outcome {
    skip_without_qemu!();
    for capability in ["postcopy-ram", "dirty-bitmaps"] {
        let (code, stderr) = received(&[], &Set::capability(capability))?;
        assert_eq!(code, Some(0), "{capability}: {stderr}");
    }
    Ok(())
}
