//! The page that `multifd tune --html` writes about a real guest, as a browser shows it.

use multifd_tests::{Multifd, Outcome, page, skip_without_browser, skip_without_qemu};

use crate::fixture::{SOON, Still};

/// Time over link, ratio over CPU, kinds of pages, downtime over dirty rate.
const PLOTS: u64 = 4;

#[test]
fn the_page_about_a_checkpoint_stands_in_a_browser() -> Outcome {
    skip_without_qemu!();
    skip_without_browser!();
    let mut guest = Still::new()?;
    let checkpoint = guest.checkpoint()?;
    let file = guest.scratch.path("page.html");
    let (checkpoint, html) = (checkpoint.display().to_string(), file.display().to_string());
    let links = ["--link", "100Mbit/s", "--link", "1Gbit/s", "--link", "25Gbit/s"];
    let flags = ["tune", &checkpoint, "--quick", "--dirty-rate", "20MB/s", "--html", &html];
    Multifd::spawn("tune", flags.iter().chain(&links))?.wait_success(SOON)?;
    page::check(&file, PLOTS)
}
