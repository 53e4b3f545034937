//! The memory slots of a log, which come and go while it is on.

use std::sync::{Arc, Mutex, MutexGuard};

use kvm_bindings::KVM_MEM_LOG_DIRTY_PAGES;
use kvm_ioctls::VmFd;
use multifd_wire::BlockName;
use vm_memory::Address;

use super::slot::KvmSlot;
use super::sys;
use crate::dirty::software::{bitmap_of, place_of};
use crate::dirty::{Coverage, DirtyLogError};
use crate::guest::{DirtyBitmap, PAGE, RamBlock};
use crate::run::stop::lock;

/// Tells a KVM log which memory slots come and go, from any thread, also while a migration runs.
/// Cheap to clone.
///
/// KVM does not list its slots, and its logs cover only those that were added here. So a VMM that
/// plugs or unplugs memory (virtio-mem, a DIMM), moves a slot or makes it anew calls this around
/// it:
///
/// ```text
///   plug     KVM_SET_USER_MEMORY_REGION, then added(slot)
///   unplug   removing(id), then KVM_SET_USER_MEMORY_REGION of length 0
///   change   removing(id), the change, added(slot)
/// ```
///
/// `added` comes before the vCPUs are paused for the switch-over. A call waits for a sync that is
/// under way.
///
/// A VMM that logs a slot for itself as well (its [`KvmSlot::flags`] have KVM_MEM_LOG_DIRTY_PAGES),
/// for diff snapshots perhaps, gets what migrations have taken by [`taken`](Self::taken).
///
/// A slot that is removed without a call is noticed at the next sync, and fails the migration; by
/// rings only if the log has another slot. One that is replaced without a call is noticed by
/// bitmaps ([`KvmDirtyLog`](super::KvmDirtyLog)), not by rings. A slot that is added without a call
/// cannot be noticed: what the guest writes there is lost.
#[derive(Clone, Debug)]
pub struct KvmSlots {
    vm: Arc<VmFd>,
    state: Arc<Mutex<Slots>>,
}

/// The slots of one log.
#[derive(Debug, Default)]
pub(super) struct Slots {
    slots: Vec<Slot>,
    /// Blocks whose slots come and go.
    hotplug: Vec<BlockName>,
    /// The blocks of the migration under way.
    ram: Option<Vec<RamBlock>>,
    /// Pages of the blocks that count as written: of slots that came or went since the last sync.
    written: Vec<(KvmSlot, usize)>,
    /// Why the log is incomplete; `None`: it is complete.
    broken: Option<String>,
}

#[derive(Debug)]
pub(super) struct Slot {
    pub(super) slot: KvmSlot,
    /// Where its block stands in the migration's list.
    pub(super) place: usize,
    /// Its logging was switched on by us.
    logging: bool,
    /// Bits that were taken from a slot which the VMM logs for itself.
    taken: Vec<u64>,
}

impl KvmSlots {
    pub(super) fn new(vm: Arc<VmFd>, slots: Vec<KvmSlot>) -> Self {
        let slots = slots.into_iter().map(Slot::new).collect();
        Self { vm, state: Arc::new(Mutex::new(Slots { slots, ..Slots::default() })) }
    }

    /// A slot was added to the VM. While a migration runs, its logging is switched on and all its
    /// pages are sent again; if its block does not migrate, the migration fails at its next sync,
    /// and the slot stays as it is.
    ///
    /// # Errors
    /// KVM refuses to switch its logging on, or the log has a slot of this id already. A migration
    /// that runs fails, too.
    ///
    /// # Safety
    /// As for [`KvmDirtyLog::new`](super::KvmDirtyLog::new), until [`removing`](Self::removing).
    #[expect(unsafe_code, reason = "the slot must be true")]
    pub unsafe fn added(&self, slot: KvmSlot) -> Result<(), DirtyLogError> {
        let mut state = self.lock();
        let result = state.add(&self.vm, slot);
        if let (Some(_), Err(error)) = (&state.ram, &result) {
            state.broken = Some(error.to_string());
        }
        result
    }

    /// A slot is about to be removed from the VM, or changed: after this, the log leaves it alone.
    /// What vCPUs wrote there is sent as it is when the next round comes. False: the log does not
    /// have it.
    pub fn removing(&self, id: u32) -> bool {
        let mut state = self.lock();
        let Some(index) = state.slots.iter().position(|known| known.slot.id == id) else { return false };
        let Slot { slot, place, logging, .. } = state.slots.remove(index);
        if logging {
            state.written.push((slot, place));
        }
        true
    }

    /// The pages that migrations have taken from KVM's log of slot `id` since the last call, as
    /// KVM_GET_DIRTY_LOG tells them: a bit for each page of the slot. KVM forgets what is fetched,
    /// so after an attempt the VMM ORs these to the next bits that it fetches for itself.
    ///
    /// `None`: nothing was taken, or the log has no such slot, or the VMM does not log it for
    /// itself.
    pub fn taken(&self, id: u32) -> Option<Vec<u64>> {
        let mut state = self.lock();
        let known = state.slots.iter_mut().find(|known| known.slot.id == id)?;
        Some(std::mem::take(&mut known.taken)).filter(|bits| !bits.is_empty())
    }

    pub(super) fn hotplug(&self, block: &RamBlock) {
        self.lock().hotplug.push(block.name().clone());
    }

    pub(super) fn vm(&self) -> &VmFd {
        &self.vm
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Slots> {
        lock(&self.state)
    }

    pub(super) fn covers(&self, block: &RamBlock) -> Coverage {
        let state = self.lock();
        if !state.ram.iter().flatten().any(|migrating| migrating.name() == block.name()) {
            return Coverage::Nothing;
        }
        if state.hotplug.contains(block.name()) {
            return Coverage::Whole;
        }
        let slots = state.slots.iter().filter(|known| known.slot.block.name() == block.name());
        Coverage::Pages(slots.map(|known| known.slot.page_range()).collect())
    }

    /// Makes these slots serve a migration of `ram`, and no other until `log_off`.
    pub(super) fn claim(&self, ram: &[RamBlock]) -> Result<(), DirtyLogError> {
        let mut state = self.lock();
        if state.ram.is_some() {
            return Err(DirtyLogError::new("the log serves another migration"));
        }
        state.ram = Some(ram.to_vec());
        Ok(())
    }

    /// Has KVM note writes to all slots, after `claim`. After an error, `log_off` must follow.
    pub(super) fn log_on(&self, ram: &[RamBlock]) -> Result<(), DirtyLogError> {
        let mut state = self.lock();
        let Slots { slots, .. } = &mut *state;
        slots.iter_mut().try_for_each(|known| known.log_on(&self.vm, ram))
    }

    /// Gives the slots that `is_there` finds their flags back. KVM would make the others anew, with
    /// memory that the VMM may have unmapped.
    pub(super) fn log_off(&self, is_there: impl Fn(&Slots, &KvmSlot) -> bool) {
        let mut state = self.lock();
        let gone: Vec<u32> = state
            .iter()
            .map(|known| &known.slot)
            .filter(|slot| !is_there(&state, slot))
            .map(|slot| slot.id)
            .collect();
        for known in state.slots.iter_mut().filter(|known| known.logging) {
            let slot = &known.slot;
            known.logging = false;
            if gone.contains(&slot.id) {
                tracing::warn!(%slot, "not there any more, its flags are left alone");
                continue;
            }
            let off = slot.region(slot.flags).map(|region| sys::set_region(&self.vm, region));
            if let Ok(Err(error)) = off {
                // The guest runs on, a little slower.
                tracing::warn!(%slot, %error, "the dirty log stays on");
            }
        }
        state.ram = None;
        state.written.clear();
        state.broken = None;
    }
}

impl Slots {
    fn add(&mut self, vm: &VmFd, slot: KvmSlot) -> Result<(), DirtyLogError> {
        if self.slots.iter().any(|known| known.slot.id == slot.id) {
            return Err(DirtyLogError::new(format!(
                "{slot} was added, but the log has a slot of that number"
            )));
        }
        let mut new = Slot::new(slot);
        if let Some(ram) = &self.ram {
            match place_of(new.slot.block.name(), new.slot.block.pages(), ram) {
                // The guest has its memory, and this migration cannot take it along.
                Err(error) => self.broken = Some(format!("{} was added: {error}", new.slot)),
                Ok(place) => {
                    self.written.push((new.slot.clone(), place));
                    new.log_on(vm, ram)?;
                }
            }
        }
        self.slots.push(new);
        Ok(())
    }

    /// Every slot of a migrating block.
    pub(super) fn iter(&self) -> impl Iterator<Item = &Slot> {
        self.slots.iter().filter(|known| known.logging)
    }

    /// The same, to keep what is taken.
    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = &mut Slot> {
        self.slots.iter_mut().filter(|known| known.logging)
    }

    /// Whether KVM has the slot, where it has no bitmap that would tell. It is probed through
    /// another slot of the same address space; with none, the slot counts as there.
    pub(super) fn is_there(&self, vm: &VmFd, slot: &KvmSlot) -> Result<bool, DirtyLogError> {
        let other = self
            .slots
            .iter()
            .map(|known| &known.slot)
            .find(|other| other.id != slot.id && other.id >> 16 == slot.id >> 16);
        let Some(other) = other.filter(|_| slot.pages() > 1) else { return Ok(true) };
        let memory_size = PAGE as u64;
        let guest_phys_addr = other.guest_address.raw_value();
        let probe = sys::Region { memory_size, guest_phys_addr, ..slot.region(slot.flags)? };
        Ok(sys::slot_is_there(vm, probe))
    }

    /// Marks all pages of slots that came or went, and fails if the migration cannot follow.
    pub(super) fn follow(&mut self, bitmaps: &[Arc<DirtyBitmap>]) -> Result<(), DirtyLogError> {
        for (slot, place) in self.written.drain(..) {
            bitmap_of(bitmaps, place, slot.block.name())?.set_range(slot.first_page(), slot.pages());
        }
        self.broken.as_ref().map_or(Ok(()), |why| Err(DirtyLogError::new(why.clone())))
    }
}

impl Slot {
    fn new(slot: KvmSlot) -> Self {
        Self { slot, place: 0, logging: false, taken: Vec::new() }
    }

    /// Keeps bits that KVM forgets now, if the VMM needs them for itself.
    pub(super) fn keep(&mut self, bits: &[u64]) {
        if self.slot.flags & KVM_MEM_LOG_DIRTY_PAGES != 0 {
            self.taken.resize(bits.len(), 0);
            self.taken.iter_mut().zip(bits).for_each(|(taken, bits)| *taken |= bits);
        }
    }

    fn log_on(&mut self, vm: &VmFd, ram: &[RamBlock]) -> Result<(), DirtyLogError> {
        self.place = place_of(self.slot.block.name(), self.slot.block.pages(), ram)?;
        let region = self.slot.region(self.slot.flags | KVM_MEM_LOG_DIRTY_PAGES)?;
        sys::set_region(vm, region).map_err(|cause| {
            DirtyLogError::new(format!("switching the dirty log of {} on", self.slot)).because(cause)
        })?;
        self.logging = true;
        Ok(())
    }
}
