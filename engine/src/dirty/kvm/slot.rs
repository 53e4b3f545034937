//! A memory slot of KVM's, and the RAM block that it shows to the guest.

use std::ops::Range;

use vm_memory::{Address, GuestAddress};

use super::sys;
use crate::dirty::DirtyLogError;
use crate::guest::{PAGE, RamBlock};

/// A memory slot of a VM: a piece of a RAM block, and where the guest sees it.
///
/// The values that the VMM gave KVM by KVM_SET_USER_MEMORY_REGION. A slot that is read-only for the
/// guest has KVM_MEM_READONLY among its [`flags`](Self::flags), and needs no log if nothing else
/// writes there, either.
#[derive(Clone, Debug)]
pub struct KvmSlot {
    pub(super) id: u32,
    pub(super) flags: u32,
    pub(super) guest_address: GuestAddress,
    pub(super) block: RamBlock,
    /// Bytes of the block.
    range: Range<u64>,
}

impl KvmSlot {
    /// Slot `id` (the address space in the upper 16 bits), that shows all of `block` from
    /// `guest_address` on.
    pub fn new(id: u32, guest_address: GuestAddress, block: &RamBlock) -> Self {
        Self { id, flags: 0, guest_address, block: block.clone(), range: 0..block.used_len() }
    }

    /// Shows these bytes of the block only: whole pages.
    #[must_use]
    pub fn part(mut self, range: Range<u64>) -> Self {
        self.range = range;
        self
    }

    /// The flags that the slot has while nothing migrates. Default: none.
    #[must_use]
    pub fn flags(mut self, flags: u32) -> Self {
        self.flags = flags;
        self
    }

    pub(super) fn pages(&self) -> usize {
        pages(self.range.end.saturating_sub(self.range.start))
    }

    /// The block's page that is the slot's first.
    pub(super) fn first_page(&self) -> usize {
        pages(self.range.start)
    }

    /// The block's pages that it shows.
    pub(super) fn page_range(&self) -> Range<usize> {
        self.first_page()..pages(self.range.end)
    }

    pub(super) fn region(&self, flags: u32) -> Result<sys::Region, DirtyLogError> {
        let page = PAGE as u64;
        let wrong = || {
            DirtyLogError::new(format!(
                "{self}: bytes {}..{} of {}, expected whole pages of it",
                self.range.start,
                self.range.end,
                self.block.used_len()
            ))
        };
        let len = self.range.end.checked_sub(self.range.start).ok_or_else(wrong)?;
        if !self.range.start.is_multiple_of(page) || !len.is_multiple_of(page) || len == 0 {
            return Err(wrong());
        }
        let offset = usize::try_from(self.range.start).map_err(|_| wrong())?;
        let memory = usize::try_from(len).ok().and_then(|len| self.block.memory().slice(offset, len));
        let memory = memory.ok_or_else(wrong)?;
        Ok(sys::Region {
            slot: self.id,
            flags,
            guest_phys_addr: self.guest_address.raw_value(),
            memory_size: len,
            userspace_addr: memory.ptr_guard().as_ptr() as u64,
        })
    }
}

impl std::fmt::Display for KvmSlot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "KVM slot {:#x} of RAM block {}", self.id, self.block.name())
    }
}

fn pages(bytes: u64) -> usize {
    usize::try_from(bytes / PAGE as u64).unwrap_or(usize::MAX)
}
