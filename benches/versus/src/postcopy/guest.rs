//! A guest of several vCPUs that touch pages at random, in firmware of its own.
//!
//! ```text
//!  source:      each vCPU says H on the serial port, and halts
//!  destination: an NMI, which QEMU gives to all of them: each reads so many pages, at random, and halts
//! ```
//!
//! So the source's cores are free, and nothing is touched before the switch. Threads of our own do
//! the same ([`Walk`]).

use std::path::Path;

use multifd_tests::{Failure, Outcome};

/// The pages that one vCPU touches, in order.
#[derive(Clone, Debug)]
pub(crate) struct Walk {
    state: u32,
    shift: u32,
}

const FACTOR: u32 = 1_664_525;
const STEP: u32 = 1_013_904_223;
const SEED: u32 = 0x9e37_79b1;

impl Walk {
    /// Of this vCPU in a guest of `1 << log2_pages` pages.
    pub(crate) fn new(vcpu: u32, log2_pages: u32) -> Self {
        Self { state: vcpu.wrapping_mul(SEED), shift: 32 - log2_pages }
    }
}

impl Iterator for Walk {
    type Item = usize;

    fn next(&mut self) -> Option<usize> {
        self.state = self.state.wrapping_mul(FACTOR).wrapping_add(STEP);
        usize::try_from(self.state >> self.shift).ok()
    }
}

/// The largest power of two of pages in that much RAM.
pub(crate) fn log2_pages(ram_mib: u32) -> u32 {
    ram_mib.ilog2() + 8
}

/// Pages that each of the vCPUs touches: all of them together a quarter of RAM.
pub(crate) fn touches(ram_mib: u32, vcpus: u32) -> u32 {
    (ram_mib << 6) / vcpus.max(1)
}

/// Says so, once for each vCPU.
pub(crate) const HALTED: u8 = b'H';

/// Bytes of a firmware image: those from F000:0000 to the end of the first megabyte.
const FIRMWARE_LEN: usize = 1 << 16;

/// At F000:FFF0, where a CPU begins: jmp F000:0000.
const RESET_VECTOR: [u8; 16] = [0xea, 0, 0, 0, 0xf0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

/// Writes the firmware of a guest with that much RAM and that many vCPUs.
pub(crate) fn write_firmware(path: &Path, ram_mib: u32, vcpus: u32) -> Outcome {
    let mut image = image(log2_pages(ram_mib), touches(ram_mib, vcpus))?;
    image.resize(FIRMWARE_LEN - RESET_VECTOR.len(), 0);
    image.extend(RESET_VECTOR);
    Ok(std::fs::write(path, image)?)
}

/// The program: bytes and what they mean, one instruction a line. In real mode, at F000:0000, where
/// the other vCPUs begin, too (SIPI to vector F0). Data is reached through a flat 4 GiB segment.
/// `ebx` is the number of the vCPU.
const LISTING: &str = "
    FA                      | cli
    FC                      | cld
    2E 0F 01 16 GDTR        | lgdt cs:[gdtr]
    0F 20 C0                | mov eax, cr0       into protected mode ...
    0C 01                   | or al, 1
    0F 22 C0                | mov cr0, eax
    BB 08 00                | mov bx, 8          ... for a flat data segment ...
    8E DB                   | mov ds, bx
    24 FE                   | and al, FE
    0F 22 C0                | mov cr0, eax       ... and back; the segment keeps its base and limit
    31 C0                   | xor ax, ax
    8E D0                   | mov ss, ax
    BC 00 70                | mov sp, 7000
    66 BF 00 00 E0 FE       | mov edi, FEE00000  local APIC: on, and its pin 1 is the NMI
    67 66 C7 87 F0 00 00 00 FF 01 00 00 | mov dword [edi+F0], 1FF
    67 66 C7 87 60 03 00 00 00 04 00 00 | mov dword [edi+360], 400
    67 66 8B 5F 20          | mov ebx, [edi+20]
    66 C1 EB 18             | shr ebx, 18
    66 09 DB                | or ebx, ebx
    75 24                   | jnz say
    67 66 C7 05 08 00 00 00 NMI 00 F0 | mov dword [8], F000:nmi
    67 66 C7 87 00 03 00 00 00 45 0C 00 | mov dword [edi+300], C4500   INIT to all others ...
    67 66 C7 87 00 03 00 00 F0 46 0C 00 | mov dword [edi+300], C46F0   ... and SIPI
    BA F8 03                | say: mov dx, 3F8
    B0 48                   | mov al, 'H'
    EE                      | out dx, al
    F4                      | wait: hlt
    EB FD                   | jmp wait
    66 69 F3 B1 79 37 9E    | nmi: imul esi, ebx, SEED
    66 B9 TOUCHES           | mov ecx, TOUCHES
    66 69 F6 0D 66 19 00    | touch: imul esi, esi, FACTOR
    66 81 C6 5F F3 6E 3C    | add esi, STEP
    66 89 F7                | mov edi, esi
    66 C1 EF SHIFT          | shr edi, SHIFT
    66 C1 E7 0C             | shl edi, C
    67 66 8B 07             | mov eax, [edi]
    66 49                   | dec ecx
    75 DF                   | jnz touch
    F4                      | done: hlt
    EB FD                   | jmp done
    00 00 00 00 00 00 00 00 | gdt
    FF FF 00 00 00 92 CF 00 | selector 8: data, base 0, limit 4 GiB
    0F 00 GDT 0F 00         | gdtr
";

/// Where things are in the listing.
const NMI: u16 = 0x7a;
const GDT: u16 = 0xab;
const GDTR: u16 = GDT + 16;

fn image(log2_pages: u32, touches: u32) -> Outcome<Vec<u8>> {
    let mut image = Vec::new();
    for line in LISTING.lines().filter(|line| line.contains('|')) {
        let (code, meaning) = line.split_once('|').unwrap_or_default();
        let here = image.len();
        let expected = [("nmi:", NMI), ("gdt", GDT), ("gdtr", GDTR)];
        let at = expected.into_iter().find(|(name, _)| meaning.split_whitespace().next() == Some(name));
        if at.is_some_and(|(_, at)| usize::from(at) != here) {
            return Err(Failure::new(format!("{meaning} is at {here:#x} of the firmware")));
        }
        for item in code.split_whitespace() {
            match item {
                "NMI" => image.extend(NMI.to_le_bytes()),
                "GDT" => image.extend(GDT.to_le_bytes()),
                "GDTR" => image.extend(GDTR.to_le_bytes()),
                "TOUCHES" => image.extend(touches.to_le_bytes()),
                "SHIFT" => image.push(u8::try_from(32 - log2_pages)?),
                byte => image.push(u8::from_str_radix(byte, 16)?),
            }
        }
    }
    Ok(image)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_firmware_has_everything_where_its_jumps_expect_it() {
        let image = image(16, 1024).unwrap();
        let at = |from: usize, len: usize| &image[from..from + len];
        assert_eq!(at(usize::from(NMI), 3), [0x66, 0x69, 0xf3]);
        assert_eq!(at(usize::from(GDTR), 6), [0x0f, 0, 0xab, 0, 0x0f, 0]);
        // jnz say, and jnz touch: each counts from behind itself.
        let say = image.windows(5).position(|bytes| bytes == [0xba, 0xf8, 3, 0xb0, HALTED]).unwrap();
        let jump = image.windows(2).position(|bytes| bytes == [0x75, 0x24]).unwrap();
        assert_eq!(jump + 2 + 0x24, say);
        let touch = image.windows(4).position(|bytes| bytes == [0x66, 0x69, 0xf6, 0x0d]).unwrap();
        let back = image.windows(2).position(|bytes| bytes == [0x75, 0xdf]).unwrap();
        assert_eq!((back + 2).checked_sub(0x21), Some(touch));
    }

    #[test]
    fn a_walk_stays_within_ram_and_vcpus_walk_apart() {
        let walk = |vcpu| Walk::new(vcpu, log2_pages(16)).take(64).collect::<Vec<_>>();
        assert!(walk(3).iter().all(|page| *page < 4096));
        assert_ne!(walk(0), walk(1));
        assert_eq!(touches(1024, 16), 4096);
    }
}
