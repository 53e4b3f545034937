//! The announced blocks, and who provides the memory for them.

use std::collections::HashMap;
use std::sync::Arc;

use multifd_wire::{BlockEntry, BlockName, Configuration};

use super::BlockSink;
use super::page_bits::PageBits;
use crate::error::{Error, ErrorKind, Phase, Result};
use crate::guest::{Absent, Mappings, PageTable, RamBlock};

/// Provider of the memory for the blocks that a source announces.
///
/// [`open`](Self::open) is called once, on the receiving thread, before any page arrives. Return exactly one block for each
/// entry, in any order, with the entry's name and length; refuse what does not fit your machine
/// with an error of your own.
///
/// A `Vec<RamBlock>` is the provider of a VMM whose memory is there already.
pub trait IncomingRam: Send {
    /// What the source's embedder has said of its VM by
    /// [`SourceBuilder::vm_state`](crate::SourceBuilder::vm_state), before [`open`](Self::open): to
    /// make the VM of it, or to refuse it while nothing has moved. Not called if nothing was said.
    ///
    /// # Errors
    /// Whatever makes this machine unfit for that VM. By default: it is not expected here.
    fn configure(
        &mut self,
        _name: &str,
        _version: u32,
        _state: &[u8],
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        Err("it is not expected here".into())
    }

    /// Memory for `announced`. Lengths are whole pages; names are unique; the sum is bounded by the
    /// peer's word only, so map lazily.
    ///
    /// # Errors
    /// Whatever makes this machine unfit for these blocks.
    fn open(
        &mut self,
        configuration: &Configuration,
        announced: &[BlockEntry],
    ) -> Result<Vec<RamBlock>, Box<dyn std::error::Error + Send + Sync>>;
}

impl IncomingRam for Vec<RamBlock> {
    fn open(
        &mut self,
        _configuration: &Configuration,
        _announced: &[BlockEntry],
    ) -> Result<Self, Box<dyn std::error::Error + Send + Sync>> {
        Ok(self.clone())
    }
}

/// All blocks of the migration, by the name on the wire.
pub(crate) struct BlockSinks(HashMap<BlockName, Arc<BlockSink>>);

/// A block of which pages never came.
#[derive(Debug, PartialEq, Eq)]
pub(in crate::destination) struct Gap {
    pub(in crate::destination) block: String,
    /// Pages that never came, of how many, and the first of them.
    pub(in crate::destination) pages: usize,
    pub(in crate::destination) of: usize,
    pub(in crate::destination) first: usize,
    /// Firmware, of which nothing is ever left out.
    pub(in crate::destination) is_firmware: bool,
}

impl BlockSinks {
    /// Checks that `blocks` are what was announced: the same names, the same lengths, and can be
    /// written.
    pub(crate) fn new(announced: &[BlockEntry], blocks: &[RamBlock]) -> Result<Self> {
        RamBlock::check_all(blocks)
            .map_err(|problem| Error::new(ErrorKind::ApiMisuse, Phase::Setup, problem))?;
        let mut by_name = HashMap::with_capacity(announced.len());
        let mappings = Mappings::read()
            .inspect_err(|error| tracing::warn!(%error, "how guest memory is mapped cannot be seen"))
            .ok();
        let page_table = Arc::new(PageTable::of_this_process());
        for entry in announced {
            let Some(block) = blocks.iter().find(|block| *block.name() == entry.name) else {
                return Err(incompatible(format!("RAM block {} is unknown here", entry.name)));
            };
            let here = block.used_len();
            if here != entry.used_len {
                return Err(incompatible(format!(
                    "RAM block {} has {} bytes at the source, {here} here",
                    entry.name, entry.used_len
                )));
            }
            let absent = mappings.as_ref().map_or(Absent::Unknown, |mappings| mappings.absent(block));
            let read_only = is_read_only(mappings.as_ref(), block)?;
            let sink = BlockSink::new(block, read_only, absent, &page_table);
            by_name.insert(entry.name.clone(), Arc::new(sink));
        }
        let of_source = |block: &RamBlock| announced.iter().any(|entry| entry.name == *block.name());
        if let Some(extra) = blocks.iter().find(|block| !of_source(block)) {
            return Err(incompatible(format!(
                "RAM block {} is here, and the source has none of that name: it would stay as it is",
                extra.name()
            )));
        }
        Ok(Self(by_name))
    }

    pub(crate) fn find(&self, name: &str) -> Result<&Arc<BlockSink>> {
        let unknown = || Error::misbehaved(Phase::Active, format!("page for unknown RAM block {name:?}"));
        self.0.get(name).ok_or_else(unknown)
    }

    /// From now on it is noted which pages come.
    pub(in crate::destination) fn note_recent(&self) {
        self.all().for_each(|sink| _ = sink.recent.set(PageBits::new(sink.block.pages())));
    }

    /// All that has come is known to the source.
    pub(in crate::destination) fn forget_recent(&self) {
        self.all().filter_map(|sink| sink.recent.get()).for_each(PageBits::clear);
    }

    /// The stream begins again, over another link: the source knows what has come.
    pub(in crate::destination) fn begin_link(&self) {
        self.forget_recent();
        self.forget_comparisons();
    }

    /// All of them.
    pub(in crate::destination) fn all(&self) -> impl Iterator<Item = &Arc<BlockSink>> {
        self.0.values()
    }

    /// How many blocks.
    pub(in crate::destination) fn len(&self) -> usize {
        self.0.len()
    }

    /// Blocks of which pages never came, by name.
    pub(in crate::destination) fn gaps(&self) -> Vec<Gap> {
        let mut gaps: Vec<Gap> = self.0.values().filter_map(|sink| sink.gap()).collect();
        gaps.sort_by(|one, other| one.block.cmp(&other.block));
        gaps
    }
}

/// A block that is mapped for reading only is written through its file, if that is the same memory.
fn is_read_only(mappings: Option<&Mappings>, block: &RamBlock) -> Result<bool> {
    let Some(pages) = mappings.and_then(|mappings| mappings.read_only(block)) else { return Ok(false) };
    if block.memory().file_is_writable() {
        return Ok(true);
    }
    let detail = format!(
        "pages {}..{} of RAM block {} are mapped for reading only, and no file open for writing is shared with them; map \
         them for writing until the guest has arrived",
        pages.start,
        pages.end,
        block.name()
    );
    Err(Error::new(ErrorKind::GuestMemory, Phase::Setup, detail))
}

fn incompatible(detail: String) -> Error {
    Error::incompatible(Phase::Setup, detail)
}

#[cfg(test)]
mod tests {
    use super::super::Mapping;
    use super::*;
    use crate::guest::{HostMemory, PAGE};

    /// Shared memory on a file system of that many bytes, which no other thread sees. `None`: this
    /// process may not mount.
    #[expect(unsafe_code, reason = "mounting has no safe wrapper")]
    fn on_small_file_system(bytes: usize, pages: usize) -> Option<RamBlock> {
        let directory = tempfile::tempdir().unwrap();
        let path = std::ffi::CString::new(directory.path().to_str().unwrap()).unwrap();
        let size = std::ffi::CString::new(format!("size={bytes}")).unwrap();
        let none = std::ptr::null();
        // SAFETY: takes no pointer; it is this thread that gets mounts of its own.
        let apart = unsafe { libc::unshare(libc::CLONE_NEWNS) } == 0;
        // SAFETY: all pointers are C strings or null.
        let private = apart
            && unsafe {
                libc::mount(none, c"/".as_ptr(), none, libc::MS_REC | libc::MS_PRIVATE, none.cast())
            } == 0;
        // SAFETY: as above.
        let mounted = private
            && unsafe {
                libc::mount(c"tmpfs".as_ptr(), path.as_ptr(), c"tmpfs".as_ptr(), 0, size.as_ptr().cast())
            } == 0;
        if !mounted {
            return None;
        }
        let path = directory.path().join("ram");
        let file = std::fs::File::options().read(true).write(true).create_new(true).open(path).unwrap();
        file.set_len((pages * PAGE) as u64).unwrap();
        Some(RamBlock::new("ram".try_into().unwrap(), HostMemory::map_file(file, pages * PAGE).unwrap()))
    }

    fn sink(block: &RamBlock) -> Arc<BlockSink> {
        let entry = BlockEntry {
            name: block.name().clone(),
            used_len: block.used_len(),
            page_size: None,
            guest_address: None,
            mapped_ram: None,
        };
        let sinks = BlockSinks::new(&[entry], std::slice::from_ref(block)).unwrap();
        Arc::clone(sinks.find("ram").unwrap())
    }

    #[test]
    fn a_block_that_the_source_does_not_have_or_that_is_there_twice_is_refused() {
        let block =
            |name: &str| RamBlock::new(name.try_into().unwrap(), HostMemory::anonymous(4 * PAGE).unwrap());
        let entry = |block: &RamBlock| BlockEntry {
            name: block.name().clone(),
            used_len: block.used_len(),
            page_size: None,
            guest_address: None,
            mapped_ram: None,
        };
        let (ram, dimm) = (block("ram"), block("dimm"));
        let refused = |blocks: &[RamBlock]| BlockSinks::new(&[entry(&ram)], blocks).err().unwrap();
        let error = refused(&[ram.clone(), dimm]);
        assert_eq!(error.kind(), ErrorKind::Incompatible);
        assert!(error.to_string().contains("RAM block dimm is here"), "{error}");
        let error = refused(&[ram.clone(), block("ram")]);
        assert_eq!(error.kind(), ErrorKind::ApiMisuse);
        assert!(error.to_string().contains("two RAM blocks are called ram"), "{error}");
    }

    #[test]
    fn discards_of_what_is_no_page_and_of_parts_of_huge_pages_are_refused() {
        const HUGE: usize = 512;
        let memory = HostMemory::anonymous(4 * HUGE * PAGE).unwrap();
        let sink = sink(&RamBlock::new("ram".try_into().unwrap(), memory));
        sink.note_written(0, 4 * HUGE);
        let discard = |offset: u64, len: u64| sink.discard(multifd_wire::DiscardRange { offset, len });
        let (page, end) = (PAGE as u64, (4 * HUGE * PAGE) as u64);
        for (offset, len) in
            [(1, page), (0, 0), (0, page / 2), (end, page), (end - page, 2 * page), (page, u64::MAX)]
        {
            let error = discard(offset, len).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::PeerMisbehaved, "{offset:#x} {len:#x}");
            assert!(error.to_string().contains("a discard of"), "{error}");
        }
        assert!(sink.missing(HUGE).unwrap().is_empty());
        discard(HUGE as u64 * page, HUGE as u64 * page).unwrap();
        assert_eq!(sink.missing(HUGE).unwrap(), vec![HUGE..2 * HUGE]);
        for part in [0, HUGE - 1, HUGE / 2] {
            let at = (2 * HUGE + part) as u64 * page;
            discard(at, page).unwrap();
            let error = sink.missing(HUGE).unwrap_err();
            let says = "only a part of the 512 pages around page";
            assert!(error.to_string().contains(says) && error.kind() == ErrorKind::PeerMisbehaved, "{error}");
            let missing: usize = sink.missing(1).unwrap().into_iter().map(|gap| gap.len()).sum();
            assert_eq!(missing, HUGE + 1, "a page of 4 KiB may go alone");
            sink.note_written(2 * HUGE, HUGE);
        }
    }

    /// A difference that makes the first byte of a zero page 7.
    const DELTA: [u8; 3] = [0, 1, 7];

    /// A read of a hole through the mapping would have to fill it.
    #[test]
    fn a_hole_of_a_full_file_system_is_read_and_its_difference_refused() {
        let Some(block) = on_small_file_system(16 * PAGE, 64) else {
            eprintln!("skipped: this process may not mount");
            return;
        };
        for block in [block.clone(), block.fresh()] {
            let sink = sink(&block);
            let mut first = 0;
            while sink.write(first, &[1; PAGE], &Mapping).is_ok() {
                first += 1;
            }
            assert!((1..64).contains(&first));
            sink.clear([63, 62]).unwrap();
            let error = sink.apply(63, &DELTA).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::GuestMemory, "{}", error.chain());
            sink.apply(0, &DELTA).unwrap();
            sink.clear([first - 1]).unwrap();
            assert!(block.is_zero(first - 1));
        }
    }
}
