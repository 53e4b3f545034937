//! KVM's memory slots, and the RAM blocks that they show to the guest.

use std::ops::Range;
use std::sync::Arc;

use kvm_bindings::KVM_MEM_LOG_DIRTY_PAGES;
use kvm_ioctls::VmFd;
use vm_memory::{Address, GuestAddress};

use super::sys;
use crate::dirty::DirtyLogError;
use crate::dirty::software::place_of;
use crate::ram::{PAGE, RamBlock};

/// A memory slot of a VM: a piece of a RAM block, and where the guest sees it.
///
/// It says what the VMM told KVM by KVM_SET_USER_MEMORY_REGION. Slots that are read-only for the guest need no log.
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
    /// Slot `id` (the address space in the upper 16 bits), that shows all of `block` from `guest_address` on.
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

    fn region(&self, flags: u32) -> Result<sys::Region, DirtyLogError> {
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

/// The slots of one log, and which of them have their logging on.
#[derive(Debug)]
pub(super) struct Slots {
    vm: Arc<VmFd>,
    slots: Vec<KvmSlot>,
    /// Where each slot's block stands in the migration's list.
    places: Vec<usize>,
    /// Slots from the first on that log now.
    logging: usize,
}

impl Slots {
    pub(super) fn new(vm: Arc<VmFd>, slots: Vec<KvmSlot>) -> Self {
        Self { vm, places: vec![0; slots.len()], slots, logging: 0 }
    }

    /// Every slot, with the place of its block.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&KvmSlot, usize)> {
        self.slots.iter().zip(self.places.iter().copied())
    }

    pub(super) fn vm(&self) -> &VmFd {
        &self.vm
    }

    /// Has KVM note writes to all slots. After an error, `log_off` must follow.
    pub(super) fn log_on(&mut self, ram: &[RamBlock]) -> Result<(), DirtyLogError> {
        for (slot, place) in self.slots.iter().zip(&mut self.places) {
            *place = place_of(slot.block.name(), slot.block.pages(), ram)?;
            let region = slot.region(slot.flags | KVM_MEM_LOG_DIRTY_PAGES)?;
            sys::set_region(&self.vm, region).map_err(|cause| {
                DirtyLogError::new(format!("switching the dirty log of {slot} on")).because(cause)
            })?;
            self.logging += 1;
        }
        Ok(())
    }

    /// Gives the slots their flags back.
    pub(super) fn log_off(&mut self) {
        for slot in self.slots.iter().take(std::mem::take(&mut self.logging)) {
            let off = slot.region(slot.flags).map(|region| sys::set_region(&self.vm, region));
            if let Ok(Err(error)) = off {
                // The guest runs on, a little slower.
                tracing::warn!(%slot, %error, "the dirty log stays on");
            }
        }
    }
}
