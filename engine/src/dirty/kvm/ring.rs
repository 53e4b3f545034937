//! KVM's rings.

use std::sync::{Arc, Mutex};

use kvm_bindings::{KVM_CAP_DIRTY_LOG_RING_ACQ_REL, kvm_dirty_gfn, kvm_enable_cap};
use kvm_ioctls::{VcpuFd, VmFd};

use super::slot::KvmSlot;
use super::slots::KvmSlots;
use super::sys::{self, Ring};
use crate::dirty::software::bitmap_of;
use crate::dirty::{Coverage, DirtyLog, DirtyLogError};
use crate::guest::{DirtyBitmap, RamBlock};
use crate::run::stop::lock;

/// The dirty rings of a VM: each vCPU lists the pages that it dirties. Cheap to clone; lives as
/// long as the VM.
///
/// ```text
///   create_vm ── KvmDirtyRings::enable ── create_vcpu ── add_vcpu ── ...
///   vCPU threads:  run() ── exit 31, ring full ── collect() ── run()
///   a migration:   builder.dirty_log(unsafe { rings.log(slots) })
/// ```
///
/// A sync has KVM look at the pages that were written and no other, where bitmaps are fetched as
/// large as the guest is.
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
    /// A migration is under way.
    in_use: bool,
    /// What was collected of its slots.
    slots: Vec<Written>,
}

/// Pages of a slot that were written.
#[derive(Debug)]
struct Written {
    id: u32,
    pages: DirtyBitmap,
}

impl Written {
    fn of(slot: &KvmSlot) -> Self {
        Self { id: slot.id, pages: DirtyBitmap::new(slot.pages()) }
    }
}

impl KvmDirtyRings {
    /// Gives every vCPU that is made from now on a ring of `entries`: a power of two, 1024..=65536
    /// on most hosts. A vCPU leaves its guest each time its ring is full; 4096 entries (64 KiB) are
    /// 16 MiB of written memory.
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

    /// Takes over the ring of a new vCPU, before it runs. Only this log may map and harvest it.
    ///
    /// # Errors
    /// The ring cannot be mapped: a vCPU of a VM that has no rings.
    pub fn add_vcpu(&self, vcpu: &VcpuFd) -> Result<(), DirtyLogError> {
        let ring = Ring::map(vcpu, self.entries)
            .map_err(|cause| DirtyLogError::new("mapping a vCPU's dirty ring").because(cause))?;
        lock(&self.collected).rings.push(ring);
        Ok(())
    }

    /// Empties all rings. A vCPU's thread calls it when KVM_RUN returned KVM_EXIT_DIRTY_RING_FULL
    /// (31; kvm-ioctls gives `VcpuExit::Unsupported(31)`), whether or not a migration runs. What
    /// was written is kept for the migration's next sync. May wait for a sync that is under way.
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
        KvmDirtyRing {
            rings: self.clone(),
            slots: KvmSlots::new(Arc::clone(&self.vm), slots),
            started: false,
        }
    }
}

/// The dirty rings as the log of one migration. Writes of vCPUs only, as
/// [`KvmDirtyLog`](super::KvmDirtyLog).
///
/// On CPUs that buffer the log of writes themselves (Intel's PML), KVM lists what a running vCPU
/// wrote when it next leaves the guest: a sync may report such a page one sync late. None is lost:
/// the last sync comes when all vCPUs have left.
///
/// A clone serves the next attempt, with the same [`slots`](KvmDirtyRing::slots).
#[derive(Debug)]
pub struct KvmDirtyRing {
    rings: KvmDirtyRings,
    slots: KvmSlots,
    started: bool,
}

impl KvmDirtyRing {
    /// Tells the log of slots that come and go, also while a migration runs.
    pub fn slots(&self) -> KvmSlots {
        self.slots.clone()
    }

    /// As [`KvmDirtyLog::hotplug`](super::KvmDirtyLog::hotplug).
    #[must_use]
    pub fn hotplug(self, block: &RamBlock) -> Self {
        self.slots.hotplug(block);
        self
    }
}

impl DirtyLog for KvmDirtyRing {
    fn name(&self) -> &str {
        "kvm-ring"
    }

    fn start(&mut self, ram: &[RamBlock]) -> Result<(), DirtyLogError> {
        {
            let mut collected = lock(&self.rings.collected);
            if collected.in_use {
                return Err(DirtyLogError::new("the VM's dirty rings serve another migration"));
            }
            collected.in_use = true;
        }
        self.started = true;
        self.slots.claim(ram)?;
        self.slots.log_on(ram)?;
        // What the rings still hold of slots that logged before.
        let slots = self.slots.lock();
        let mut collected = lock(&self.rings.collected);
        collected.collect(self.slots.vm())?;
        collected.slots = slots.iter().map(|known| Written::of(&known.slot)).collect();
        Ok(())
    }

    fn covers(&self, block: &RamBlock) -> Coverage {
        self.slots.covers(block)
    }

    fn sync(&mut self, bitmaps: &[Arc<DirtyBitmap>]) -> Result<(), DirtyLogError> {
        // Locked to the end: between the taking of an entry and its page's protection, another
        // thread's `collect` must not leave a bit here for a page whose next write would not be
        // noted.
        let mut slots = self.slots.lock();
        let mut collected = lock(&self.rings.collected);
        // Entries of a slot that was added since the last sync were let go, its pages all count as
        // written now.
        collected.follow(slots.iter().map(|known| &known.slot));
        slots.follow(bitmaps)?;
        for known in slots.iter() {
            if !slots.is_there(self.slots.vm(), &known.slot)? {
                let text = format!("{} was removed, and KvmSlots was not told", known.slot);
                return Err(DirtyLogError::new(text));
            }
        }
        collected.collect(self.slots.vm())?;
        for known in slots.iter() {
            let written = collected.slot(known.slot.id).ok_or_else(|| {
                DirtyLogError::new(format!("the rings keep nothing of {} (a bug)", known.slot))
            })?;
            let bitmap = bitmap_of(bitmaps, known.place, known.slot.block.name())?;
            written.move_to_page(known.slot.first_page(), bitmap);
        }
        Ok(())
    }

    fn stop(&mut self) {
        if !std::mem::take(&mut self.started) {
            return;
        }
        let handle = self.slots.clone();
        self.slots.log_off(|slots, slot| slots.is_there(handle.vm(), slot).unwrap_or(true));
        let mut collected = lock(&self.rings.collected);
        collected.slots.clear();
        collected.in_use = false;
    }
}

impl Clone for KvmDirtyRing {
    fn clone(&self) -> Self {
        Self { rings: self.rings.clone(), slots: self.slots.clone(), started: false }
    }
}

impl Collected {
    /// Takes all entries, notes their pages, has the pages protected.
    fn collect(&mut self, vm: &VmFd) -> Result<(), DirtyLogError> {
        for ring in 0..self.rings.len() {
            while let Some((slot, page)) = self.rings.get_mut(ring).and_then(Ring::take) {
                self.unprotected = true;
                // Of a slot that does not migrate, or while nothing does, pages are only let go.
                let Some(written) = self.slot(slot) else { continue };
                let page = usize::try_from(page).map_err(|cause| {
                    DirtyLogError::new(format!("page {page} of KVM slot {slot:#x} in a dirty ring"))
                        .because(cause)
                })?;
                written.set(page);
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
        self.slots.iter().find(|written| written.id == id).map(|written| &written.pages)
    }

    /// Has a bitmap for each of `slots` and no other.
    fn follow<'a>(&mut self, slots: impl Iterator<Item = &'a KvmSlot>) {
        let mut before = std::mem::take(&mut self.slots);
        self.slots = slots
            .map(|slot| {
                let same = |written: &Written| written.id == slot.id && written.pages.pages() == slot.pages();
                match before.iter().position(same) {
                    Some(index) => before.swap_remove(index),
                    None => Written::of(slot),
                }
            })
            .collect();
    }
}
