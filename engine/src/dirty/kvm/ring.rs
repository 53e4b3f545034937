//! KVM's rings.

use std::sync::{Arc, Mutex};

use kvm_bindings::{KVM_CAP_DIRTY_LOG_RING_ACQ_REL, kvm_dirty_gfn, kvm_enable_cap};
use kvm_ioctls::{VcpuFd, VmFd};

use super::slot::{KvmSlot, Slots};
use super::sys::{self, Ring};
use crate::dirty::{DirtyLog, DirtyLogError};
use crate::ram::{DirtyBitmap, RamBlock};
use crate::stop::lock;

/// The dirty rings of a VM: each vCPU lists the pages that it dirties. Cheap to clone; lives as long as the VM.
///
/// ```text
///   create_vm ── KvmDirtyRings::enable ── create_vcpu ── add_vcpu ── ...
///   vCPU threads:  run() ── exit 31, ring full ── collect() ── run()
///   a migration:   builder.dirty_log(unsafe { rings.log(slots) })
/// ```
///
/// A sync has KVM look at the pages that were written and no other, where bitmaps are fetched as large as the guest is.
#[derive(Clone, Debug)]
pub struct KvmDirtyRings {
    vm: Arc<VmFd>,
    entries: u32,
    collected: Arc<Mutex<Collected>>,
}

#[derive(Debug, Default)]
struct Collected {
    rings: Vec<Ring>,
    /// Entries were taken whose pages KVM has not protected again.
    unprotected: bool,
    /// The slots of the migration under way, by id, and what was collected of them.
    slots: Vec<(u32, DirtyBitmap)>,
}

impl KvmDirtyRings {
    /// Gives every vCPU that is made from now on a ring of `entries`: a power of two, 1024..=65536 on most hosts. A vCPU
    /// leaves its guest each time its ring is full; 4096 entries (64 KiB) are 16 MiB of written memory.
    ///
    /// # Errors
    /// KVM has no rings, or not of this size; or the VM has vCPUs already.
    pub fn enable(vm: Arc<VmFd>, entries: u32) -> Result<Self, DirtyLogError> {
        let cap = KVM_CAP_DIRTY_LOG_RING_ACQ_REL;
        let most = u64::try_from(vm.check_extension_raw(cap.into())).unwrap_or(0);
        let bytes = u64::from(entries) * size_of::<kvm_dirty_gfn>() as u64;
        if bytes > most || !entries.is_power_of_two() {
            let most = most / size_of::<kvm_dirty_gfn>() as u64;
            return Err(DirtyLogError::new(format!(
                "dirty rings of {entries} entries, expected a power of two up to {most}"
            )));
        }
        let enable = kvm_enable_cap { cap, args: [bytes, 0, 0, 0], ..Default::default() };
        vm.enable_cap(&enable).map_err(|cause| {
            DirtyLogError::new(format!("enabling dirty rings of {entries} entries")).because(cause)
        })?;
        Ok(Self { vm, entries, collected: Arc::default() })
    }

    /// Takes over the ring of a new vCPU, before it runs: nobody else may map and harvest it.
    ///
    /// # Errors
    /// The ring cannot be mapped: a vCPU of a VM that has no rings.
    pub fn add_vcpu(&self, vcpu: &VcpuFd) -> Result<(), DirtyLogError> {
        let ring = Ring::map(vcpu, self.entries)
            .map_err(|cause| DirtyLogError::new("mapping a vCPU's dirty ring").because(cause))?;
        lock(&self.collected).rings.push(ring);
        Ok(())
    }

    /// Empties all rings. A vCPU's thread calls it when KVM_RUN returned KVM_EXIT_DIRTY_RING_FULL (31; kvm-ioctls gives
    /// `VcpuExit::Unsupported(31)`), whether or not a migration runs. What was written is kept for the migration's next
    /// sync. May wait for a sync that is under way.
    ///
    /// # Errors
    /// KVM does not take the entries back.
    pub fn collect(&self) -> Result<(), DirtyLogError> {
        lock(&self.collected).collect(&self.vm)
    }

    /// The log of a migration: these slots of the VM. One at a time.
    ///
    /// # Safety
    /// As [`KvmDirtyLog::new`](super::KvmDirtyLog::new).
    #[expect(unsafe_code, reason = "the slots must be true")]
    pub unsafe fn log(&self, slots: Vec<KvmSlot>) -> KvmDirtyRing {
        KvmDirtyRing { rings: self.clone(), slots: Slots::new(Arc::clone(&self.vm), slots), started: false }
    }
}

/// The dirty rings as the log of one migration. Writes of vCPUs only, as [`KvmDirtyLog`](super::KvmDirtyLog).
///
/// On CPUs that buffer the log of writes themselves (Intel's PML), KVM lists what a running vCPU wrote when it next leaves
/// the guest: a sync may report such a page one sync late. None is lost: the last sync comes when all vCPUs have left.
#[derive(Debug)]
pub struct KvmDirtyRing {
    rings: KvmDirtyRings,
    slots: Slots,
    started: bool,
}

impl DirtyLog for KvmDirtyRing {
    fn name(&self) -> &str {
        "kvm-ring"
    }

    fn start(&mut self, ram: &[RamBlock]) -> Result<(), DirtyLogError> {
        {
            let mut collected = lock(&self.rings.collected);
            if !collected.slots.is_empty() {
                return Err(DirtyLogError::new("the VM's dirty rings serve another migration"));
            }
            let bitmap = |slot: &KvmSlot| (slot.id, DirtyBitmap::new(slot.pages()));
            collected.slots = self.slots.iter().map(|(slot, _)| bitmap(slot)).collect();
            collected.slots.sort_by_key(|(id, _)| *id);
        }
        self.started = true;
        self.slots.log_on(ram)?;
        // What the rings still hold of slots that logged before.
        let mut collected = lock(&self.rings.collected);
        collected.collect(self.slots.vm())?;
        collected.slots.iter().for_each(|(_, written)| written.move_to(&DirtyBitmap::new(0)));
        Ok(())
    }

    fn sync(&mut self, bitmaps: &[Arc<DirtyBitmap>]) -> Result<(), DirtyLogError> {
        // Locked to the end: between the taking of an entry and its page's protection, another thread's `collect` must not
        // leave a bit here for a page whose next write would not be noted.
        let mut collected = lock(&self.rings.collected);
        collected.collect(self.slots.vm())?;
        for (slot, place) in self.slots.iter() {
            if let (Some(written), Some(bitmap)) = (collected.slot(slot.id), bitmaps.get(place)) {
                written.move_to_page(slot.first_page(), bitmap);
            }
        }
        Ok(())
    }

    fn stop(&mut self) {
        self.slots.log_off();
        if std::mem::take(&mut self.started) {
            lock(&self.rings.collected).slots.clear();
        }
    }
}

impl Collected {
    /// Takes all entries, notes their pages, has the pages protected.
    fn collect(&mut self, vm: &VmFd) -> Result<(), DirtyLogError> {
        for ring in 0..self.rings.len() {
            while let Some((slot, page)) = self.rings.get_mut(ring).and_then(Ring::take) {
                self.unprotected = true;
                // A slot that nobody migrates, or none does now: its pages are only let go.
                if let (Some(written), Ok(page)) = (self.slot(slot), usize::try_from(page)) {
                    written.set(page);
                }
            }
        }
        if self.unprotected {
            sys::reset_dirty_rings(vm)
                .map_err(|cause| DirtyLogError::new("resetting the dirty rings").because(cause))?;
            self.unprotected = false;
        }
        Ok(())
    }

    fn slot(&self, id: u32) -> Option<&DirtyBitmap> {
        let index = self.slots.binary_search_by_key(&id, |(id, _)| *id).ok()?;
        self.slots.get(index).map(|(_, written)| written)
    }
}
