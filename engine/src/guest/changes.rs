//! What a VMM does to guest memory that is no write: it plugs and unplugs, takes pages back,
//! resizes.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use multifd_wire::BlockName;

use super::{DirtyBitmap, PAGE, RamBlock};
use crate::error::{Error, ErrorKind, Phase, Result};

/// Tells migrations which parts of RAM blocks are there, as QEMU's RamDiscardManager does: for
/// virtio-mem, a balloon, free page reporting, memory hot-unplug. Made once beside the blocks,
/// given to [`SourceBuilder::ram_changes`](crate::SourceBuilder::ram_changes) of every attempt;
/// clones go to the threads that change the memory, and may be used at any time, whether or not a
/// migration runs.
///
/// ```text
///   unplug, protect, unmap        unplug(block, pages), then MADV_DONTNEED, MADV_REMOVE, PROT_NONE, munmap
///   plug again                    the memory is mapped and accessible, then plug(block, pages)
///   balloon, free page reporting  MADV_DONTNEED, MADV_REMOVE, FALLOC_FL_PUNCH_HOLE, then emptied(block, pages)
///   resize, remove                resized(block, bytes or 0), then the change if it is shorter
///   a block more                  added(block)
/// ```
///
/// What is unplugged arrives as zero, whatever the memory holds, and is not touched from the moment
/// that `unplug` returns: it waits until no worker reads the block. Writes are not told here:
/// plugged memory needs a dirty log (see [`KvmSlots`](crate::KvmSlots)).
///
/// ```
/// # use multifd_engine::{HostMemory, RamBlock, RamChanges, PAGE};
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let ram = [RamBlock::new("virtio-mem".try_into()?, HostMemory::anonymous(512 * PAGE)?)];
/// let changes = RamChanges::new(&ram);
/// changes.unplug(ram[0].name(), 256..512)?; // what the guest does not have yet
/// // SourceBuilder::ram_changes(&changes), for every attempt
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct RamChanges {
    blocks: Arc<RwLock<Vec<Arc<BlockChanges>>>>,
    in_use: Arc<AtomicBool>,
}

/// Makes the changes serve one migration, until it is dropped.
#[derive(Debug)]
pub(crate) struct Attached {
    changes: RamChanges,
    /// Blocks that were known when it began.
    known: usize,
}

/// What is known of one block.
#[derive(Debug)]
pub(crate) struct BlockChanges {
    name: BlockName,
    /// Locked for reading for as long as pages are read.
    parts: RwLock<Parts>,
}

#[derive(Debug)]
pub(crate) struct Parts {
    /// How long the block is now.
    bytes: u64,
    unplugged: DirtyBitmap,
    /// Pages whose content has changed without a write since the last round.
    changed: DirtyBitmap,
}

impl RamChanges {
    /// For these blocks, all of which are plugged and as long as they are now.
    pub fn new(ram: &[RamBlock]) -> Self {
        let blocks = ram.iter().map(BlockChanges::new).collect();
        Self { blocks: Arc::new(RwLock::new(blocks)), in_use: Arc::default() }
    }

    /// The guest has a block more. A migration that runs ends with an error that names it, since it
    /// has announced its blocks; the next one is given this block, too.
    ///
    /// # Errors
    /// `ApiMisuse`: there is a block of this name.
    pub fn added(&self, block: &RamBlock) -> Result<()> {
        let mut blocks = self.blocks.write().unwrap_or_else(PoisonError::into_inner);
        if blocks.iter().any(|known| known.name == *block.name()) {
            let detail = format!("RAM block {} was added, and there is one of that name", block.name());
            return Err(Error::new(ErrorKind::ApiMisuse, Phase::Active, detail));
        }
        blocks.push(BlockChanges::new(block));
        Ok(())
    }

    /// These pages are about to be taken away: before they are, protected or unmapped. Returns when
    /// no worker of a migration reads any page of the block any more, which may take as long as the
    /// sending of a packet, and no migration does until [`plug`](Self::plug).
    ///
    /// # Errors
    /// `ApiMisuse`: there is no such block, or it is shorter.
    pub fn unplug(&self, block: &BlockName, pages: Range<usize>) -> Result<()> {
        let known = self.find(block)?;
        let parts = known.write();
        parts.check(block, &pages)?;
        parts.unplugged.set_range(pages.start, pages.len());
        parts.changed.set_range(pages.start, pages.len());
        Ok(())
    }

    /// These pages are there again, mapped and accessible, and what they hold belongs to the guest.
    ///
    /// # Errors
    /// As [`unplug`](Self::unplug).
    pub fn plug(&self, block: &BlockName, pages: Range<usize>) -> Result<()> {
        let known = self.find(block)?;
        let parts = known.write();
        parts.check(block, &pages)?;
        parts.changed.set_range(pages.start, pages.len());
        pages.for_each(|page| _ = parts.unplugged.take(page));
        Ok(())
    }

    /// What these pages held was given back to the host, and they read as zero, or as what the
    /// guest has written since: it may use them without a word. To be called after that.
    ///
    /// # Errors
    /// As [`unplug`](Self::unplug).
    pub fn emptied(&self, block: &BlockName, pages: Range<usize>) -> Result<()> {
        let known = self.find(block)?;
        let parts = known.read();
        parts.check(block, &pages)?;
        parts.changed.set_range(pages.start, pages.len());
        Ok(())
    }

    /// The block is `bytes` long from now on, 0 if it goes; to be called before it is made shorter,
    /// or unmapped. A migration that runs ends with an error that names the block and both sizes:
    /// what it has announced does not exist any more. The next one is of the block as it is then.
    ///
    /// # Errors
    /// `ApiMisuse`: there is no such block.
    pub fn resized(&self, block: &BlockName, bytes: u64) -> Result<()> {
        let known = self.find(block)?;
        let mut parts = known.write();
        let pages = usize::try_from(bytes / PAGE as u64).unwrap_or(usize::MAX);
        // A migration of the longer block still asks for what is behind the new end.
        let all = pages.max(parts.unplugged.pages());
        let (unplugged, changed) = (DirtyBitmap::new(all), DirtyBitmap::new(all));
        parts.unplugged.move_to(&unplugged);
        parts.changed.move_to(&changed);
        let before = usize::try_from(parts.bytes / PAGE as u64).unwrap_or(usize::MAX);
        unplugged.set_range(pages, all - pages);
        (before..pages).for_each(|page| _ = unplugged.take(page));
        *parts = Parts { bytes, unplugged, changed };
        Ok(())
    }

    fn find(&self, name: &BlockName) -> Result<Arc<BlockChanges>> {
        let found = self.blocks().iter().find(|block| block.name == *name).cloned();
        found.ok_or_else(|| {
            Error::new(
                ErrorKind::ApiMisuse,
                Phase::Active,
                format!("changes of RAM block {name}: it is unknown"),
            )
        })
    }

    fn blocks(&self) -> RwLockReadGuard<'_, Vec<Arc<BlockChanges>>> {
        self.blocks.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has them serve a migration of `ram`.
    pub(crate) fn attach(&self, ram: &[RamBlock]) -> Result<Attached> {
        let misuse = |text: String| Error::new(ErrorKind::ApiMisuse, Phase::Setup, text);
        if self.in_use.swap(true, Ordering::Relaxed) {
            return Err(misuse("the changes of RAM serve another migration".to_owned()));
        }
        let attached = Attached { changes: self.clone(), known: self.blocks().len() };
        for block in ram {
            let Some(changes) = attached.of(block) else { continue };
            let parts = changes.read();
            if parts.bytes != block.used_len() {
                let (name, bytes, here) = (block.name(), parts.bytes, block.used_len());
                return Err(misuse(format!("RAM block {name} has {here} bytes, and was resized to {bytes}")));
            }
            // Every page is sent once after this.
            parts.changed.move_to(&DirtyBitmap::new(0));
        }
        Ok(attached)
    }
}

impl Attached {
    /// Those of a block. `None`: it does not change.
    pub(crate) fn of(&self, block: &RamBlock) -> Option<Arc<BlockChanges>> {
        self.changes.blocks().iter().find(|changes| changes.name == *block.name()).cloned()
    }

    /// An error if there is a block that the migration has not announced.
    pub(crate) fn check(&self) -> Result<()> {
        let blocks = self.changes.blocks();
        let Some(added) = blocks.get(self.known) else { return Ok(()) };
        let detail = format!("RAM block {} was added while the guest migrates", added.name);
        Err(Error::new(ErrorKind::GuestMemory, Phase::Active, detail))
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        self.changes.in_use.store(false, Ordering::Relaxed);
    }
}

impl BlockChanges {
    fn new(block: &RamBlock) -> Arc<Self> {
        let pages = block.pages();
        let (unplugged, changed) = (DirtyBitmap::new(pages), DirtyBitmap::new(pages));
        let parts = Parts { bytes: block.used_len(), unplugged, changed };
        Arc::new(Self { name: block.name().clone(), parts: RwLock::new(parts) })
    }

    /// Keeps the block as it is for as long as its pages are read.
    pub(crate) fn read(&self) -> RwLockReadGuard<'_, Parts> {
        self.parts.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Parts> {
        self.parts.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds what has changed since the last call to `dirty`; an error if `block` has another length
    /// now.
    pub(crate) fn sync(&self, block: &RamBlock, dirty: &DirtyBitmap) -> Result<()> {
        let parts = self.read();
        if parts.bytes != block.used_len() {
            let (name, before, now) = (&self.name, block.used_len(), parts.bytes);
            let detail =
                format!("RAM block {name} was resized from {before} to {now} bytes while it migrates");
            return Err(Error::new(ErrorKind::GuestMemory, Phase::Active, detail));
        }
        parts.changed.move_to(dirty);
        Ok(())
    }
}

impl Parts {
    pub(crate) fn is_unplugged(&self, page: usize) -> bool {
        self.unplugged.test(page)
    }

    fn check(&self, name: &BlockName, pages: &Range<usize>) -> Result<()> {
        let here = self.bytes / PAGE as u64;
        if pages.start <= pages.end && pages.end as u64 <= here {
            return Ok(());
        }
        let Range { start, end } = pages;
        let detail = format!("changes of pages {start}..{end} of RAM block {name}: it has {here}");
        Err(Error::new(ErrorKind::ApiMisuse, Phase::Active, detail))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::HostMemory;

    fn ram() -> [RamBlock; 1] {
        [RamBlock::new("ram".try_into().unwrap(), HostMemory::anonymous(128 * PAGE).unwrap())]
    }

    fn dirty(changes: &BlockChanges, block: &RamBlock) -> Vec<usize> {
        let dirty = DirtyBitmap::new(block.pages());
        changes.sync(block, &dirty).unwrap();
        (0..block.pages()).filter(|page| dirty.test(*page)).collect()
    }

    #[test]
    fn what_was_unplugged_plugged_or_emptied_is_sent_again_once() {
        let ram = ram();
        let changes = RamChanges::new(&ram);
        let name = ram[0].name();
        changes.unplug(name, 60..70).unwrap();
        let attached = changes.attach(&ram).unwrap();
        let block = attached.of(&ram[0]).unwrap();
        assert_eq!(dirty(&block, &ram[0]), [0; 0], "of before the start, when all pages are sent");
        assert!(
            block.read().is_unplugged(60) && block.read().is_unplugged(69) && !block.read().is_unplugged(70)
        );
        changes.plug(name, 60..62).unwrap();
        changes.unplug(name, 127..128).unwrap();
        changes.emptied(name, 3..5).unwrap();
        assert_eq!(dirty(&block, &ram[0]), [3, 4, 60, 61, 127]);
        assert_eq!(dirty(&block, &ram[0]), [0; 0]);
        assert!(
            !block.read().is_unplugged(60) && block.read().is_unplugged(127) && !block.read().is_unplugged(3)
        );
    }

    #[test]
    fn what_is_not_there_cannot_change() {
        let ram = ram();
        let changes = RamChanges::new(&ram);
        let says = |result: Result<()>| result.unwrap_err().to_string();
        let other = "dimm".try_into().unwrap();
        assert!(says(changes.emptied(&other, 0..1)).contains("RAM block dimm: it is unknown"));
        let text = "changes of pages 127..129 of RAM block ram: it has 128";
        assert!(says(changes.unplug(ram[0].name(), 127..129)).contains(text));
        changes.resized(ram[0].name(), 64 * PAGE as u64).unwrap();
        assert!(says(changes.plug(ram[0].name(), 63..65)).contains("it has 64"));
    }

    #[test]
    fn a_block_that_is_added_ends_the_migration_and_belongs_to_the_next() {
        let ram = ram();
        let changes = RamChanges::new(&ram);
        let attached = changes.attach(&ram).unwrap();
        attached.check().unwrap();
        let dimm = RamBlock::new("dimm".try_into().unwrap(), HostMemory::anonymous(PAGE).unwrap());
        changes.added(&dimm).unwrap();
        let error = attached.check().unwrap_err();
        assert!(error.to_string().contains("RAM block dimm was added while"), "{error}");
        changes.added(&dimm).unwrap_err();
        drop(attached);
        let attached = changes.attach(&ram).unwrap();
        attached.check().unwrap();
        assert!(attached.of(&dimm).is_some());
    }

    #[test]
    fn a_resized_block_ends_the_migration_and_not_the_next() {
        let (ram, page) = (ram(), PAGE as u64);
        let changes = RamChanges::new(&ram);
        let attached = changes.attach(&ram).unwrap();
        assert!(changes.attach(&ram).unwrap_err().to_string().contains("serve another migration"));
        let block = attached.of(&ram[0]).unwrap();
        for bytes in [127 * page, 129 * page] {
            changes.resized(ram[0].name(), bytes).unwrap();
            let error = block.sync(&ram[0], &DirtyBitmap::new(128)).unwrap_err();
            let text = format!("RAM block ram was resized from 524288 to {bytes} bytes while it migrates");
            assert!(error.to_string().contains(&text), "{error}");
            assert_eq!(block.read().is_unplugged(127), bytes < 128 * page);
        }
        drop(attached);
        assert!(changes.attach(&ram).unwrap_err().to_string().contains("has 524288 bytes, and was resized"));
        changes.resized(ram[0].name(), 128 * page).unwrap();
        assert_eq!(dirty(&changes.attach(&ram).unwrap().of(&ram[0]).unwrap(), &ram[0]), [0; 0]);
    }
}
