//! The page that `multifd tune --html` writes about a real guest, as a browser shows it.

use std::time::Duration;

use multifd_tests::{
    BootSector, Multifd, Outcome, Qemu, Receive, Scratch, Settings, Side, page, skip_without_browser,
    skip_without_qemu,
};

/// Far more than it takes: a browser and a guest may wait for a core.
const SOON: Duration = Duration::from_secs(120);

/// What the guest writes to: 16 MiB from 16 MiB on.
const FIRST_PAGE: u32 = 0x1000;
const TOUCHED_PAGES: u32 = 0x1000;

/// Time over link, ratio over CPU, kinds of pages, downtime over dirty rate.
const PLOTS: u64 = 4;

#[test]
#[ignore = "`multifd tune` writes no page yet"]
fn the_page_about_a_checkpoint_stands_in_a_browser() -> Outcome {
    skip_without_qemu!();
    skip_without_browser!();
    let scratch = Scratch::new()?;
    let floppy = scratch.path("floppy");
    BootSector::new().pages(FIRST_PAGE, TOUCHED_PAGES).laps_per_second(1).write_floppy(&floppy)?;
    let checkpoint = scratch.path("checkpoint");
    let settings = Settings { channels: Some(2), downtime_limit: SOON, ..Settings::default() };
    let mut source = Qemu::builder().floppy(&floppy).spawn("source")?;
    source.serial().wait_lines(2, 0, SOON)?;
    let mut receive = Receive::listen("tcp:127.0.0.1:0", &checkpoint)?;
    source.set_up(&settings, Side::Source)?;
    source.migrate(receive.uri())?;
    source.wait_completed(SOON).map_err(|failure| receive.process().explain(failure))?;
    receive.wait_success(SOON)?;

    let file = scratch.path("page.html");
    let (checkpoint, html) = (checkpoint.display().to_string(), file.display().to_string());
    let links = ["--link", "100Mbit/s", "--link", "1Gbit/s", "--link", "25Gbit/s"];
    let flags = ["tune", &checkpoint, "--quick", "--dirty-rate", "20MB/s", "--html", &html];
    Multifd::spawn("tune", flags.iter().chain(&links))?.wait_success(SOON)?;
    page::check(&file, PLOTS)
}
