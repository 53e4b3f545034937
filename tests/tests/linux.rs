//! A booted Linux guest comes in from QEMU, is stored on disk, and goes on in another QEMU as if
//! nothing had happened: its files, its clock, its disk and its network.

use std::fs::{self, File};
use std::path::Path;
use std::time::Duration;

use multifd_tests::{
    CheckpointFiles, Compression, During as _, Failure, Linux, Multifd, Outcome, Qemu, QemuBuilder, Receive,
    Scratch, Settings, Side, ram, skip_without_linux,
};

/// Generous: a guest under emulation shares two cores with whatever else runs.
const SOON: Duration = Duration::from_secs(120);

fn settings() -> Settings {
    Settings {
        channels: Some(4),
        compression: Compression::Zstd(1),
        return_path: true,
        ..Settings::default()
    }
}

/// What both tests begin with.
struct Machine {
    scratch: Scratch,
    vm: QemuBuilder,
}

/// What the guest said of itself before it left.
struct Before {
    checksum: String,
    uptime: f64,
    laps: u64,
}

impl Machine {
    fn new() -> Outcome<Self> {
        let scratch = Scratch::new()?;
        let disk = scratch.path("disk");
        File::create(&disk)?.set_len(8 << 20)?;
        let image = Linux::new().build(&scratch)?;
        let vm = Qemu::builder().machine("q35").ram_mib(512).linux(&image).disk(&disk).network();
        Ok(Self { scratch, vm })
    }

    /// Boots it, has it work, and moves it into a checkpoint while it does.
    fn check_in(&self) -> Outcome<(Before, CheckpointFiles)> {
        let mut source = self.vm.spawn("source")?;
        source.wait_linux(SOON)?;
        for command in PREPARE {
            source.run_in_guest(command, SOON)?;
        }
        wait_for_lap(&mut source, 0)?;
        let before = Before {
            checksum: source.run_in_guest("sha256sum /mnt/data", SOON)?,
            uptime: uptime(&mut source)?,
            laps: laps(&mut source)?,
        };
        let out = self.scratch.path("checkpoint");
        let mut receive = Receive::listen("tcp:127.0.0.1:0", &out)?;
        source.set_up(&settings(), Side::Source)?;
        source.migrate(receive.uri())?;
        source.wait_completed(SOON).map_err(|failure| receive.process().explain(failure))?;
        let report = receive.wait_success(SOON)?;
        assert_eq!((report.number("channels")?, report.text("codec")?), (4, "zstd"));
        let checkpoint = CheckpointFiles::open(&out)?;
        ram::check_equal(source.ram(), &checkpoint.block("pc.ram")?)?;
        Ok((before, checkpoint))
    }

    /// Moves a checkpoint into a QEMU, where the guest runs on at once, as it ran before.
    fn check_out(&self, checkpoint: &CheckpointFiles) -> Outcome<Qemu> {
        let mut destination = self.vm.clone().incoming("defer").spawn("destination")?;
        destination.set_up(&settings(), Side::Destination)?;
        let uri = destination.listen("tcp:127.0.0.1:0")?;
        let mut send = Multifd::send(checkpoint.directory(), &uri, &settings())?;
        send.wait_success(SOON).map_err(|failure| destination.explain(failure))?;
        destination.wait_completed(SOON)?;
        assert_eq!(destination.run_state()?, "running");
        Ok(destination)
    }

    /// It remembers, it answers, and its devices work.
    fn goes_on(&self, guest: &mut Qemu, before: &Before) -> Outcome {
        assert_eq!(guest.run_in_guest("sha256sum /mnt/data", SOON)?, before.checksum);
        let (uptime, laps) = (uptime(guest)?, laps(guest)?);
        assert!(uptime >= before.uptime && laps >= before.laps, "{uptime} s, {laps} laps");
        wait_for_lap(guest, before.laps)?;
        // From the disk itself, not from what the guest has cached.
        guest.run_in_guest("echo 3 >/proc/sys/vm/drop_caches", SOON)?;
        assert_eq!(guest.run_in_guest("head -n 1 /dev/vda", SOON)?, "on disk");
        guest.run_in_guest("echo on new disk >/dev/vda; sync", SOON)?;
        assert!(fs::read(self.scratch.path("disk"))?.starts_with(b"on new disk\n"));
        guest.run_in_guest(PING, SOON).map(drop)
    }
}

/// A file in tmpfs that nothing compresses, a line on the disk, a network, and a counter that never
/// stops.
const PREPARE: [&str; 5] = [
    "mkdir /mnt; mount -t tmpfs tmpfs /mnt && dd if=/dev/urandom of=/mnt/data bs=1M count=24",
    "echo on disk >/dev/vda; sync",
    "ip link set eth0 up && ip addr add 10.0.2.15/24 dev eth0",
    PING,
    "(i=0; while :; do i=$((i+1)); echo $i >/mnt/new; mv /mnt/new /mnt/laps; usleep 20000; done) </dev/null &",
];

/// The gateway is QEMU itself: frames go out through the virtio queues and come back.
const PING: &str = "ping -c 2 -W 60 10.0.2.2";

fn uptime(guest: &mut Qemu) -> Outcome<f64> {
    let said = guest.run_in_guest("cut -d' ' -f1 /proc/uptime", SOON)?;
    said.parse().during(said)
}

fn laps(guest: &mut Qemu) -> Outcome<u64> {
    let said = guest.run_in_guest("cat /mnt/laps", SOON)?;
    said.parse().during(said)
}

/// Waits, in the guest, until its counter has gone past `lap`.
fn wait_for_lap(guest: &mut Qemu, lap: u64) -> Outcome {
    let command =
        format!("while ! [ -e /mnt/laps ] || [ $(cat /mnt/laps) -le {lap} ]; do usleep 20000; done");
    guest.run_in_guest(&command, SOON).map(drop)
}

#[test]
fn from_qemu_to_disk_to_qemu() -> Outcome {
    skip_without_linux!();
    let machine = Machine::new()?;
    let (before, checkpoint) = machine.check_in()?;
    let mut guest = machine.check_out(&checkpoint)?;
    machine.goes_on(&mut guest, &before)
}

#[test]
fn from_disk_to_disk_to_qemu() -> Outcome {
    skip_without_linux!();
    let machine = Machine::new()?;
    let (before, checkpoint) = machine.check_in()?;
    let copy = ours_to_ours(&checkpoint, &machine.scratch.path("copy"))?;
    checkpoint.check_equal(&copy)?;
    // The copy has to be enough.
    fs::remove_dir_all(checkpoint.directory())?;
    let mut guest = machine.check_out(&copy)?;
    machine.goes_on(&mut guest, &before)
}

fn ours_to_ours(checkpoint: &CheckpointFiles, out: &Path) -> Outcome<CheckpointFiles> {
    let mut receive = Receive::listen("tcp:127.0.0.1:0", out)?;
    let mut send = Multifd::send(checkpoint.directory(), receive.uri(), &settings())?;
    send.wait_success(SOON).map_err(|failure| receive.process().explain(failure))?;
    receive.wait_success(SOON)?;
    let copy = CheckpointFiles::open(out)?;
    let blocks = copy.blocks()?;
    if blocks.len() < 5 || !blocks.contains(&"pc.bios") {
        return Err(Failure::new(format!("blocks {blocks:?}")));
    }
    Ok(copy)
}
