//! How guest memory is mapped in this process: its protection, its file, and a userfaultfd that
//! fills its pages.

use std::fs::File;
use std::io::{self, Read as _, Seek as _};
use std::ops::Range;

use super::{PAGE, RamBlock};

/// The mappings of this process, in the order of their addresses.
#[derive(Debug)]
pub(crate) struct Mappings(Vec<Mapping>);

#[derive(Clone, Debug, PartialEq, Eq)]
struct Mapping {
    range: Range<u64>,
    protection: Protection,
    anonymous: bool,
    /// Its page faults go to a userfaultfd.
    paged: bool,
    /// Writes to it are watched by a userfaultfd.
    watched: bool,
    /// Bytes of its pages.
    page: usize,
    /// Its pages are locked in memory.
    locked: bool,
    /// No huge page is made of its pages.
    no_huge: bool,
}

/// What a pager has to know of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Paging {
    /// Bytes of a page that is there as a whole or not at all.
    pub(crate) host_page: usize,
    /// The kernel may put a huge page in the place of its pages.
    pub(crate) may_be_huge: bool,
}

/// What loads and stores may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Protection {
    pub(crate) read: bool,
    pub(crate) write: bool,
}

/// What a page of a block is when the page table of this process does not have it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Absent {
    /// Zero: private memory without a file.
    Zero,
    /// What the file behind the block has there.
    InFile,
    /// Not known without a fault.
    Unknown,
}

impl Mappings {
    /// With protection and kind, from /proc/self/maps: some tens of microseconds.
    pub(crate) fn read() -> io::Result<Self> {
        std::fs::read_to_string("/proc/self/maps").map(|text| Self::parse(&text))
    }

    /// With userfaultfds as well, from /proc/self/smaps: the kernel walks all page tables for it.
    pub(crate) fn read_with_pagers() -> io::Result<Self> {
        Self::with_pagers(&File::open("/proc/self/smaps")?)
    }

    /// The same from that file, which is open already.
    pub(crate) fn with_pagers(mut smaps: &File) -> io::Result<Self> {
        let mut text = String::new();
        smaps.rewind()?;
        smaps.read_to_string(&mut text)?;
        Ok(Self::parse(&text))
    }

    fn parse(text: &str) -> Self {
        let mut mappings: Vec<Mapping> = Vec::new();
        for line in text.lines() {
            if let Some(flags) = line.strip_prefix("VmFlags:") {
                if let Some(last) = mappings.last_mut() {
                    let has = |wanted: &str| flags.split(' ').any(|flag| flag == wanted);
                    // Faults on pages that are missing, and on pages of a file that this mapping
                    // does not have yet.
                    last.paged = has("um") || has("ui");
                    last.watched = has("uw");
                    (last.locked, last.no_huge) = (has("lo"), has("nh"));
                }
            } else if let Some(size) = line.strip_prefix("KernelPageSize:") {
                let kib = size.trim().strip_suffix(" kB").and_then(|kib| kib.parse::<usize>().ok());
                if let (Some(last), Some(kib)) = (mappings.last_mut(), kib) {
                    last.page = kib * 1024;
                }
            } else if let Some(mapping) = Mapping::parse(line) {
                mappings.push(mapping);
            }
        }
        Self(mappings)
    }

    /// The parts of a block and where in it they are, in bytes. Parts that are not mapped are left
    /// out.
    fn parts<'m>(&'m self, block: &RamBlock) -> impl Iterator<Item = (Range<u64>, &'m Mapping)> + use<'m> {
        let start = block.memory().address();
        let end = start + block.used_len();
        self.0.iter().filter(move |mapping| mapping.range.start < end && start < mapping.range.end).map(
            move |mapping| {
                (mapping.range.start.max(start) - start..mapping.range.end.min(end) - start, mapping)
            },
        )
    }

    /// Pages of the block that are filled by a userfaultfd's owner.
    pub(crate) fn paged(&self, block: &RamBlock) -> Option<Range<usize>> {
        self.parts(block).find(|(_, mapping)| mapping.paged).map(|(range, _)| pages(&range))
    }

    /// What a pager has to know of the block. Read with pagers.
    ///
    /// # Errors
    /// Why a pager cannot fill it.
    pub(crate) fn paging(&self, block: &RamBlock) -> Result<Paging, String> {
        let mut covered = 0;
        let mut paging = None;
        for (range, mapping) in self.parts(block) {
            covered += range.end - range.start;
            if mapping.paged {
                return Err("its page faults go to another userfaultfd already".to_owned());
            }
            if mapping.watched {
                return Err("its writes are watched by a userfaultfd, as by a dirty log".to_owned());
            }
            if mapping.locked {
                return Err("it is locked in memory".to_owned());
            }
            if !mapping.anonymous && block.memory().shared_file().is_none() {
                return Err("it is neither private memory nor shared with a file".to_owned());
            }
            let may_be_huge = !mapping.no_huge && !block.memory().is_huge();
            let this = Paging { host_page: mapping.page, may_be_huge };
            if paging.is_some_and(|first| first != this) {
                return Err("its parts are mapped differently".to_owned());
            }
            paging = Some(this);
        }
        let whole = paging.filter(|_| covered == block.used_len());
        whole.ok_or_else(|| "not all of it is mapped".to_owned())
    }

    /// What its absent pages are.
    pub(crate) fn absent(&self, block: &RamBlock) -> Absent {
        let mut covered = 0;
        let (mut anonymous, mut file) = (true, true);
        for (range, mapping) in self.parts(block) {
            covered += range.end - range.start;
            anonymous &= mapping.anonymous;
            file &= !mapping.anonymous;
        }
        match block.memory().file() {
            _ if covered != block.used_len() => Absent::Unknown,
            None if anonymous => Absent::Zero,
            Some(_) if file => Absent::InFile,
            _ => Absent::Unknown,
        }
    }

    /// The neighbours of a page that are mapped as it is, and how. `None`: it is not mapped.
    pub(crate) fn around(&self, block: &RamBlock, page: usize) -> Option<(Range<usize>, Protection)> {
        let at = (page * PAGE) as u64;
        let (range, mapping) = self.parts(block).find(|(range, _)| range.contains(&at))?;
        Some((pages(&range), mapping.protection))
    }

    /// Pages of the block that can be read and not written.
    pub(crate) fn read_only(&self, block: &RamBlock) -> Option<Range<usize>> {
        let read_only = |mapping: &Mapping| mapping.protection == Protection { read: true, write: false };
        self.parts(block).find(|(_, mapping)| read_only(mapping)).map(|(range, _)| pages(&range))
    }
}

fn pages(bytes: &Range<u64>) -> Range<usize> {
    let page = |bytes: u64| usize::try_from(bytes / PAGE as u64).unwrap_or(usize::MAX);
    page(bytes.start)..page(bytes.end)
}

impl Mapping {
    /// `7f00-7fff rw-s 00000000 00:01 1027      /memfd:ram (deleted)`: proc_pid_maps(5).
    fn parse(line: &str) -> Option<Self> {
        let mut fields = line.splitn(6, ' ');
        let (start, end) = fields.next()?.split_once('-')?;
        let hex = |text| u64::from_str_radix(text, 16).ok();
        let range = hex(start)?..hex(end)?;
        let permissions = fields.next()?;
        let inode = fields.nth(2)?;
        let path = fields.next().unwrap_or_default().trim_start();
        let private = permissions.ends_with('p');
        Some(Self {
            range,
            protection: Protection {
                read: permissions.starts_with('r'),
                write: permissions.get(1..2) == Some("w"),
            },
            // Private huge pages without a file are a file to the kernel, of this name.
            anonymous: private && (inode == "0" || path == "/anon_hugepage (deleted)"),
            paged: false,
            watched: false,
            page: PAGE,
            locked: false,
            no_huge: false,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMAPS: &str = "\
7f0000000000-7f0000001000 rw-p 00000000 00:00 0 
Size:                  4 kB
VmFlags: rd wr mr mw me ac nh lo
7f0000001000-7f0000002000 ---p 00000000 00:00 0 
VmFlags: mr mw me nr sd
7f0000002000-7f0000003000 rw-s 00000000 00:01 1027                       /memfd:a b (deleted)
VmFlags: rd wr sh mr mw me ms um sd
7f0000003000-7f0000203000 r--p 00000000 00:10 77                         /anon_hugepage (deleted)
KernelPageSize:     2048 kB
VmFlags: rd mr mw me ht
";

    #[test]
    fn protection_kind_and_pager_of_a_mapping_are_read() {
        let mappings = Mappings::parse(SMAPS).0;
        let seen: Vec<_> =
            mappings.iter().map(|m| (m.protection.read, m.protection.write, m.anonymous, m.paged)).collect();
        assert_eq!(
            seen,
            [
                (true, true, true, false),
                (false, false, true, false),
                (true, true, false, true),
                (true, false, true, false),
            ]
        );
        let sizes: Vec<_> = mappings.iter().map(|m| (m.page, m.locked, m.no_huge)).collect();
        let plain = (PAGE, false, false);
        assert_eq!(sizes, [(PAGE, true, true), plain, plain, (2 << 20, false, false)]);
    }
}
