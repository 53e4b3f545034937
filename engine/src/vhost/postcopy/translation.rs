//! Where a back-end has the guest's memory, and where it is in this process.

use vhost::VhostUserMemoryRegionInfo;

use crate::guest::PAGE;

/// A piece of the guest's memory, as two processes have it mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Mapped {
    /// The first address in the back-end.
    there: u64,
    /// The first address in this process.
    here: u64,
    len: u64,
}

/// Where a back-end has the guest's memory mapped. What it was told before stays known behind what
/// it was told last: a thread may still wait at an address of an earlier mapping.
#[derive(Debug, Default)]
pub(super) struct Translation(Vec<Mapped>);

impl Translation {
    pub(super) fn add(&mut self, newer: Vec<Mapped>) {
        self.0.splice(0..0, newer);
    }

    /// The address in this process of what the back-end has at `there`.
    pub(super) fn here(&self, there: u64) -> Option<u64> {
        let within = |mapped: &&Mapped| there.checked_sub(mapped.there).is_some_and(|at| at < mapped.len);
        self.0.iter().find(within).map(|mapped| mapped.here + (there - mapped.there))
    }

    /// The mappings that are known, for an error.
    pub(super) fn describe(&self) -> String {
        let range = |mapped: &Mapped| format!("{:#x}..{:#x}", mapped.there, mapped.there + mapped.len);
        self.0.iter().map(range).collect::<Vec<_>>().join(", ")
    }
}

/// Reads a back-end's answer to a SET_MEM_TABLE of these regions in post-copy: the same table, with
/// its own addresses in the place of ours.
pub(super) fn answered(regions: &[VhostUserMemoryRegionInfo], body: &[u8]) -> Result<Vec<Mapped>, String> {
    let short = || format!("{} bytes", body.len());
    let (count, rest) = body.split_first_chunk().ok_or_else(short)?;
    // Behind the count are four bytes of padding.
    let (_, rest) = rest.split_first_chunk::<4>().ok_or_else(short)?;
    let (entries, odd): (&[[u8; 32]], _) = rest.as_chunks();
    let count = u32::from_ne_bytes(*count);
    if !odd.is_empty() || entries.len() != regions.len() || count as usize != regions.len() {
        let (bytes, expected) = (body.len(), regions.len());
        return Err(format!("{bytes} bytes with {count} regions, expected {expected} regions"));
    }
    let mapped: Vec<_> = regions
        .iter()
        .zip(entries)
        .map(|(region, entry)| of_entry(region, entry))
        .collect::<Result<_, _>>()?;
    let mut sorted = mapped.clone();
    sorted.sort_by_key(|mapped| mapped.there);
    let overlap = sorted.windows(2).any(|pair| match pair {
        [low, high] => low.there + low.len > high.there,
        _ => false,
    });
    if overlap { Err("regions that overlap each other".to_owned()) } else { Ok(mapped) }
}

fn of_entry(region: &VhostUserMemoryRegionInfo, entry: &[u8; 32]) -> Result<Mapped, String> {
    let (words, _): (&[[u8; 8]], _) = entry.as_chunks();
    let mut words = words.iter().map(|word| u64::from_ne_bytes(*word));
    let [guest, len, there] = [0; 3].map(|nothing: u64| words.next().unwrap_or(nothing));
    if (guest, len) != (region.guest_phys_addr, region.memory_size) {
        let (expected_guest, expected_len) = (region.guest_phys_addr, region.memory_size);
        return Err(format!(
            "a region of {len:#x} bytes at guest address {guest:#x}, expected {expected_len:#x} at {expected_guest:#x}"
        ));
    }
    if there == region.userspace_addr {
        return Err(format!(
            "our own address {there:#x} of the memory at guest address {guest:#x} in the place of its own, as QEMU's \
             libvhost-user does (seen with 10.0): its faults could not be told from each other"
        ));
    }
    if there == 0 || !there.is_multiple_of(PAGE as u64) || there.checked_add(len).is_none() {
        return Err(format!("address {there:#x} for {len:#x} bytes, expected the start of a page"));
    }
    Ok(Mapped { there, here: region.userspace_addr, len })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MIB: u64 = 1 << 20;

    fn region(guest: u64, len: u64, here: u64) -> VhostUserMemoryRegionInfo {
        VhostUserMemoryRegionInfo {
            guest_phys_addr: guest,
            memory_size: len,
            userspace_addr: here,
            mmap_offset: 0,
            mmap_handle: -1,
        }
    }

    fn reply(regions: &[VhostUserMemoryRegionInfo], bases: &[u64]) -> Vec<u8> {
        let mut body = [u32::try_from(regions.len()).unwrap().to_ne_bytes(), [0; 4]].concat();
        for (region, base) in regions.iter().zip(bases) {
            let words = [region.guest_phys_addr, region.memory_size, *base, region.mmap_offset];
            body.extend(words.map(u64::to_ne_bytes).concat());
        }
        body
    }

    /// Regions of some pages with gaps between them, in both processes.
    fn layout() -> impl Strategy<Value = Vec<(u64, u64, u64)>> {
        prop::collection::vec((1_u64..64, 0_u64..9, 0_u64..9), 1..9).prop_map(|pieces| {
            let (mut here, mut there) = (1 << 46, 1 << 45);
            let page = PAGE as u64;
            let place = |(pages, gap_here, gap_there): (u64, u64, u64)| {
                here += gap_here * page;
                there += gap_there * page;
                let placed = (pages * page, here, there);
                (here, there) = (here + pages * page, there + pages * page);
                placed
            };
            pieces.into_iter().map(place).collect()
        })
    }

    proptest! {
        /// In any order of addresses: the same byte of the same region, or nothing.
        #[test]
        fn an_address_of_the_back_ends_is_the_same_byte_here(
            layout in layout(),
            order in any::<prop::sample::Index>(),
            offset in any::<u64>(),
            outside in any::<u64>(),
        ) {
            let mut layout = layout;
            let turn = order.index(layout.len());
            layout.rotate_left(turn);
            let mut guest = 0;
            let regions: Vec<_> = layout.iter().map(|(len, here, _)| {
                guest += len;
                region(guest - len, *len, *here)
            }).collect();
            let bases: Vec<_> = layout.iter().map(|(_, _, there)| *there).collect();
            let mut known = Translation::default();
            known.add(answered(&regions, &reply(&regions, &bases)).unwrap());
            for (len, here, there) in &layout {
                let at = offset % len;
                prop_assert_eq!(known.here(there + at), Some(here + at));
                prop_assert_eq!(known.here(there + len - 1), Some(here + len - 1));
            }
            let inside = layout.iter().any(|(len, _, there)| (*there..there + len).contains(&outside));
            prop_assert_eq!(known.here(outside).is_some(), inside);
        }

        #[test]
        fn no_answer_whatever_its_bytes_ends_the_process(body in prop::collection::vec(any::<u8>(), 0..200)) {
            let regions = [region(0, MIB, 1 << 46), region(1 << 32, MIB, 1 << 45)];
            let _ = answered(&regions, &body);
        }
    }

    #[test]
    fn what_was_told_last_comes_before_what_was_told_before() {
        let mut known = Translation::default();
        known.add(vec![Mapped { there: 0x10_0000, here: 0x1000, len: 0x4000 }]);
        known.add(vec![Mapped { there: 0x10_2000, here: 0x9000, len: 0x1000 }]);
        assert_eq!(known.here(0x10_1fff), Some(0x2fff));
        assert_eq!(known.here(0x10_2001), Some(0x9001));
        assert_eq!(known.here(0x10_3000), Some(0x4000));
        assert_eq!(known.here(0x10_4000), None);
    }

    #[test]
    fn wrong_answers_are_named() {
        let regions = [region(0, MIB, 1 << 46), region(1 << 32, MIB, 1 << 45)];
        let wrong = |bases: [u64; 2]| answered(&regions, &reply(&regions, &bases)).unwrap_err();
        assert!(
            wrong([1 << 44, 1 << 45]).starts_with("our own address 0x200000000000 of the memory at guest")
        );
        assert_eq!(wrong([1 << 44, (1 << 44) + MIB - 4096]), "regions that overlap each other");
        assert_eq!(
            wrong([0x1001, 1 << 44]),
            "address 0x1001 for 0x100000 bytes, expected the start of a page"
        );
        assert_eq!(
            wrong([u64::MAX - 4095, 1 << 44]),
            "address 0xfffffffffffff000 for 0x100000 bytes, expected the start of a page"
        );
        let one = reply(&regions[..1], &[1 << 44]);
        assert_eq!(answered(&regions, &one).unwrap_err(), "40 bytes with 1 regions, expected 2 regions");
        assert_eq!(answered(&regions, &[]).unwrap_err(), "0 bytes");
        let mut longer = reply(&regions, &[1 << 44, 1 << 43]);
        longer[16..24].copy_from_slice(&(2 * MIB).to_ne_bytes());
        assert_eq!(
            answered(&regions, &longer).unwrap_err(),
            "a region of 0x200000 bytes at guest address 0x0, expected 0x100000 at 0x0"
        );
    }
}
