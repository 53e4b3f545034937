//! A QEMU that runs is looked at from outside.

use std::os::unix::fs::MetadataExt as _;

use multifd_tests::{BootSector, Outcome, Qemu, Scratch, skip_without_qemu};

use crate::fixture::{SOON, tune};

/// What the guest rewrites: 16 MiB from 16 MiB on.
const FIRST_PAGE: u32 = 0x1000;
const TOUCHED_PAGES: u32 = 0x1000;
const WORKING_SET: u64 = 16 << 20;

/// RAM of the guest, most of which it never touches.
const RAM_MIB: u32 = 256;

#[test]
fn a_guest_that_runs_is_sampled_and_runs_on() -> Outcome {
    skip_without_qemu!();
    let scratch = Scratch::new()?;
    let floppy = scratch.path("floppy");
    BootSector::new().pages(FIRST_PAGE, TOUCHED_PAGES).laps_per_second(9).write_floppy(&floppy)?;
    let mut guest = Qemu::builder().ram_mib(RAM_MIB).floppy(&floppy).spawn("guest")?;
    guest.serial().wait_lines(2, 0, SOON)?;
    let memory = |guest: &Qemu| Ok::<_, std::io::Error>(std::fs::metadata(guest.ram())?.blocks() * 512);
    let before = memory(&guest)?;

    let pid = guest.process().id().to_string();
    let found = tune(&["--pid", &pid], &["--link", "1Gbit/s", "--channels", "2"])?;

    let said = guest.serial().text().len();
    // It goes on to say lines, in the order of its laps.
    guest.serial().wait_lines(2, said, SOON)?;
    multifd_tests::guest::check_sequence(&guest.serial().text())?;
    assert_eq!(memory(&guest)?, before, "looking at it has given it memory");

    assert_eq!(found["ram_bytes"], u64::from(RAM_MIB) << 20);
    assert!(found["source"].as_str().is_some_and(|source| source.contains(&pid)), "{}", found["source"]);
    let zero = found["pages"]["zero"].as_f64().unwrap_or(0.0);
    assert!((0.85..1.0).contains(&zero), "most of it was never touched: {zero}");
    let dirty = &found["dirty"];
    assert_eq!(dirty["origin"], "measured");
    let set = dirty["working_set_bytes"].as_u64().unwrap_or_default();
    // It writes a byte of each page 9 times a second: within the second of the measurement nearly
    // all of them.
    assert!((WORKING_SET / 2..WORKING_SET * 2).contains(&set), "{dirty}");
    assert!(dirty["bytes_per_s"].as_u64() >= Some(WORKING_SET), "{dirty}");
    let xbzrle = &found["xbzrle"];
    assert!(xbzrle["size"].as_f64().is_some_and(|size| size < 0.1), "a few bytes of a page change: {xbzrle}");
    Ok(())
}

#[test]
fn a_guest_that_stands_still_writes_nothing() -> Outcome {
    skip_without_qemu!();
    let mut guest = crate::fixture::Still::new()?;
    let pid = guest.qemu.process().id().to_string();
    let found = tune(&["--pid", &pid], &["--link", "1Gbit/s", "--channels", "2"])?;
    // QEMU's own memory may be among what is taken for RAM, and changes a little.
    let dirty = &found["dirty"];
    assert!(dirty["bytes_per_s"].as_u64().is_some_and(|rate| rate < 1 << 20), "{dirty}");
    assert_eq!(found["predictions"][0]["converges"], true);
    // It is paused, and not by us; it was not woken either.
    assert_eq!(guest.qemu.run_state()?, "paused");
    Ok(())
}
