//! A pool of huge pages, as large as a test needs.

use std::fs::{self, File};
use std::io;

/// More huge pages for this machine, for as long as this lives.
pub(crate) struct HugePages {
    count: usize,
}

const HUGE_PAGES: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";

impl HugePages {
    /// Says why not, if there are none to be had.
    pub(crate) fn reserve(count: usize) -> Result<Self, String> {
        let missing =
            change_huge_pages(|now| now + count).map_err(|error| format!("{HUGE_PAGES}: {error}"))?;
        let pages = Self { count: count - missing.min(count) };
        if missing > 0 {
            return Err(format!("{HUGE_PAGES}: {missing} of {count} huge pages are not to be had"));
        }
        Ok(pages)
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        _ = change_huge_pages(|now| now.saturating_sub(self.count));
    }
}

/// By a difference, and locked: other tests on this machine do the same. Returns how many the
/// kernel could not give.
fn change_huge_pages(to: impl FnOnce(usize) -> usize) -> io::Result<usize> {
    let file = File::options().read(true).write(true).open(HUGE_PAGES)?;
    file.lock()?;
    let now = || fs::read_to_string(HUGE_PAGES)?.trim().parse().map_err(io::Error::other);
    let wanted = to(now()?);
    fs::write(HUGE_PAGES, wanted.to_string())?;
    Ok(wanted.saturating_sub(now()?))
}
