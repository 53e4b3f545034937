//! Where a machine of QEMU has its RAM.

use multifd_engine::{PAGE, RamBlock};
use multifd_vmstate::examine::GuestRam;

/// RAM above the hole for devices begins here.
const HIGH: u64 = 4 << 30;

/// Blocks that are no RAM of the board, and this large or larger, may be memory at an address that
/// is not known here.
const MAY_BE_RAM: u64 = 64 << 20;

/// Where a machine of this kind splits its RAM: up to how much there is no split, and at which
/// address otherwise.
const SPLITS: [(&str, u64, u64); 4] = [
    ("pc-i440fx", 0xe000_0000, 0xc000_0000),
    ("pc-q35", 0xb000_0000, 0x8000_0000),
    ("microvm", 0xc000_0000, 0xc000_0000),
    ("isapc", 0xe000_0000, 0xe000_0000),
];

/// The RAM of the board.
pub(super) struct Ram {
    /// Its block, and the bytes below and above the hole; `None`: a machine that is not known.
    board: Option<(String, u64, u64)>,
    /// There is no other memory.
    complete: bool,
    content: Option<RamBlock>,
}

impl Ram {
    /// Of a machine type with these blocks.
    pub(super) fn new<'b>(machine: &str, blocks: impl Iterator<Item = (&'b str, u64)>) -> Self {
        let blocks: Vec<_> = blocks.collect();
        let split = SPLITS.iter().find(|(family, ..)| machine.starts_with(family));
        // The board's RAM comes first among the largest, as `pc.ram` or under its backend's name.
        let main = blocks.iter().rev().max_by_key(|(_, length)| *length);
        let board = split.zip(main).map(|((_, most, at), (name, length))| {
            let low = if length < most { *length } else { *at.min(length) };
            ((*name).to_owned(), low, length - low)
        });
        let others = blocks.iter().filter(|(name, _)| board.as_ref().is_none_or(|(main, ..)| main != name));
        let complete = others.into_iter().all(|(_, length)| *length < MAY_BE_RAM);
        Self { board, complete, content: None }
    }

    fn main_block(&self) -> Option<&str> {
        self.board.as_ref().map(|(name, ..)| name.as_str())
    }

    /// With the content of its block, which is one of these.
    pub(super) fn with_content(mut self, blocks: Vec<RamBlock>) -> Self {
        let is_main = |block: &RamBlock| self.main_block() == Some(block.name().as_str());
        self.content = blocks.into_iter().find(is_main);
        self
    }

    /// Where in its block these bytes are.
    fn offset(&self, address: u64, len: u64) -> Option<u64> {
        let (_, low, high) = self.board.as_ref()?;
        let end = address.checked_add(len)?;
        if end <= *low {
            return Some(address);
        }
        let above = address.checked_sub(HIGH)?;
        (end - HIGH <= *high).then(|| low + above)
    }
}

impl GuestRam for Ram {
    fn holds(&self, address: u64, len: u64) -> Option<bool> {
        match self.offset(address, len) {
            Some(_) => Some(true),
            None => (self.board.is_some() && self.complete).then_some(false),
        }
    }

    fn read_u16(&self, address: u64) -> Option<u16> {
        let at = usize::try_from(self.offset(address, 2)?).ok()?;
        let mut page = [0; PAGE];
        let found = self.content.as_ref()?.read_page(at / PAGE, &mut page);
        let bytes = page.get(at % PAGE..)?.first_chunk()?;
        found.then(|| u16::from_le_bytes(*bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_is_where_each_machine_has_it() {
        let gib = 1_u64 << 30;
        for (machine, length, address, holds) in [
            ("pc-i440fx-10.0", 4 * gib, 0xbfff_fff0, true),
            ("pc-i440fx-10.0", 4 * gib, 0xc000_0000, false),
            ("pc-i440fx-10.0", 4 * gib, 0x1_3fff_fff0, true),
            ("pc-i440fx-10.0", 4 * gib, 0x1_3fff_fff1, false),
            ("pc-i440fx-10.0", 3583 << 20, 0xdfef_fff0, true),
            ("pc-q35-10.0", 4 * gib, 0x8000_0000, false),
            ("pc-q35-10.0", 4 * gib, 0x1_7fff_fff0, true),
            ("pc-q35-10.0", 2815 << 20, 0xafef_fff0, true),
            ("microvm", 4 * gib, 0xbfff_fff0, true),
            ("microvm", 4 * gib, 0xc000_0000, false),
        ] {
            let ram = Ram::new(machine, [("pc.ram", length), ("pc.bios", 1 << 18)].into_iter());
            assert_eq!(ram.holds(address, 16), Some(holds), "{machine} {length:#x} {address:#x}");
        }
        let more = Ram::new("pc-q35-10.0", [("pc.ram", gib), ("dimm0", gib)].into_iter());
        assert_eq!((more.holds(0, 16), more.holds(HIGH, 16)), (Some(true), None));
        let other = Ram::new("virt-10.0", [("mach-virt.ram", gib)].into_iter());
        assert_eq!(other.holds(0, 16), None);
        assert_eq!(other.read_u16(0), None);
    }
}
