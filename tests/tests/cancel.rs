//! The operator cancels while a guest moves: the guest runs on where it was, and nothing is
//! left behind.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use multifd_tests::process::Signal;
use multifd_tests::{
    BootSector, CheckpointFiles, CommandReport, Compression, Failure, Fill, Multifd, Outcome, Qemu,
    QemuBuilder, Receive, Scratch, Settings, Side, guest, ram, skip_without_qemu,
};

const SOON: Duration = Duration::from_secs(60);

/// Exit codes of the command.
const FAILED: i32 = 1;
const CANCELLED: i32 = 130;

/// Bytes a second at which a migration has a middle: it would take a quarter of a minute.
const SLOW: u64 = 2 << 20;

/// A guest that counts, and a folder for what is received.
struct Machine {
    scratch: Scratch,
    vm: QemuBuilder,
    settings: Settings,
}

impl Machine {
    fn new(settings: &Settings) -> Outcome<Self> {
        let scratch = Scratch::new()?;
        let floppy = scratch.path("floppy");
        BootSector::new().write_floppy(&floppy)?;
        fs::create_dir(scratch.path("out"))?;
        let vm = Qemu::builder().ram_mib(64).floppy(&floppy);
        Ok(Self { scratch, vm, settings: settings.clone() })
    }

    fn source(&self) -> Outcome<Qemu> {
        let source = self.vm.clone().fill(Fill::new(5)).spawn("source")?;
        source.serial().wait_lines(2, 0, SOON)?;
        Ok(source)
    }

    fn checkpoint(&self) -> PathBuf {
        self.scratch.path("out").join("checkpoint")
    }

    /// Starts a migration into `multifd receive`, and returns when a part of it is there.
    fn begin(&self, source: &mut Qemu) -> Outcome<Receive> {
        let receive = Receive::listen("tcp:127.0.0.1:0", &self.checkpoint())?;
        source.set_up(&Settings { max_bandwidth: SLOW, ..self.settings.clone() }, Side::Source)?;
        source.migrate(receive.uri())?;
        source.wait_transferred(SLOW / 2, SOON)?;
        assert!(!self.left_behind()?.is_empty(), "a checkpoint in the making");
        Ok(receive)
    }

    /// Runs a migration into `multifd receive` to its end.
    fn complete(&self, source: &mut Qemu) -> Outcome<CheckpointFiles> {
        let mut receive = Receive::listen("tcp:127.0.0.1:0", &self.checkpoint())?;
        source.set_up(&self.settings, Side::Source)?;
        source.migrate(receive.uri())?;
        source.wait_completed(SOON).map_err(|failure| receive.process().explain(failure))?;
        receive.wait_success(SOON)?;
        let checkpoint = CheckpointFiles::open(&self.checkpoint())?;
        ram::check_equal(source.ram(), &checkpoint.block("pc.ram")?)?;
        Ok(checkpoint)
    }

    /// What is in the folder for checkpoints.
    fn left_behind(&self) -> Outcome<Vec<PathBuf>> {
        let entries = fs::read_dir(self.scratch.path("out"))?;
        Ok(entries.map(|entry| entry.map(|entry| entry.path())).collect::<Result<_, _>>()?)
    }

    /// The command ends with this code, says why, and leaves nothing.
    fn check_gone(&self, receive: &mut Receive, code: i32) -> Outcome {
        let status = receive.process().wait(SOON)?;
        assert_eq!(status.code(), Some(code), "{}", receive.process().explain("ended"));
        let report = CommandReport::by(receive.process())?;
        let expected = if code == CANCELLED { "cancelled" } else { "failed" };
        assert_eq!(report.text("status")?, expected, "{report}");
        assert!(!report.text("error")?.is_empty(), "{report}");
        let left = self.left_behind()?;
        if left.is_empty() { Ok(()) } else { Err(Failure::new(format!("left behind: {left:?}"))) }
    }
}

/// The guest runs, and goes on counting where it was.
fn check_runs(qemu: &mut Qemu) -> Outcome {
    assert_eq!(qemu.run_state()?, "running");
    qemu.serial().wait_lines(3, qemu.serial().mark(), SOON)?;
    guest::check_sequence(&qemu.serial().text()).map(drop)
}

fn ways() -> [Settings; 4] {
    let single = Settings::default();
    let parallel = Settings { channels: Some(3), compression: Compression::Zstd(1), ..Settings::default() };
    [
        Settings { return_path: true, ..single.clone() },
        single,
        Settings { return_path: true, ..parallel.clone() },
        parallel,
    ]
}

#[test]
fn qemu_cancels() -> Outcome {
    skip_without_qemu!();
    for settings in ways() {
        let machine = Machine::new(&settings)?;
        let mut source = machine.source()?;
        let mut receive = machine.begin(&mut source)?;
        source.cancel()?;
        assert_eq!(source.wait_end(SOON)?.status, "cancelled");
        machine.check_gone(&mut receive, FAILED)?;
        check_runs(&mut source)?;
        machine.complete(&mut source)?;
    }
    Ok(())
}

#[test]
fn receive_is_interrupted() -> Outcome {
    skip_without_qemu!();
    for settings in ways() {
        let machine = Machine::new(&settings)?;
        let mut source = machine.source()?;
        let mut receive = machine.begin(&mut source)?;
        receive.process().signal(Signal::INT)?;
        machine.check_gone(&mut receive, CANCELLED)?;
        assert_eq!(source.wait_end(SOON)?.status, "failed");
        check_runs(&mut source)?;
        machine.complete(&mut source)?;
    }
    Ok(())
}

#[test]
fn receive_is_interrupted_before_anybody_connects() -> Outcome {
    let machine = Machine::new(&Settings::default())?;
    let mut receive = Receive::listen("tcp:127.0.0.1:0", &machine.checkpoint())?;
    receive.process().signal(Signal::INT)?;
    machine.check_gone(&mut receive, CANCELLED)
}

#[test]
fn receive_is_killed() -> Outcome {
    skip_without_qemu!();
    let machine = Machine::new(&Settings { return_path: true, ..Settings::default() })?;
    let mut source = machine.source()?;
    let mut receive = machine.begin(&mut source)?;
    receive.process().kill();
    assert_eq!(source.wait_end(SOON)?.status, "failed");
    check_runs(&mut source)?;
    // Nothing could clean up, but nothing that looks like a checkpoint is there, and the next one
    // has its place.
    assert!(!machine.checkpoint().exists());
    machine.complete(&mut source)?;
    // The guest's RAM that the first one left is gone.
    assert_eq!(machine.left_behind()?, [machine.checkpoint()]);
    Ok(())
}

#[test]
fn send_is_interrupted() -> Outcome {
    skip_without_qemu!();
    for settings in ways() {
        let machine = Machine::new(&settings)?;
        let mut source = machine.source()?;
        let checkpoint = machine.complete(&mut source)?;
        let destination = machine.vm.clone().incoming("defer").paused();
        let listen = || {
            let mut destination = destination.spawn("destination")?;
            destination.set_up(&settings, Side::Destination)?;
            let uri = destination.listen("tcp:127.0.0.1:0")?;
            Ok::<_, Failure>((destination, uri))
        };
        let (mut qemu, uri) = listen()?;
        let slow = Settings { max_bandwidth: SLOW, ..settings.clone() };
        let mut send = Multifd::send(checkpoint.directory(), &uri, &slow)?;
        qemu.wait_status("active", SOON)?;
        send.signal(Signal::INT)?;
        assert_eq!(send.wait(SOON)?.code(), Some(CANCELLED), "{}", send.explain("ended"));
        assert_eq!(CommandReport::by(&send)?.text("status")?, "cancelled");
        assert_eq!(qemu.wait_end(SOON)?.status, "failed");

        let (mut qemu, uri) = listen()?;
        Multifd::send(checkpoint.directory(), &uri, &settings)?.wait_success(SOON)?;
        qemu.wait_completed(SOON)?;
        ram::check_equal(source.ram(), qemu.ram())?;
        qemu.resume()?;
        qemu.serial().wait_lines(3, 0, SOON)?;
        guest::check_sequence(&(source.quit()? + &qemu.quit()?))?;
    }
    Ok(())
}
