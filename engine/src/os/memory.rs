//! How much memory the machine has.
#![expect(unsafe_code, reason = "std does not know it")]

/// Bytes that a peer or a file may have this process keep, where nothing else limits them: half of
/// the machine's memory.
pub(crate) fn most_kept() -> usize {
    // SAFETY: takes no pointer.
    let pages = unsafe { libc::sysconf(libc::_SC_PHYS_PAGES) };
    // SAFETY: takes no pointer.
    let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    match (usize::try_from(pages), usize::try_from(page)) {
        (Ok(pages), Ok(page)) => pages.saturating_mul(page) / 2,
        // Not told: as much as any machine for guests has.
        _ => 1 << 30,
    }
}
