//! The smallest guest: a boot sector that rewrites pages for ever and counts on its serial port.

use std::{fmt::Write as _, fs::File, io::Write as _, path::Path};

use crate::{Failure, Outcome};

/// A boot sector of 512 bytes. Each lap writes the lap's number (32 bits, little-endian) to bytes 0
/// and 0x800 of every page of its range; each Nth lap it sends a 16-bit counter to COM1 as four hex
/// digits and a newline: 0000, 0001 ... ffff, 0000 ... It waits for the serial port before each
/// byte, so no byte is lost, and the lines of a guest that moved continue where it left off
/// ([`check_sequence`]).
#[derive(Clone, Copy, Debug)]
pub struct BootSector {
    first_page: u32,
    pages: u32,
    laps_per_line: u32,
    laps_per_second: Option<u16>,
}

impl BootSector {
    /// 128 pages from 0x10000 on, as fast as the CPU can (a core of the host is busy), a line each
    /// 4096 laps.
    pub fn new() -> Self {
        Self { first_page: 0x10, pages: 128, laps_per_line: 4096, laps_per_second: None }
    }

    /// Which pages are rewritten: `count` of them, at least one, from page number `first` on. Below
    /// page 0x10 is the boot sector; pages 0x9f to 0xff are the BIOS's; any other RAM will do.
    #[must_use]
    pub fn pages(mut self, first: u32, count: u32) -> Self {
        self.first_page = first.max(0x10);
        self.pages = count.max(1);
        self
    }

    /// Laps between two lines, rounded up to a power of two.
    #[must_use]
    pub fn laps_per_line(mut self, laps: u32) -> Self {
        self.laps_per_line = laps.next_power_of_two();
        self
    }

    /// One lap per timer interrupt, 19 to 1000 a second, and idle in between: the host's cores stay
    /// free. A line each lap, unless [`BootSector::laps_per_line`] is called afterwards.
    #[must_use]
    pub fn laps_per_second(mut self, laps: u16) -> Self {
        self.laps_per_second = Some(laps.clamp(19, 1000));
        self.laps_per_line(1)
    }

    /// Writes a floppy image that boots this guest.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write_floppy(&self, path: &Path) -> Outcome {
        let mut file = File::create(path)?;
        file.write_all(&self.image()?)?;
        // The length says which kind of floppy it is: 1.44 MB, nearly all of it a hole.
        Ok(file.set_len(1_474_560)?)
    }

    /// Writes a firmware image that is this guest: no BIOS runs before it, which would take seconds
    /// under a KVM that emulates it. For [`QemuBuilder::firmware`](crate::QemuBuilder::firmware),
    /// and without [`BootSector::laps_per_second`], whose interrupts a BIOS sets up.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write_firmware(&self, path: &Path) -> Outcome {
        let mut image = self.image()?;
        image.extend(MOVE_TO_7C00);
        image.resize(FIRMWARE_LEN - RESET_VECTOR.len(), 0);
        image.extend(RESET_VECTOR);
        Ok(std::fs::write(path, image)?)
    }

    /// The boot sector.
    ///
    /// # Errors
    /// When the listing below is not what it should be.
    pub fn image(&self) -> Outcome<Vec<u8>> {
        let mut image = Vec::with_capacity(512);
        for line in LISTING.lines().filter(|line| line.contains('|')) {
            let code = line.split('|').next().unwrap_or_default();
            for item in code.split_whitespace() {
                self.append(item, &mut image)?;
            }
        }
        if image.len() > 510 {
            return Err(Failure::new(format!("boot sector: {} bytes of code, limit is 510", image.len())));
        }
        image.resize(510, 0);
        image.extend([0x55, 0xaa]);
        Ok(image)
    }

    /// Appends one item of the listing: a byte in hex, or a name in capitals.
    fn append(&self, item: &str, image: &mut Vec<u8>) -> Outcome {
        match item {
            "FIRST" => image.extend((self.first_page << 12).to_le_bytes()),
            "PAGES" => image.extend(self.pages.to_le_bytes()),
            "LINE" => image.extend((self.laps_per_line - 1).to_le_bytes()),
            // sti; hlt, or two nops
            "PACE" => image.extend(if self.laps_per_second.is_some() { [0xfb, 0xf4] } else { [0x90, 0x90] }),
            "TIMER" => {
                let divisor = TIMER_HZ / u32::from(self.laps_per_second.unwrap_or(19));
                image.extend(divisor.to_le_bytes().iter().take(2));
            }
            byte => image.push(u8::from_str_radix(byte, 16)?),
        }
        Ok(())
    }
}

impl Default for BootSector {
    fn default() -> Self {
        Self::new()
    }
}

/// Checks that serial output is the guest's counter without a gap or a repetition, from 0000 or
/// from wherever the text begins. The text may start and end within a line. Gives the number of
/// whole lines.
///
/// # Errors
/// At the first line that is not the one before it plus one.
pub fn check_sequence(text: &str) -> Outcome<usize> {
    let Some((whole, rest)) = text.rsplit_once('\n') else { return Ok(0) };
    let mut expected: Option<u16> = None;
    let mut lines = 0;
    for (number, line) in whole.split('\n').enumerate() {
        if number == 0 && line.len() < 4 {
            continue;
        }
        let wrong = || {
            Failure::new(format!("serial line {number} is {line:?}, the one before was {expected:04x?} - 1"))
        };
        let value = u16::from_str_radix(line, 16).map_err(|_| wrong())?;
        if line.len() != 4 || expected.is_some_and(|expected| expected != value) {
            return Err(wrong());
        }
        expected = Some(value.wrapping_add(1));
        lines += 1;
    }
    let mut next = String::new();
    write!(next, "{:04x}", expected.unwrap_or_default())?;
    if expected.is_some() && !next.starts_with(rest) {
        return Err(Failure::new(format!("serial output ends with {rest:?}, {next} was expected")));
    }
    Ok(lines)
}

/// Bytes of a firmware image: those from F000:0000 to the end of the first megabyte.
const FIRMWARE_LEN: usize = 1 << 16;

/// At F000:0200, behind the boot sector: copies it to 0000:7C00 and goes there. cli; cld; ds =
/// F000; es = si = 0; di = 7C00; cx = 100; rep movsw; jmp 0000:7C00.
const MOVE_TO_7C00: [u8; 26] = [
    0xfa, 0xfc, 0xb8, 0x00, 0xf0, 0x8e, 0xd8, 0x31, 0xc0, 0x8e, 0xc0, 0x31, 0xf6, 0xbf, 0x00, 0x7c, 0xb9,
    0x00, 0x01, 0xf3, 0xa5, 0xea, 0x00, 0x7c, 0x00, 0x00,
];

/// At F000:FFF0, where a CPU begins: jmp F000:0200.
const RESET_VECTOR: [u8; 16] = [0xea, 0x00, 0x02, 0x00, 0xf0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

/// The rate of the PC's interval timer, in Hz.
const TIMER_HZ: u32 = 1_193_182;

/// The program: bytes and what they mean, one instruction a line. It is loaded at 0000:7C00 in real
/// mode. Data is reached through a flat 4 GiB segment, so that the pages may lie anywhere below 4
/// GiB. `ebp` is the lap, `si` the line's counter.
const LISTING: &str = "
    EA 05 7C 00 00          | jmp 0:7C05         a known code segment, whatever the BIOS chose
    FA                      | cli
    31 C0                   | xor ax, ax
    8E D8                   | mov ds, ax
    8E D0                   | mov ss, ax
    BC 00 7C                | mov sp, 7C00
    E4 92                   | in al, 92          address line 20 on
    0C 02                   | or al, 2
    24 FE                   | and al, FE
    E6 92                   | out 92, al
    0F 01 16 DE 7C          | lgdt [gdtr]
    0F 20 C0                | mov eax, cr0       into protected mode ...
    0C 01                   | or al, 1
    0F 22 C0                | mov cr0, eax
    BB 08 00                | mov bx, 8          ... for a flat data segment ...
    8E DB                   | mov ds, bx
    24 FE                   | and al, FE
    0F 22 C0                | mov cr0, eax       ... and back; the segment keeps its base and limit
    BA FB 03                | mov dx, 3FB        serial port: 8 bits, no FIFO, no interrupts
    B0 03                   | mov al, 3
    EE                      | out dx, al
    BA FA 03                | mov dx, 3FA
    30 C0                   | xor al, al
    EE                      | out dx, al
    4A                      | dec dx
    EE                      | out dx, al
    B0 34                   | mov al, 34         timer: rate generator
    E6 43                   | out 43, al
    B8 TIMER                | mov ax, TIMER
    E6 40                   | out 40, al
    88 E0                   | mov al, ah
    E6 40                   | out 40, al
    C7 06 20 00 C7 7C       | mov word [20], tick
    C7 06 22 00 00 00       | mov word [22], 0
    B0 FE                   | mov al, FE         no interrupt but the timer's
    E6 21                   | out 21, al
    B0 FF                   | mov al, FF
    E6 A1                   | out A1, al
    66 BD 01 00 00 00       | mov ebp, 1
    31 F6                   | xor si, si
    PACE                    | lap: sti; hlt      or nop; nop
    66 BF FIRST             | mov edi, FIRST
    66 B9 PAGES             | mov ecx, PAGES
    67 66 89 2F             | page: mov [edi], ebp
    67 66 89 AF 00 08 00 00 | mov [edi+800], ebp
    66 81 C7 00 10 00 00    | add edi, 1000
    66 49                   | dec ecx
    75 E9                   | jnz page
    66 45                   | inc ebp
    66 F7 C5 LINE           | test ebp, LINE
    75 D0                   | jnz lap
    89 F3                   | mov bx, si
    46                      | inc si
    B9 04 00                | mov cx, 4
    C1 C3 04                | digit: rol bx, 4
    88 D8                   | mov al, bl
    24 0F                   | and al, F
    3C 0A                   | cmp al, A
    72 02                   | jb decimal
    04 27                   | add al, 27
    04 30                   | decimal: add al, 30
    E8 09 00                | call putc
    E2 EC                   | loop digit
    B0 0A                   | mov al, A
    E8 02 00                | call putc
    EB AF                   | jmp lap
    88 C4                   | putc: mov ah, al
    BA FD 03                | mov dx, 3FD
    EC                      | ready: in al, dx
    A8 20                   | test al, 20        transmitter holding register empty?
    74 FB                   | jz ready
    BA F8 03                | mov dx, 3F8
    88 E0                   | mov al, ah
    EE                      | out dx, al
    C3                      | ret
    50                      | tick: push ax
    B0 20                   | mov al, 20         end of interrupt
    E6 20                   | out 20, al
    58                      | pop ax
    CF                      | iret
    00 00 00 00 00 00 00 00 | gdt
    FF FF 00 00 00 92 CF 00 | selector 8: data, base 0, limit 4 GiB
    0F 00 CE 7C 00 00       | gdtr
";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_image_is_a_boot_sector_with_its_parameters_in_place() {
        let image =
            BootSector::new().pages(0x100, 77).laps_per_second(100).laps_per_line(200).image().unwrap();
        assert_eq!(image.len(), 512);
        assert_eq!(image[510..], [0x55, 0xaa]);
        // Jump targets in the listing count on these places.
        assert_eq!(image[0x65..0x67], [0xfb, 0xf4], "pace");
        assert_eq!(image[0x69..0x6d], 0x10_0000_u32.to_le_bytes(), "first");
        assert_eq!(image[0x6f..0x73], 77_u32.to_le_bytes(), "pages");
        assert_eq!(image[0x8f..0x93], 255_u32.to_le_bytes(), "line");
        assert_eq!(image[0x41..0x43], 11_931_u16.to_le_bytes(), "timer");
        assert_eq!(image[0xc7], 0x50, "tick");
        assert_eq!(image[0xde..0xe2], [0x0f, 0x00, 0xce, 0x7c], "gdtr");
    }

    #[test]
    fn a_sequence_may_wrap_and_begin_and_end_within_a_line() {
        assert_eq!(check_sequence("").unwrap(), 0);
        assert_eq!(check_sequence("0000\n0001\n").unwrap(), 2);
        assert_eq!(check_sequence("fe\nffff\n0000\n00").unwrap(), 2);
    }

    #[test]
    fn gaps_repetitions_and_noise_are_found() {
        for wrong in
            ["0000\n0002\n", "0001\n0001\n", "0000\n1\n", "0000\nBIOS\n", "0009\n000a\n0001\n", "0000\n1"]
        {
            check_sequence(wrong).expect_err(wrong);
        }
    }
}
