//! Whether all of RAM has come. Spec: docs/wire.md §5.4.

use multifd_wire::split_tail;

use super::landing::Landings;
use super::tail::Tail;
use crate::error::{Error, Phase, Result};
use crate::sections::EarlySections;

/// Devices that keep pages of RAM from being sent: virtio-mem those that are not plugged, the balloon those that its guest calls
/// free.
const LEAVE_PAGES_OUT: [&str; 2] = ["virtio-mem", "virtio-balloon"];

/// Checks that every page of every block was sent, or said to be zero, at least once.
///
/// A guest with a device that leaves pages out may lack some of its main memory, but none of its firmware's and devices' memory.
pub(super) fn check_all_came(landings: &Landings, early: &EarlySections, tail: &Tail) -> Result<()> {
    let gaps = landings.gaps();
    if gaps.is_empty() {
        return Ok(());
    }
    let excused = leaves_pages_out(early, tail)?;
    match gaps.iter().find(|gap| !excused || gap.is_devices_own) {
        None => {
            for gap in &gaps {
                tracing::debug!(block = gap.block, pages = gap.pages, "left out by the source");
            }
            Ok(())
        }
        Some(gap) => {
            let detail = format!(
                "{} of {} pages of RAM block {} never came, the first is page {}",
                gap.pages, gap.of, gap.block, gap.first
            );
            Err(Error::misbehaved(Phase::Device, detail))
        }
    }
}

fn leaves_pages_out(early: &EarlySections, tail: &Tail) -> Result<bool> {
    let description = tail.described.as_ref().map(|described| &described.description);
    for sections in [&early.concat()[..], tail.sections()] {
        let sections =
            split_tail(sections, description).map_err(|invalid| Error::invalid(Phase::Device, invalid))?;
        let names = |section: &multifd_wire::DeviceSection| {
            LEAVE_PAGES_OUT.iter().any(|device| section.head.idstr.contains(device))
        };
        if sections.iter().any(names) {
            return Ok(true);
        }
    }
    Ok(false)
}
