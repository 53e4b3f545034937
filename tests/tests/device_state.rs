//! Device sections of the QEMU that is installed, by the descriptions of `multifd-vmstate`: the
//! same bytes when they are saved again, changed and read by QEMU, and checked by the command.

use std::fs::{self, File};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use multifd_engine::{Checkpoint, Devices, RecordedSection, Recording, SectionContent};
use multifd_tests::{
    CheckpointFiles, Failure, Linux, Multifd, Outcome, Qemu, QemuBuilder, Receive, Release, Scratch,
    Settings, Side, skip_without_linux, skip_without_qemu,
};
use multifd_vmstate::devices::{Rtc, Serial};
use multifd_vmstate::examine::{UnknownRam, examine};
use multifd_vmstate::virtio::{Net, VirtioDevice, VirtioPci};
use multifd_vmstate::{Device, Section, load, save};
use multifd_wire::Item;
use serde_json::json;

/// Generous: a guest under emulation shares two cores with whatever else runs.
const SOON: Duration = Duration::from_secs(120);

/// Written by code that is not QEMU's own, or of a device that is not described: docs/devices.md.
const OPAQUE: [&str; 1] = ["slirp"];

/// A subsection of two chipsets that QEMU 11.1 writes, whose length only the machine knows:
/// docs/devices.md.
const NOT_DESCRIBED: &str = "_pm/cpuhp: a subsection that is unknown here";

/// Every kind of virtio device that needs nothing of the host.
fn virtio(builder: QemuBuilder, bus: &str) -> QemuBuilder {
    let drive = |builder: QemuBuilder, name: &str| {
        builder.argument("-blockdev").argument(format!("driver=null-co,node-name={name}"))
    };
    let builder = drive(drive(builder, "disk0"), "disk1");
    let builder = builder.argument("-netdev").argument("user,id=net,restrict=on");
    let builder = builder.argument("-chardev").argument("null,id=console");
    builder
        .device(&format!("virtio-blk-{bus},drive=disk0"))
        .device(&format!("virtio-net-{bus},netdev=net,id=card"))
        .device(&format!("virtio-rng-{bus}"))
        .device(&format!("virtio-serial-{bus}"))
        .device("virtconsole,chardev=console")
        .device(&format!("virtio-balloon-{bus}"))
        .device(&format!("virtio-scsi-{bus}"))
        .device("scsi-hd,drive=disk1")
}

/// The machines of the table in docs/devices.md.
fn machines() -> [(&'static str, QemuBuilder); 5] {
    let pci = |machine: &str| virtio(Qemu::builder().machine(machine).paused(), "pci");
    let microvm = Qemu::builder().machine("microvm").paused();
    let modern = Qemu::builder().machine("microvm").paused();
    let modern = modern.argument("-global").argument("virtio-mmio.force-legacy=false");
    [
        ("pc-i440fx", pci("pc,hpet=on")),
        ("pc-i440fx-7.2", pci("pc-i440fx-7.2,hpet=on")),
        ("q35", pci("q35,hpet=on")),
        ("microvm", virtio(microvm, "device")),
        ("microvm, modern", virtio(modern, "device")),
    ]
}

/// The stream of a guest that does not run.
fn recorded(vm: &QemuBuilder, path: &Path) -> Outcome {
    let mut source = vm.spawn("source")?;
    source.set_up(&Settings::default(), Side::Source)?;
    // Releases before 8.2 know no file:.
    source.migrate(&format!("exec:cat >{}", path.display()))?;
    source.wait_completed(SOON)?;
    source.quit().map(drop)
}

fn devices(path: &Path) -> Outcome<Devices> {
    let text = |error: multifd_engine::Error| Failure::new(error.chain());
    let recording = Recording::open(path).map_err(text)?;
    let mut pages = recording.pages();
    while pages.next_page().map_err(text)?.is_some() {}
    pages.devices().map_err(text)
}

fn payload(section: &RecordedSection) -> &[u8] {
    match &section.content {
        SectionContent::Device(payload) => payload,
        other => panic!("{} is {other:?}", section.head.idstr),
    }
}

#[test]
fn sections_of_each_release_of_qemu_are_the_same_bytes_when_saved_again() -> Outcome {
    skip_without_qemu!();
    let scratch = Scratch::new()?;
    let (releases, missing) = Release::all();
    missing.iter().for_each(|why| println!("skipped: {why}"));
    let mut wrong = Vec::new();
    // Before 7.2 there is not each of these machines.
    let releases = releases.iter().filter(|release| release.since(7, 2));
    for (release, (machine, vm)) in releases.flat_map(|release| machines().map(|vm| (release, vm))) {
        let path = scratch.path("stream");
        recorded(&vm.program(release.program()), &path)?;
        let devices = devices(&path)?;
        assert!(devices.sections.len() > 15, "{release}, {machine}: {} sections", devices.sections.len());
        let here = devices.sections.iter().filter_map(|section| {
            let problem = match examine(Section::of(&section.head, payload(section)), &UnknownRam) {
                Some(Ok(examined)) if examined.findings.is_empty() => return None,
                Some(Ok(examined)) => format!("{:?}", examined.findings),
                Some(Err(error)) if error.to_string().contains(NOT_DESCRIBED) => return None,
                Some(Err(error)) => error.to_string(),
                None if OPAQUE.contains(&section.head.idstr.as_str()) => return None,
                None => "no description".to_owned(),
            };
            Some(format!("{release}, {machine}: {}: {problem}", section.head.idstr))
        });
        wrong.extend(here);
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}

/// Changes a device in a recorded stream or its tail by its description.
fn change<D: Device + Default>(
    stream: &mut Vec<u8>,
    devices: &Devices,
    kind: &str,
    to: impl FnOnce(&mut D) -> Option<()>,
) -> Outcome {
    let none = || Failure::new(format!("no {kind}, or not the field of it"));
    let is_it = |section: &&RecordedSection| section.head.idstr.rsplit('/').next() == Some(kind);
    let section = devices.sections.iter().find(is_it).ok_or_else(none)?;
    let text = |error: multifd_vmstate::Error| Failure::new(error.to_string());
    let mut device = D::default();
    load(&mut device, section.head.version_id, payload(section)).map_err(text)?;
    to(&mut device).ok_or_else(none)?;
    let new = save(&mut device).map_err(text)?.bytes;
    let mut head = Vec::new();
    Item::SectionFull(section.head.clone()).encode(&mut head);
    let before = [&head, payload(section)].concat();
    let at = stream.windows(before.len()).position(|window| window == before).ok_or_else(none)?;
    let start = at + head.len();
    stream.splice(start..start + payload(section).len(), new);
    Ok(())
}

#[test]
fn fields_that_are_changed_here_are_what_qemus_monitor_shows() -> Outcome {
    skip_without_qemu!();
    let scratch = Scratch::new()?;
    let vm = virtio(Qemu::builder().machine("pc").paused(), "pci");
    let path = scratch.path("stream");
    recorded(&vm, &path)?;
    let mut stream = fs::read(&path)?;
    let devices = devices(&path)?;
    change(&mut stream, &devices, "serial", |serial: &mut Serial| {
        serial.state.scr = 0x5a;
        Some(())
    })?;
    change(&mut stream, &devices, "mc146818rtc", |rtc: &mut Rtc| {
        *rtc.cmos.get_mut(0x50)? = 0xc3;
        Some(())
    })?;
    change(&mut stream, &devices, "virtio-net", |card: &mut VirtioDevice<VirtioPci, Net>| {
        card.kind.mac.0 = [2, 0, 0, 0xca, 0xfe, 1];
        card.kind.allmulti = true;
        Some(())
    })?;
    fs::write(&path, stream)?;

    let mut there = vm.clone().incoming("defer").spawn("destination")?;
    there.set_up(&Settings::default(), Side::Destination)?;
    there.execute("migrate-incoming", json!({ "uri": format!("file:{}", path.display()) }))?;
    there.wait_completed(SOON)?;
    let monitor = |there: &mut Qemu, line: &str| -> Outcome<String> {
        let said = there.execute("human-monitor-command", json!({ "command-line": line }))?;
        Ok(said.as_str().unwrap_or_default().trim().to_owned())
    };
    assert_eq!(monitor(&mut there, "i /xb 0x3ff")?, "portb[0x03ff] = 0x5a", "the scratch register");
    monitor(&mut there, "o /xb 0x70 0x50")?;
    assert_eq!(monitor(&mut there, "i /xb 0x71")?, "portb[0x0071] = 0xc3", "a byte of CMOS memory");
    let filter = there.execute("query-rx-filter", json!({ "name": "card" }))?;
    assert_eq!(filter.pointer("/0/main-mac"), Some(&json!("02:00:00:ca:fe:01")));
    assert_eq!(filter.pointer("/0/multicast"), Some(&json!("all")));
    there.quit().map(drop)
}

/// Runs `multifd inspect`: its exit code and what it printed.
fn inspect(arguments: &[&str], paths: &[&Path]) -> Outcome<(Option<i32>, String)> {
    let output = Command::new(Multifd::binary()?).arg("inspect").args(arguments).args(paths).output()?;
    Ok((output.status.code(), String::from_utf8_lossy(&output.stdout).into_owned()))
}

#[test]
fn a_booted_linux_is_consistent_and_a_spoilt_ring_index_is_found() -> Outcome {
    skip_without_linux!();
    let scratch = Scratch::new()?;
    let disk = scratch.path("disk");
    File::create(&disk)?.set_len(8 << 20)?;
    let image = Linux::new().module("virtio_rng").module("virtio_balloon").build(&scratch)?;
    let vm = Qemu::builder().machine("q35").ram_mib(256).linux(&image).disk(&disk).network();
    let vm = vm.device("virtio-rng-pci").device("virtio-balloon-pci");
    let mut source = vm.spawn("source")?;
    source.wait_linux(SOON)?;
    let out = scratch.path("checkpoint");
    let mut receive = Receive::listen("tcp:127.0.0.1:0", &out)?;
    source.set_up(&Settings { return_path: true, ..Settings::default() }, Side::Source)?;
    source.migrate(receive.uri())?;
    source.wait_completed(SOON).map_err(|failure| receive.process().explain(failure))?;
    receive.wait_success(SOON)?;
    CheckpointFiles::open(&out)?;

    let (code, checked) = inspect(&["--check"], &[&out])?;
    assert_eq!(code, Some(0), "{checked}");
    assert!(!checked.contains("inconsistent"), "{checked}");
    // What these three have beside the usual depends on processor and machine.
    let not_all = |line: &&str| ["slirp ", "cpu ", "/ICH9LPC "].iter().any(|name| line.contains(name));
    let unchecked = checked.lines().filter(|line| line.ends_with("not checked"));
    assert_eq!(unchecked.filter(|line| !not_all(line)).collect::<Vec<_>>(), [""; 0], "{checked}");
    let (_, shown) = inspect(&["-v"], &[&out])?;
    for expected in ["DRIVER_OK", "VERSION_1", "last_avail_idx", "in_use"] {
        assert!(shown.contains(expected), "no {expected} in {shown}");
    }

    let spoilt = scratch.path("spoilt");
    copy(&out, &spoilt)?;
    let (_, same) = inspect(&[], &[&out, &spoilt])?;
    assert_eq!(same, "the devices of both are the same\n");
    let path = spoilt.join("device-state.bin");
    let mut state = fs::read(&path)?;
    let devices = Checkpoint::open(&spoilt).and_then(|checkpoint| checkpoint.devices());
    let devices = devices.map_err(|error| Failure::new(error.chain()))?;
    change(&mut state, &devices, "virtio-net", |card: &mut VirtioDevice<VirtioPci, Net>| {
        card.core.queues.first_mut()?.last_avail = 54_321;
        Some(())
    })?;
    fs::write(&path, state)?;
    let (code, checked) = inspect(&["--check"], &[&spoilt])?;
    assert_eq!(code, Some(1), "{checked}");
    assert!(checked.contains("queue[0].last_avail_idx: 54321, but the driver is at "), "{checked}");
    let (code, differ) = inspect(&[], &[&out, &spoilt])?;
    assert_eq!(code, Some(0), "{differ}");
    let lines: Vec<_> = differ.lines().collect();
    assert_eq!(lines.len(), 2, "{differ}");
    assert!(lines[0].ends_with("/virtio-net"), "{differ}");
    assert!(lines[1].contains("queue[0].last_avail_idx") && lines[1].contains("54321"), "{differ}");
    source.quit().map(drop)
}

fn copy(from: &Path, to: &Path) -> Outcome {
    fs::create_dir(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy(&entry.path(), &target)?;
        } else {
            fs::copy(entry.path(), target)?;
        }
    }
    Ok(())
}
