//! The real QEMU on both sides of us: a running guest comes in, is stored on disk, and goes out, in
//! every way that a stream can be.

use std::fs;
use std::os::unix::fs::FileExt as _;
use std::time::Duration;

use multifd_tests::{
    BootSector, CheckpointFiles, CommandReport, Compression, Failure, Fill, Multifd, Outcome, Qemu,
    QemuBuilder, Receive, Scratch, Settings, Side, ZeroPages, guest, ram, skip_without_qemu,
};

const SOON: Duration = Duration::from_secs(60);

/// How both ends reach each other.
#[derive(Clone, Copy, Debug)]
enum Transport {
    Tcp,
    Unix,
}

impl Transport {
    fn uri(self, scratch: &Scratch, name: &str) -> String {
        match self {
            Self::Tcp => "tcp:127.0.0.1:0".to_owned(),
            Self::Unix => scratch.unix_uri(name),
        }
    }
}

/// One way of moving a guest in and out.
struct Journey {
    scratch: Scratch,
    vm: QemuBuilder,
    settings: Settings,
    transport: Transport,
}

impl Journey {
    fn new(machine: &str, settings: Settings, transport: Transport) -> Outcome<Self> {
        let scratch = Scratch::new()?;
        let floppy = scratch.path("floppy");
        BootSector::new().write_floppy(&floppy)?;
        let vm = Qemu::builder().machine(machine).ram_mib(32).floppy(&floppy);
        Ok(Self { scratch, vm, settings, transport })
    }

    /// In: the checkpoint's RAM is the paused guest's. Out: so is the destination's, and the
    /// guest's count goes on.
    fn run(&self) -> Outcome {
        let mut source = self.vm.clone().fill(Fill::new(1)).spawn("source")?;
        source.serial().wait_lines(2, 0, SOON)?;
        let checkpoint = self.receive(&mut source, "checkpoint")?;
        let destination = self.vm.clone().incoming("defer").paused().spawn("destination")?;
        let destination = self.send(&checkpoint, destination)?;
        self.goes_on(source, destination)
    }

    fn receive(&self, source: &mut Qemu, name: &str) -> Outcome<CheckpointFiles> {
        let checkpoint = self.scratch.path(name);
        let mut receive = Receive::listen(&self.transport.uri(&self.scratch, "in"), &checkpoint)?;
        source.set_up(&self.settings, Side::Source)?;
        source.migrate(receive.uri())?;
        let ended = source.settle(&self.settings, SOON)?;
        if let Err(failure) = ended.check_completed() {
            return Err(receive.process().explain(source.explain(failure)));
        }
        let report = receive.wait_success(SOON)?;
        assert_eq!(report.text("status")?, "completed");
        assert_eq!(report.number("channels")?, u64::from(self.settings.channels.unwrap_or(0)));
        assert!(!self.settings.xbzrle || report.number("pages_xbzrle")? > 0, "{report}");
        assert_eq!(source.run_state()?, "postmigrate");
        let checkpoint = CheckpointFiles::open(&checkpoint)?;
        ram::check_equal(source.ram(), &checkpoint.block("pc.ram")?)?;
        Ok(checkpoint)
    }

    fn send(&self, checkpoint: &CheckpointFiles, mut destination: Qemu) -> Outcome<Qemu> {
        destination.set_up(&self.settings, Side::Destination)?;
        let uri = destination.listen(&self.transport.uri(&self.scratch, "out"))?;
        let mut send = Multifd::send(checkpoint.directory(), &uri, &self.settings)?;
        send.wait_success(SOON).map_err(|failure| destination.explain(failure))?;
        destination.wait_completed(SOON)?;
        assert_eq!(CommandReport::by(&send)?.text("status")?, "completed");
        ram::check_equal(&checkpoint.block("pc.ram")?, destination.ram())?;
        Ok(destination)
    }

    fn goes_on(&self, source: Qemu, mut destination: Qemu) -> Outcome {
        assert_eq!(destination.serial().mark(), 0, "the guest stands still");
        destination.resume()?;
        destination.serial().wait_lines(3, 0, SOON)?;
        let before = source.quit()?;
        let lines = guest::check_sequence(&(before + &destination.quit()?))?;
        assert!(lines > 3, "{lines} lines");
        Ok(())
    }
}

/// One cell of the matrix: a guest comes in and goes out in this way.
fn cell(
    transport: Transport,
    channels: Option<u8>,
    compression: Compression,
    return_path: bool,
    zero_pages: ZeroPages,
) -> Outcome {
    skip_without_qemu!();
    let zero_pages = Some(zero_pages);
    let settings =
        Settings { channels, compression, return_path, zero_pages, min_rounds: 2, ..Settings::default() };
    Journey::new("pc", settings, transport)?.run()
}

/// A test for each return path and zero-page detection over one transport, number of channels and
/// codec: `tcp_2_channels::zlib::return_path::legacy`.
macro_rules! cells {
    ($($name:ident: $transport:ident, $channels:expr, [$($codec:ident: $compression:expr),+];)*) => {
        $(mod $name {
            use super::*;
            $(mod $codec {
                use super::*;
                cells!(@answers no_return_path: false, $transport, $channels, $compression);
                cells!(@answers return_path: true, $transport, $channels, $compression);
            })+
        })*
    };
    (@answers $name:ident: $return_path:literal, $transport:ident, $channels:expr, $compression:expr) => {
        mod $name {
            use super::*;
            cells!(@cell content: None, $return_path, $transport, $channels, $compression);
            cells!(@cell legacy: Legacy, $return_path, $transport, $channels, $compression);
            cells!(@cell multifd: Multifd, $return_path, $transport, $channels, $compression);
        }
    };
    (@cell $name:ident: $zero:ident, $return_path:literal, $transport:ident, $channels:expr, $compression:expr) => {
        #[test]
        fn $name() -> Outcome {
            cell(Transport::$transport, $channels, $compression, $return_path, ZeroPages::$zero)
        }
    };
}

cells! {
    tcp_single: Tcp, None, [none: Compression::None];
    tcp_1_channel: Tcp, Some(1), [none: Compression::None, zlib: Compression::Zlib(1), zstd: Compression::Zstd(1)];
    tcp_2_channels: Tcp, Some(2), [none: Compression::None, zlib: Compression::Zlib(1), zstd: Compression::Zstd(1)];
    tcp_8_channels: Tcp, Some(8), [none: Compression::None, zlib: Compression::Zlib(1), zstd: Compression::Zstd(1)];
    unix_single: Unix, None, [none: Compression::None];
    unix_1_channel: Unix, Some(1), [none: Compression::None, zlib: Compression::Zlib(1), zstd: Compression::Zstd(1)];
    unix_2_channels: Unix, Some(2), [none: Compression::None, zlib: Compression::Zlib(1), zstd: Compression::Zstd(1)];
    unix_8_channels: Unix, Some(8), [none: Compression::None, zlib: Compression::Zlib(1), zstd: Compression::Zstd(1)];
}

#[test]
fn xbzrle_in_several_rounds() -> Outcome {
    skip_without_qemu!();
    // A difference needs an older copy, and QEMU switches over as soon as the guest has written
    // nothing for a round: its 128 pages take 128 ms, in which also a busy host gives it some CPU.
    let max_bandwidth = 4 << 20;
    let settings = Settings {
        xbzrle: true,
        return_path: true,
        min_rounds: 8,
        fewer_rounds_allowed: true,
        max_bandwidth,
        ..Settings::default()
    };
    let mut journey = Journey::new("pc", settings, Transport::Unix)?;
    journey.vm = journey.vm.ram_mib(12);
    journey.run()
}

/// Older machine types bring older rules: sync points at section ends up to 8.0, zero pages on main
/// up to 8.2, no SWITCHOVER_START up to 9.2.
fn older_machine(machine: &str, channels: Option<u8>) -> Outcome {
    skip_without_qemu!();
    let settings = Settings { channels, return_path: true, min_rounds: 2, ..Settings::default() };
    Journey::new(machine, settings, Transport::Tcp)?.run()
}

macro_rules! machines {
    ($($name:ident: $machine:literal;)*) => {
        $(mod $name {
            use super::*;

            #[test]
            fn single() -> Outcome {
                older_machine($machine, None)
            }

            #[test]
            fn two_channels() -> Outcome {
                older_machine($machine, Some(2))
            }
        })*
    };
}

machines! {
    machine_7_2: "pc-q35-7.2";
    machine_8_0: "pc-q35-8.0";
    machine_8_2: "pc-q35-8.2";
    machine_9_0: "pc-q35-9.0";
    machine_9_2: "pc-q35-9.2";
    machine_10_0: "pc-q35-10.0";
}

/// Where a PC's firmware is: the end of the memory below 4 GiB.
const FIRMWARE: u64 = (4 << 30) - FIRMWARE_LEN;
const FIRMWARE_LEN: u64 = 256 << 10;

/// Below the hole for graphics memory and adapters' ROMs.
const LOW_MEMORY_LEN: u64 = 640 << 10;

/// Fails unless what the guest has at `address` is what the block begins with.
fn check_memory(
    qemu: &mut Qemu,
    (address, len): (u64, u64),
    checkpoint: &CheckpointFiles,
    block: &str,
) -> Outcome {
    let path = qemu.scratch().path("memory");
    qemu.save_memory(address, len, &path)?;
    let mut expected = vec![0; usize::try_from(len)?];
    fs::File::open(checkpoint.block(block)?)?.read_exact_at(&mut expected, 0)?;
    if fs::read(&path)? == expected {
        return Ok(());
    }
    Err(Failure::new(format!("{len} bytes at {address:#x} are not those of {block} in the checkpoint")))
}

impl Journey {
    /// In, out, and in again. What the guest sees of its firmware and low memory is in the
    /// checkpoint, and every block of the destination is the source's.
    fn firmware(&self, mut source: Qemu, destination: Qemu, block: &str) -> Outcome<CheckpointFiles> {
        source.serial().wait_lines(2, 0, SOON)?;
        let checkpoint = self.receive(&mut source, "checkpoint")?;
        let check = |qemu: &mut Qemu| {
            check_memory(qemu, (FIRMWARE, FIRMWARE_LEN), &checkpoint, block)?;
            check_memory(qemu, (0, LOW_MEMORY_LEN), &checkpoint, "pc.ram")
        };
        check(&mut source)?;
        let mut destination = self.send(&checkpoint, destination)?;
        check(&mut destination)?;
        // What it has got is seen in what it sends.
        let back = self.receive(&mut destination, "back")?;
        assert_eq!(back.blocks()?, checkpoint.blocks()?);
        for block in checkpoint.blocks()? {
            ram::check_equal(&checkpoint.block(block)?, &back.block(block)?)?;
        }
        self.goes_on(source, destination)?;
        Ok(checkpoint)
    }
}

/// Firmware is a RAM block like any other. One in flash is also in a destination's memory before
/// ours arrives, and has to go, zero pages included: here it has set bytes everywhere.
fn firmware(channels: Option<u8>) -> Outcome {
    skip_without_qemu!();
    let settings = Settings { channels, return_path: true, ..Settings::default() };
    let journey = Journey::new("pc", settings.clone(), Transport::Unix)?;
    let destination = || journey.vm.clone().incoming("defer").paused();
    let source = journey.vm.spawn("source")?;
    let checkpoint = journey.firmware(source, destination().spawn("destination")?, "pc.bios")?;

    let content = fs::read(checkpoint.block("pc.bios")?)?;
    assert!(content.chunks(4096).any(|page| page.iter().all(|byte| *byte == 0)), "no zero page to clear");
    let flash = |name: &str, content: &[u8]| {
        let file = journey.scratch.path(name);
        fs::write(&file, content)?;
        Ok::<_, Failure>(format!("if=pflash,format=raw,read-only=on,file={}", file.display()))
    };
    let (ours, theirs) = (flash("flash", &content)?, flash("other-flash", &vec![0xee; content.len()])?);
    let source = journey.vm.clone().argument("-drive").argument(ours).spawn("source")?;
    let destination = destination().argument("-drive").argument(theirs).spawn("destination")?;
    let again = Journey { scratch: Scratch::new()?, vm: journey.vm.clone(), settings, ..journey };
    again.firmware(source, destination, "system.flash0").map(drop)
}

#[test]
fn firmware_on_the_main_channel() -> Outcome {
    firmware(None)
}

#[test]
fn firmware_beside_parallel_channels() -> Outcome {
    firmware(Some(2))
}
