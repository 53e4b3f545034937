//! The harness against itself: QEMU to QEMU, so that a later failure with `multifd` on one side is
//! not the harness's.

use std::{fs::File, time::Duration};

use multifd_tests::{
    BootSector, Compression, Fill, Linux, Outcome, Qemu, QemuBuilder, Scratch, Settings, Side, ZeroPages,
    guest, migration, ram, skip_without_linux, skip_without_qemu,
};

const SOON: Duration = Duration::from_secs(30);

/// Moves a counting guest from one QEMU to another: the RAMs are equal and the count goes on.
fn moves(machine: &str, boot_sector: BootSector, settings: &Settings, uri: Option<&str>) -> Outcome {
    let scratch = Scratch::new()?;
    let floppy = scratch.path("floppy");
    boot_sector.write_floppy(&floppy)?;
    let vm = Qemu::builder().machine(machine).floppy(&floppy);
    let mut source = vm.clone().fill(Fill::new(1)).spawn("source")?;
    let mut destination = vm.incoming("defer").paused().spawn("destination")?;
    source.serial().wait_lines(2, 0, SOON)?;
    let uri = uri.map_or_else(|| scratch.unix_uri("migration"), str::to_owned);
    let report = migration::run(&mut source, &mut destination, &uri, settings, SOON)?;
    assert!(report.rounds >= u64::from(settings.min_rounds), "{report:?}");
    assert_eq!(source.run_state()?, "postmigrate");
    assert_eq!(destination.run_state()?, "paused");
    ram::check_equal(source.ram(), destination.ram())?;
    assert_eq!(destination.serial().mark(), 0);
    destination.resume()?;
    destination.serial().wait_lines(3, 0, SOON)?;
    // The comparison would have seen a difference.
    assert!(ram::compare(source.ram(), destination.ram())?.is_some());
    let before = source.quit()?;
    let lines = guest::check_sequence(&(before + &destination.quit()?))?;
    assert!(lines > 3, "{lines} lines");
    Ok(())
}

#[test]
fn one_channel_over_unix_in_several_rounds() -> Outcome {
    skip_without_qemu!();
    let settings = Settings { return_path: true, xbzrle: true, min_rounds: 4, ..Settings::default() };
    moves("pc", BootSector::new(), &settings, None)
}

#[test]
fn multifd_over_tcp_in_several_rounds() -> Outcome {
    skip_without_qemu!();
    let compression = Compression::Zstd(1);
    let settings = Settings { channels: Some(3), compression, min_rounds: 4, ..Settings::default() };
    moves("q35", BootSector::new(), &settings, Some("tcp:127.0.0.1:0"))
}

#[test]
fn an_older_machine_with_a_paced_guest_in_high_memory() -> Outcome {
    skip_without_qemu!();
    let zero_pages = Some(ZeroPages::Legacy);
    let settings = Settings { channels: Some(2), zero_pages, ..Settings::default() };
    let guest = BootSector::new().pages(0x800, 1000).laps_per_second(100);
    moves("pc-q35-7.2", guest, &settings, None)
}

#[test]
fn a_failure_tells_why_on_both_sides() -> Outcome {
    skip_without_qemu!();
    let scratch = Scratch::new()?;
    let mut source = Qemu::builder().ram_mib(32).spawn("source")?;
    let mut destination = Qemu::builder().ram_mib(48).incoming("defer").spawn("destination")?;
    let settings = Settings { return_path: true, ..Settings::default() };
    source.set_up(&settings, Side::Source)?;
    destination.set_up(&settings, Side::Destination)?;
    let uri = destination.listen(&scratch.unix_uri("migration"))?;
    source.migrate(&uri)?;
    let failure = source.wait_completed(SOON).unwrap_err().to_string();
    assert!(failure.starts_with("source: migration failed: "), "{failure}");
    let failure = destination.wait_completed(SOON).unwrap_err().to_string();
    assert!(failure.contains("Size mismatch: pc.ram"), "{failure}");
    assert_eq!(source.run_state()?, "running");
    Ok(())
}

#[test]
fn a_qemu_that_does_not_start_or_refuses_is_quoted() -> Outcome {
    skip_without_qemu!();
    let failure = Qemu::builder().device("no-such-device").spawn("odd").unwrap_err().to_string();
    assert!(failure.contains("odd: ") && failure.contains("no-such-device"), "{failure}");
    let mut qemu = Qemu::builder().spawn("even")?;
    let settings = Settings { capabilities: vec!["no-such-capability"], ..Settings::default() };
    let failure = qemu.set_up(&settings, Side::Source).unwrap_err().to_string();
    assert!(
        failure.contains("even: qmp migrate-set-capabilities: ") && failure.contains("no-such"),
        "{failure}"
    );
    Ok(())
}

#[test]
fn linux_moves_with_its_disk_and_network() -> Outcome {
    skip_without_linux!();
    let scratch = Scratch::new()?;
    let disk = scratch.path("disk");
    File::create(&disk)?.set_len(4 << 20)?;
    let image = Linux::new().build(&scratch)?;
    let vm: QemuBuilder = Qemu::builder().machine("q35").ram_mib(512).linux(&image).disk(&disk).network();
    let mut source = vm.spawn("source")?;
    source.wait_linux(SOON * 2)?;
    source.run_in_guest("ip link set eth0 up; echo kept >/tmp/note; echo on disk >/dev/vda; sync", SOON)?;
    assert!(source.run_in_guest("ls /no-such-file", SOON).is_err());
    let mut destination = vm.incoming("defer").spawn("destination")?;
    let settings = Settings { channels: Some(2), return_path: true, ..Settings::default() };
    migration::run(&mut source, &mut destination, &scratch.unix_uri("migration"), &settings, SOON)?;
    assert_eq!(destination.run_state()?, "running");
    assert_eq!(destination.run_in_guest("cat /tmp/note; head -n 1 /dev/vda", SOON)?, "kept\non disk");
    let links = destination.run_in_guest("ip -o link show eth0; echo more >/dev/vda; sync", SOON)?;
    assert!(links.contains("eth0") && links.contains("UP"), "{links}");
    Ok(())
}
