//! Whether all of RAM has come. Spec: docs/wire.md §5.4.

use multifd_wire::split_tail;

use super::place::{BlockSinks, Gap};
use super::tail::Tail;
use crate::error::{Error, Phase, Result};
use crate::stream::sections::EarlySections;

/// Whose name a device's section ends in, or goes on with (`-device-early`), behind the device's
/// path.
const VIRTIO_MEM: &str = "virtio-mem";
const VIRTIO_BALLOON: &str = "virtio-balloon";

/// Checks that every page of every block was sent, or said to be zero, at least once.
///
/// Two devices keep pages from being sent: virtio-mem those of its own block that are not plugged,
/// the balloon those of main memory that its guest calls free.
pub(super) fn check_all_came(sinks: &BlockSinks, early: &EarlySections, tail: &Tail) -> Result<()> {
    let gaps = sinks.gaps();
    if gaps.is_empty() {
        return Ok(());
    }
    let devices = device_names(early, tail)?;
    for gap in gaps {
        if !devices.iter().any(|device| leaves_out(device, &gap)) {
            let detail = format!(
                "{} of {} pages of RAM block {} never came, the first is page {}",
                gap.pages, gap.of, gap.block, gap.first
            );
            return Err(Error::misbehaved(Phase::Device, detail));
        }
        tracing::debug!(block = gap.block, pages = gap.pages, "left out by the source");
    }
    Ok(())
}

/// Does the device whose section has this name explain the gap?
fn leaves_out(device: &str, gap: &Gap) -> bool {
    let (path, name) = split_path(device);
    let (block_path, _) = split_path(&gap.block);
    match name {
        _ if gap.is_firmware => false,
        _ if name.starts_with(VIRTIO_MEM) => path == block_path,
        _ if name.starts_with(VIRTIO_BALLOON) => block_path.is_none(),
        _ => false,
    }
}

/// `0000:00:03.0/vm0`: the path of the device that something belongs to, and its name there.
fn split_path(name: &str) -> (Option<&str>, &str) {
    name.rsplit_once('/').map_or((None, name), |(path, name)| (Some(path), name))
}

fn device_names(early: &EarlySections, tail: &Tail) -> Result<Vec<String>> {
    let description = tail.described.as_ref().map(|described| &described.description);
    let mut names = Vec::new();
    for sections in [&early.concat()[..], tail.sections()] {
        let split = split_tail(sections, description);
        let split = split.map_err(|invalid| Error::invalid(Phase::Device, invalid))?;
        names.extend(split.into_iter().map(|section| section.head.idstr));
    }
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn virtio_mem_leaves_out_its_own_block_and_the_balloon_main_memory() {
        let gap = |block: &str| Gap {
            block: block.to_owned(),
            pages: 1,
            of: 2,
            first: 0,
            is_firmware: block.starts_with("/rom@"),
        };
        let (early, mem, balloon) = (
            "0000:00:03.0/virtio-mem-device-early",
            "0000:00:03.0/virtio-mem",
            "0000:00:04.0/virtio-balloon",
        );
        for (device, block, explained) in [
            (early, "0000:00:03.0/vm0", true),
            (mem, "0000:00:03.0/vm0", true),
            (mem, "0000:00:05.0/vm0", false),
            (mem, "pc.ram", false),
            (balloon, "pc.ram", true),
            (balloon, "dimm1", true),
            (balloon, "0000:00:01.0/vga.vram", false),
            (balloon, "/rom@etc/acpi/tables", false),
            ("0000:00:03.0/virtio-net", "0000:00:03.0/vm0", false),
        ] {
            assert_eq!(leaves_out(device, &gap(block)), explained, "{device} {block}");
        }
    }
}
