//! A running guest goes to a file from QEMU, comes in, goes out to another file, and is loaded by
//! QEMU: in every way that both know.

use multifd_tests::{
    BootSector, Fill, Multifd, Outcome, Qemu, QemuBuilder, Scratch, Settings, Side, guest, ram, skip,
    skip_without_qemu,
};

use super::fixture::{Disk, SOON, Way};

/// Not a multiple of the page.
const ODD: u64 = (1 << 20) + 512;

struct Journey {
    disk: Disk,
    // Keeps the floppy.
    _scratch: Scratch,
    vm: QemuBuilder,
    settings: Settings,
}

impl Journey {
    fn new(way: Way, settings: Settings) -> Outcome<Self> {
        let (disk, scratch) = (Disk::new()?, Scratch::new()?);
        let floppy = scratch.path("floppy");
        BootSector::new().write_floppy(&floppy)?;
        let vm = Qemu::builder().machine("pc").ram_mib(32).floppy(&floppy);
        let mut settings =
            Settings { channels: Some(way.workers).filter(|workers| *workers > 0), ..settings };
        settings.capabilities.extend(way.mapped.then_some("mapped-ram"));
        settings.parameters.insert("direct-io".into(), way.direct.into());
        Ok(Self { disk, _scratch: scratch, vm, settings })
    }

    fn run(&self, way: Way) -> Outcome {
        let mut source = self.vm.clone().fill(Fill::new(1)).spawn("source")?;
        source.serial().wait_lines(2, 0, SOON)?;
        source.set_up(&self.settings, Side::Source)?;
        let theirs = self.disk.path("theirs");
        way.prepare(&theirs)?;
        source.migrate(&way.uri(&theirs))?;
        source.settle(&self.settings, SOON)?.check_completed()?;

        let checkpoint = way.received(&theirs, &self.disk.path("checkpoint"))?;
        ram::check_equal(source.ram(), &checkpoint.block("pc.ram")?)?;
        let ours = self.disk.path("ours");
        way.prepare(&ours)?;
        let report = way.sent(checkpoint.directory(), &ours)?;
        assert_eq!(report.number("channels")?, u64::from(way.workers));
        way.check(&ours)?;

        let mut destination = self.vm.clone().incoming("defer").paused().spawn("destination")?;
        destination.set_up(&self.settings, Side::Destination)?;
        destination.listen(&way.uri(&ours))?;
        destination.wait_completed(SOON)?;
        ram::check_equal(&checkpoint.block("pc.ram")?, destination.ram())?;
        goes_on(source, destination)?;

        // What we write, we read; and so does `inspect`.
        way.received(&ours, &self.disk.path("again"))?.check_equal(&checkpoint)?;
        let mut inspect = Multifd::spawn("inspect", ["inspect".into(), way.uri(&ours)])?;
        inspect.wait_success(SOON)?;
        assert!(inspect.stdout()?.text().contains("pc.ram"));
        Ok(())
    }
}

fn goes_on(source: Qemu, mut destination: Qemu) -> Outcome {
    assert_eq!(destination.serial().mark(), 0, "the guest is paused");
    destination.resume()?;
    destination.serial().wait_lines(3, 0, SOON)?;
    let before = source.quit()?;
    let lines = guest::check_sequence(&(before + &destination.quit()?))?;
    assert!(lines > 3, "{lines} lines");
    Ok(())
}

fn every_offset(way: Way) -> Outcome {
    skip_without_qemu!();
    for offset in [0, ODD] {
        let way = Way { offset, ..way };
        let settings = Settings { min_rounds: 3, ..Settings::default() };
        let journey = Journey::new(way, settings)?;
        if let Some(why) = journey.disk.no_direct_io()?.filter(|_| way.direct) {
            skip!("{why}");
        }
        journey.run(way).unwrap_or_else(|failure| panic!("{way:?}: {failure}"));
    }
    Ok(())
}

macro_rules! ways {
    ($($name:ident: $mapped:literal, $workers:literal, $direct:literal;)*) => {
        $(#[test] fn $name() -> Outcome {
            every_offset(Way { mapped: $mapped, workers: $workers, direct: $direct, ..Way::default() })
        })*
    };
}

ways! {
    plain: false, 0, false;
    mapped: true, 0, false;
    mapped_by_2: true, 2, false;
    mapped_by_4: true, 4, false;
    mapped_direct: true, 0, true;
    mapped_direct_by_2: true, 2, true;
    mapped_direct_by_4: true, 4, true;
}

/// Written from memory that the guest still writes, page by page as it was at one time; no END,
/// devices last.
#[test]
fn a_background_snapshot_comes_in() -> Outcome {
    skip_without_qemu!();
    let way = Way::default();
    let mut settings = Settings::default();
    settings.capabilities.push("background-snapshot");
    let journey = Journey::new(way, settings)?;
    let mut source = journey.vm.clone().fill(Fill::new(2)).spawn("source")?;
    source.serial().wait_lines(2, 0, SOON)?;
    let file = journey.disk.path("snapshot");
    if let Err(refused) = source.set_up(&journey.settings, Side::Source) {
        skip!("no background snapshots here: {refused}");
    }
    source.migrate(&way.uri(&file))?;
    if let Err(failure) = source.wait_end(SOON)?.check_completed() {
        skip!("no background snapshots here: {failure}");
    }
    let checkpoint = way.received(&file, &journey.disk.path("checkpoint"))?;
    drop(source.quit()?);
    // The snapshot's guest is another than the one that ran on: it must run, and count on from
    // where it was.
    let again = journey.disk.path("again");
    way.sent(checkpoint.directory(), &again)?;
    let mut destination = journey.vm.clone().incoming("defer").paused().spawn("destination")?;
    destination.listen(&way.uri(&again))?;
    destination.wait_completed(SOON)?;
    ram::check_equal(&checkpoint.block("pc.ram")?, destination.ram())?;
    destination.resume()?;
    // The first line may lack its begin.
    destination.serial().wait_lines(5, 0, SOON)?;
    assert!(guest::check_sequence(&destination.quit()?)? >= 3);
    Ok(())
}
