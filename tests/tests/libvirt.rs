//! Images of `virsh save`: laid out as libvirt does it, with a stream of the real QEMU in them,
//! read in every format; and images of ours, which QEMU loads as `virsh restore` has it do.
#![allow(clippy::indexing_slicing, clippy::unwrap_used, reason = "test code may panic")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use multifd_tests::{
    BootSector, CheckpointFiles, CommandReport, Fill, Multifd, Outcome, Qemu, QemuBuilder, Scratch, Settings,
    Side, ram, skip_without_qemu,
};
use serde_json::Value;

const SOON: Duration = Duration::from_secs(60);

/// Where libvirt's padding ends, as a rule.
const STREAM: usize = 92 + 67_247;

const XML: &str = "<domain type='qemu'>\n  <name>guest</name>\n</domain>\n";

/// The header of an image in the format of this number.
fn header(format: u32) -> Vec<u8> {
    let mut bytes = b"LibvirtQemudSave".to_vec();
    let xml_len = u32::try_from(STREAM - 92).unwrap();
    bytes.extend([2, xml_len, 1, format].into_iter().flat_map(u32::to_le_bytes));
    bytes.resize(92, 0);
    bytes.extend(XML.as_bytes());
    bytes.extend(b"\0<cookie/>");
    bytes.resize(STREAM, 0);
    bytes
}

struct Guest {
    scratch: Scratch,
    vm: QemuBuilder,
}

impl Guest {
    fn new() -> Outcome<Self> {
        let scratch = Scratch::new()?;
        let floppy = scratch.path("floppy");
        BootSector::new().laps_per_second(50).write_floppy(&floppy)?;
        let vm = Qemu::builder().ram_mib(16).floppy(&floppy);
        Ok(Self { scratch, vm })
    }

    /// A paused guest that has gone to this URI.
    fn saved(&self, uri: &str, mapped: bool) -> Outcome<Qemu> {
        let mut source = self.vm.clone().fill(Fill::new(1)).spawn("source")?;
        source.serial().wait_lines(1, 0, SOON)?;
        source.stop()?;
        source.set_up(&settings(mapped), Side::Source)?;
        source.migrate(uri)?;
        source.wait_completed(SOON)?;
        Ok(source)
    }

    /// An image as libvirt writes it: QEMU writes behind the header, or a program packs its stream.
    fn image(&self, format: u32, program: Option<&str>) -> Outcome<(PathBuf, Qemu)> {
        let path = self.scratch.path(&format!("it's {format}.save"));
        fs::write(&path, header(format))?;
        let uri = match program {
            None => format!("file:{},offset={STREAM}", path.display()),
            Some(program) => format!("exec:{program} -c >>\"{}\"", path.display()),
        };
        let source = self.saved(&uri, format == 6)?;
        Ok((path, source))
    }

    fn received(&self, image: &Path, name: &str) -> Outcome<CheckpointFiles> {
        let out = self.scratch.path(name);
        run("receive", &[&format!("file:{}", image.display()), "--out", &out.display().to_string()])?;
        CheckpointFiles::open(&out)
    }
}

fn settings(mapped: bool) -> Settings {
    let capabilities = if mapped { vec!["mapped-ram"] } else { Vec::new() };
    Settings { capabilities, ..Settings::default() }
}

/// Runs a command of ours that succeeds; what it printed.
fn run(command: &str, arguments: &[&str]) -> Outcome<Value> {
    let arguments: Vec<_> = [command, "--json"].into_iter().chain(arguments.iter().copied()).collect();
    let mut process = Multifd::spawn(command, arguments)?;
    process.wait_success(SOON)?;
    Ok(CommandReport::by(&process)?.object().clone())
}

/// Runs one that fails; what it said.
fn fails(command: &str, arguments: &[&str]) -> Outcome<String> {
    let arguments: Vec<_> = [command, "--json"].into_iter().chain(arguments.iter().copied()).collect();
    let mut process = Multifd::spawn(command, arguments)?;
    assert!(!process.wait(SOON)?.success(), "{command} succeeded");
    Ok(CommandReport::by(&process)?.text("error")?.to_owned())
}

fn there_is(program: &str) -> bool {
    let mut command = Command::new(program);
    command.arg("--version").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.status().is_ok_and(|status| status.success())
}

#[test]
fn an_image_of_virsh_save_is_read_in_every_format() -> Outcome {
    skip_without_qemu!();
    let guest = Guest::new()?;
    for format in [0, 6] {
        let (image, source) = guest.image(format, None)?;
        let checkpoint = guest.received(&image, &format!("checkpoint {format}"))?;
        ram::check_equal(source.ram(), &checkpoint.block("pc.ram")?)?;
        let found = run("inspect", &[&image.display().to_string()])?;
        assert_eq!(found.pointer("/libvirt/domain"), Some(&"guest".into()), "{found}");
        assert_eq!(found.pointer("/libvirt/xml"), Some(&XML.into()));
        assert_eq!(found.pointer("/libvirt/was_running"), Some(&true.into()));
    }
    for (format, program) in [(1, "gzip"), (2, "bzip2"), (3, "xz"), (4, "lzop"), (5, "zstd")] {
        if !there_is(program) {
            multifd_tests::skip::skipped(&format!("no {program}"))?;
            continue;
        }
        let (image, source) = guest.image(format, Some(program))?;
        let checkpoint = guest.received(&image, &format!("checkpoint {format}"))?;
        ram::check_equal(source.ram(), &checkpoint.block("pc.ram")?)?;
        let said = fails("inspect", &[&image.display().to_string()])?;
        assert!(said.contains(&format!("| {program} -dc")), "{said}");
    }
    Ok(())
}

#[test]
fn a_checkpoint_becomes_an_image_that_virsh_restore_would_have_qemu_load() -> Outcome {
    skip_without_qemu!();
    let guest = Guest::new()?;
    let (image, source) = guest.image(0, None)?;
    let checkpoint = guest.received(&image, "checkpoint")?;
    let directory = checkpoint.directory().display().to_string();
    let header_of = image.display().to_string();
    for mapped in [false, true] {
        let ours = guest.scratch.path(&format!("ours {mapped}"));
        let uri = format!("file:{}", ours.display());
        let mut flags = vec![directory.as_str(), &uri, "--libvirt-header", &header_of];
        flags.extend(mapped.then_some("--mapped-ram"));
        run("send", &flags)?;
        assert_eq!(fs::read(&ours)?[..STREAM], header(if mapped { 6 } else { 0 })[..]);

        let mut destination = guest.vm.clone().incoming("defer").paused().spawn("destination")?;
        destination.set_up(&settings(mapped), Side::Destination)?;
        destination.listen(&format!("{uri},offset={STREAM}"))?;
        destination.wait_completed(SOON)?;
        ram::check_equal(source.ram(), destination.ram())?;
        destination.resume()?;
        destination.serial().wait_lines(2, 0, SOON)?;
        // Beside RAM only the list of capabilities is another one.
        let again = guest.received(&ours, &format!("again {mapped}"))?;
        ram::check_equal(&checkpoint.block("pc.ram")?, &again.block("pc.ram")?)?;

        let said = fails("send", &flags)?;
        assert!(said.contains("File exists"), "{said}");
    }
    Ok(())
}

#[test]
fn an_image_whose_stream_fails_is_not_left_and_no_other_file_lends_a_header() -> Outcome {
    let scratch = Scratch::new()?;
    let (from, out) = (scratch.path("from"), scratch.path("out"));
    fs::write(&from, header(0))?;
    let (from, uri) = (from.display().to_string(), format!("file:{}", out.display()));
    let nowhere = scratch.path("nowhere").display().to_string();
    let said = fails("send", &[&nowhere, &uri, "--libvirt-header", &from])?;
    assert!(said.contains("nowhere"), "{said}");
    assert!(!out.exists());
    let other = scratch.path("other");
    fs::write(&other, vec![7; 4096])?;
    let said = fails("send", &[&nowhere, &uri, "--libvirt-header", &other.display().to_string()])?;
    assert!(said.contains("no image of virsh save"), "{said}");
    let said = fails("send", &[&nowhere, "tcp:127.0.0.1:1", "--libvirt-header", &from])?;
    assert!(said.contains("--libvirt-header writes to file:PATH"), "{said}");
    Ok(())
}
