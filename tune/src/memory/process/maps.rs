//! The mappings in /proc/PID/maps that may be a guest's RAM.

use std::ops::Range;

/// One mapping of the process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Mapping {
    /// Addresses in the process.
    pub(super) range: Range<u64>,
    /// Addresses in its name in /proc/PID/map_files; of several joined mappings, the first one's.
    pub(super) named: Range<u64>,
    /// Permissions as the kernel shows them: `rw-s`.
    permissions: String,
    /// Offset of its start in the file.
    pub(super) offset: u64,
    /// Device and inode of the file.
    file: (String, u64),
    path: String,
}

impl Mapping {
    pub(super) fn len(&self) -> u64 {
        self.range.end - self.range.start
    }

    /// Whether the pages belong to a file, and other processes may write them.
    pub(super) fn shared(&self) -> bool {
        self.permissions.ends_with('s') && self.file.1 != 0
    }

    fn may_be_ram(&self) -> bool {
        self.permissions.starts_with("rw-") && !self.device()
    }

    /// Whether the name is of something other than this process's memory. Reading has effects on
    /// some devices.
    fn device(&self) -> bool {
        /// Names of the kernel's own pages, of devices, and of queues that the kernel shares with a
        /// process.
        const DEVICES: [&str; 6] = ["[v", "anon_inode:", "/dmabuf:", "/dev/", "/proc/", "/sys/"];
        /// File systems in memory among these names, and the kernel's name of shared anonymous
        /// memory.
        const MEMORY: [&str; 3] = ["/dev/hugepages", "/dev/shm/", "/dev/zero (deleted)"];
        let starts = |names: &[&str]| names.iter().any(|name| self.path.starts_with(name));
        starts(&DEVICES) && !starts(&MEMORY)
    }

    /// Whether this and the mapping before were one. The kernel splits a mapping where a part is
    /// treated differently, by madvise for example. Anonymous mappings are not joined: one may be a
    /// heap beside RAM.
    fn continues(&self, before: &Self) -> bool {
        self.file.1 != 0
            && before.range.end == self.range.start
            && self.offset == before.offset + before.len()
            && (&before.permissions, &before.file, &before.path)
                == (&self.permissions, &self.file, &self.path)
    }
}

/// All mappings. A line in another form is left out.
pub(super) fn parse(maps: &str) -> Vec<Mapping> {
    maps.lines().filter_map(parse_line).collect()
}

/// The mappings that may be RAM, by the rule of [`super`].
pub(super) fn ram(mappings: &[Mapping]) -> Vec<Mapping> {
    let mut joined: Vec<Mapping> = Vec::new();
    for mapping in mappings.iter().filter(|mapping| mapping.may_be_ram()) {
        match joined.last_mut() {
            Some(before) if mapping.continues(before) => before.range.end = mapping.range.end,
            _ => joined.push(mapping.clone()),
        }
    }
    let largest = joined.iter().map(Mapping::len).max().unwrap_or(0);
    joined.retain(|mapping| mapping.len() >= largest / SMALLEST_PART);
    joined
}

/// Smallest block, as a part of the largest one. NUMA nodes and hotplugged memory are rarely
/// smaller; an emulator's own memory, with its display's, is rarely larger.
const SMALLEST_PART: u64 = 8;

/// `7f00-7fff rw-s 00000000 00:01 1027      /memfd:ram (deleted)`: proc_pid_maps(5).
fn parse_line(line: &str) -> Option<Mapping> {
    let mut fields = line.splitn(6, ' ');
    let (start, end) = fields.next()?.split_once('-')?;
    let range = hex(start)?..hex(end)?;
    let permissions = fields.next()?.to_owned();
    let offset = hex(fields.next()?)?;
    let file = (fields.next()?.to_owned(), fields.next()?.parse().ok()?);
    let path = fields.next().unwrap_or_default().trim_start().to_owned();
    (range.start < range.end).then(|| Mapping {
        named: range.clone(),
        range,
        permissions,
        offset,
        file,
        path,
    })
}

fn hex(text: &str) -> Option<u64> {
    u64::from_str_radix(text, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Mappings of a QEMU with 512 MiB, shortened: RAM in a file, translated code, a heap, a disk's
    /// buffers, video memory.
    const QEMU: &str = "\
55d0c0000000-55d0c0a00000 r-xp 00000000 fe:00 1234                       /usr/bin/qemu-system-x86_64
55d0c2000000-55d0c2800000 rw-p 00000000 00:00 0                          [heap]
7f1000000000-7f1040000000 rwxp 00000000 00:00 0 
7f1050000000-7f1051000000 rw-p 00000000 00:00 0 
7f1060000000-7f1070000000 rw-s 00000000 00:01 1027                       /memfd:a b (deleted)
7f1070000000-7f1080000000 rw-s 10000000 00:01 1027                       /memfd:a b (deleted)
7f1080000000-7f10c0000000 ---p 00000000 00:00 0 
7f10d0000000-7f10e0000000 rw-s 00000000 00:0e 99                         anon_inode:kvm-vcpu:0
7f10e0000000-7f1100000000 rw-s 00000000 00:05 77                         /dev/vfio/12
7f1110000000-7f1118000000 rw-p 00000000 00:00 0 
7ffd00000000-7ffd00021000 rw-p 00000000 00:00 0                          [stack]
";

    #[test]
    fn ram_is_large_and_writable_and_not_a_device() {
        let ram = ram(&parse(QEMU));
        let found: Vec<_> = ram.iter().map(|mapping| (mapping.range.start, mapping.len() >> 20)).collect();
        assert_eq!(found, [(0x7f10_6000_0000, 512), (0x7f11_1000_0000, 128)]);
        assert_eq!(ram[0].named, 0x7f10_6000_0000..0x7f10_7000_0000);
        assert!(ram[0].shared() && !ram[1].shared());
    }

    #[test]
    fn neighbours_are_one_block_only_within_a_file() {
        let maps = "1000-2000 rw-s 0 00:01 7 /dev/shm/a\n2000-3000 rw-s 0 00:01 8 /dev/shm/a\n\
            3000-4000 rw-s 5000 00:01 8 /dev/shm/a\n4000-5000 rw-p 0 00:00 0\n5000-6000 rw-p 0 00:00 0\n";
        let ram = ram(&parse(maps));
        assert_eq!(
            ram.iter().map(Mapping::len).collect::<Vec<_>>(),
            [0x1000, 0x1000, 0x1000, 0x1000, 0x1000]
        );
    }

    #[test]
    fn lines_in_another_form_are_left_out() {
        assert!(parse("\nmaps\n1000 rw-p\n2000-1000 rw-p 0 00:00 0\nx-y rw-p 0 00:00 0\n").is_empty());
        assert!(ram(&[]).is_empty());
    }
}
