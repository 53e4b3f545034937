//! The real QEMU on both sides of us: a running guest comes in, lies on disk, and goes out, in every way that a stream can be.

use std::path::{Path, PathBuf};
use std::time::Duration;

use multifd_tests::{
    BootSector, Compression, Fill, Multifd, Outcome, Process, Qemu, QemuBuilder, Scratch, Settings, Side,
    ZeroPages, guest, ram, skip_without_qemu,
};
use serde_json::Value;

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

    /// In: the checkpoint's RAM is the paused guest's. Out: so is the destination's, and the guest's count goes on.
    fn run(&self) -> Outcome {
        let mut source = self.vm.clone().fill(Fill::new(1)).spawn("source")?;
        source.serial().wait_lines(2, 0, SOON)?;
        let checkpoint = self.receive(&mut source)?;
        let destination = self.send(&checkpoint, source.ram())?;
        self.goes_on(source, destination)
    }

    fn receive(&self, source: &mut Qemu) -> Outcome<PathBuf> {
        let checkpoint = self.scratch.path("checkpoint");
        let (mut receive, uri) = receive_into(&self.transport.uri(&self.scratch, "in"), &checkpoint)?;
        source.set_up(&self.settings, Side::Source)?;
        source.migrate(&uri)?;
        let ended = source.settle(&self.settings, SOON)?;
        if let Err(failure) = ended.check_completed() {
            return Err(receive.explain(source.explain(failure)));
        }
        receive.wait_success(SOON)?;
        let report = json(&receive)?;
        assert_eq!(report["status"], "completed");
        assert_eq!(report["channels"], self.settings.channels.unwrap_or(0));
        assert_eq!(source.run_state()?, "postmigrate");
        ram::check_equal(source.ram(), &ram_file(&checkpoint, "pc.ram"))?;
        if self.settings.xbzrle {
            assert!(report["pages_xbzrle"].as_u64() > Some(0), "{report}");
        }
        Ok(checkpoint)
    }

    fn send(&self, checkpoint: &Path, expected: &Path) -> Outcome<Qemu> {
        let mut destination = self.vm.clone().incoming("defer").paused().spawn("destination")?;
        destination.set_up(&self.settings, Side::Destination)?;
        let uri = destination.listen(&self.transport.uri(&self.scratch, "out"))?;
        let mut arguments: Vec<String> =
            vec!["send".into(), checkpoint.display().to_string(), uri, "--json".into()];
        if let Some(channels) = self.settings.channels {
            let codec = match self.settings.compression {
                Compression::None => "none".to_owned(),
                Compression::Zlib(level) => format!("zlib:{level}"),
                Compression::Zstd(level) => format!("zstd:{level}"),
            };
            arguments.extend(["--channels".into(), channels.to_string(), "--codec".into(), codec]);
        }
        if !self.settings.return_path {
            arguments.push("--no-return-path".into());
        }
        if let Some(zero_pages) = self.settings.zero_pages {
            arguments.extend(["--zero-page-detection".into(), zero_pages.name().into()]);
        }
        let mut send = Multifd::spawn("send", arguments)?;
        send.wait_success(SOON).map_err(|failure| destination.explain(failure))?;
        destination.wait_completed(SOON)?;
        assert_eq!(json(&send)?["status"], "completed");
        ram::check_equal(expected, destination.ram())?;
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

fn receive_into(uri: &str, checkpoint: &Path) -> Outcome<(Process, String)> {
    let out = checkpoint.display().to_string();
    let receive = Multifd::spawn("receive", ["receive", uri, "--out", &out, "--json"])?;
    let uri = receive.stderr().wait_until("the address", SOON, |said| {
        let said = std::str::from_utf8(said).ok()?;
        let line = said.strip_suffix('\n')?.lines().find_map(|line| line.strip_prefix("listening on "))?;
        Some(line.to_owned())
    })?;
    Ok((receive, uri))
}

fn json(process: &Process) -> Outcome<Value> {
    let stdout = process.stdout()?;
    stdout.settle(SOON);
    Ok(serde_json::from_str(&stdout.text())?)
}

/// The file with the content of a block of a checkpoint.
fn ram_file(checkpoint: &Path, block: &str) -> PathBuf {
    let manifest = std::fs::read(checkpoint.join("manifest.json")).unwrap();
    let manifest: Value = serde_json::from_slice(&manifest).unwrap();
    let blocks = manifest["blocks"].as_array().unwrap();
    let block = blocks.iter().find(|entry| entry["idstr"] == block);
    checkpoint.join(block.expect("the block is in the manifest")["file"].as_str().unwrap())
}

const CODECS: [Compression; 3] = [Compression::None, Compression::Zlib(1), Compression::Zstd(1)];
const DETECTIONS: [ZeroPages; 3] = [ZeroPages::None, ZeroPages::Legacy, ZeroPages::Multifd];

/// Every codec, return path and zero-page detection over one transport and number of channels.
fn every_way(transport: Transport, channels: Option<u8>) -> Outcome {
    skip_without_qemu!();
    let codecs = if channels.is_some() { &CODECS[..] } else { &CODECS[..1] };
    for &compression in codecs {
        for return_path in [false, true] {
            for zero_pages in DETECTIONS {
                let settings = Settings {
                    channels,
                    compression,
                    return_path,
                    zero_pages: Some(zero_pages),
                    min_rounds: 2,
                    ..Settings::default()
                };
                let way = format!("{transport:?} {settings:?}");
                Journey::new("pc", settings, transport)?
                    .run()
                    .unwrap_or_else(|failure| panic!("{way}: {failure}"));
            }
        }
    }
    Ok(())
}

macro_rules! ways {
    ($($name:ident: $transport:ident, $channels:expr;)*) => {
        $(#[test] fn $name() -> Outcome { every_way(Transport::$transport, $channels) })*
    };
}

ways! {
    tcp_single: Tcp, None;
    tcp_1_channel: Tcp, Some(1);
    tcp_2_channels: Tcp, Some(2);
    tcp_8_channels: Tcp, Some(8);
    unix_single: Unix, None;
    unix_1_channel: Unix, Some(1);
    unix_2_channels: Unix, Some(2);
    unix_8_channels: Unix, Some(8);
}

#[test]
fn xbzrle_in_several_rounds() -> Outcome {
    skip_without_qemu!();
    // Slow enough for the guest to write its pages again in every round: a difference needs an older copy.
    let max_bandwidth = 48 << 20;
    let settings = Settings { xbzrle: true, return_path: true, min_rounds: 8, max_bandwidth, ..Settings::default() };
    // QEMU switches over when the guest wrote nothing between two looks, as one that gets no CPU does: then once more.
    let mut result = Ok(());
    for _ in 0..5 {
        result = Journey::new("pc", settings.clone(), Transport::Unix)?.run();
        match &result {
            Err(failure) if failure.to_string().contains("migration rounds, asked for") => {}
            _ => break,
        }
    }
    result
}

/// Older machine types bring older rules: sync points at section ends up to 8.0, zero pages on main up to 8.2, no
/// SWITCHOVER_START up to 9.2.
fn older_machine(machine: &str) -> Outcome {
    skip_without_qemu!();
    for channels in [None, Some(2)] {
        let settings = Settings { channels, return_path: true, min_rounds: 2, ..Settings::default() };
        Journey::new(machine, settings, Transport::Tcp)?
            .run()
            .unwrap_or_else(|failure| panic!("{machine} {channels:?}: {failure}"));
    }
    Ok(())
}

macro_rules! machines {
    ($($name:ident: $machine:literal;)*) => {
        $(#[test] fn $name() -> Outcome { older_machine($machine) })*
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
