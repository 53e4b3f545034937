//! KVM's bitmaps.

use std::io;
use std::sync::Arc;

use kvm_bindings::{KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, kvm_enable_cap};
use kvm_ioctls::VmFd;

use super::slot::KvmSlot;
use super::slots::{KvmSlots, Slot, Slots};
use super::sys::{self, SlotBitmap};
use crate::dirty::software::bitmap_of;
use crate::dirty::{Coverage, DirtyLog, DirtyLogError};
use crate::guest::{DirtyBitmap, RamBlock};

/// Words of a bitmap whose pages are protected in one call, during which KVM holds a lock that
/// vCPUs' faults take: 1 GiB.
const CLEAR_AT_ONCE: usize = 4096;

/// KVM_GET_DIRTY_LOG: writes of vCPUs, and of KVM for them. What the VMM's own threads write it
/// does not see: give the migration a second log for them, as [`SoftwareLog`](crate::SoftwareLog).
///
/// Where KVM can, pages are protected again by KVM_CLEAR_DIRTY_LOG, in pieces, so that vCPUs are
/// not blocked for long; otherwise KVM does it for a whole slot at each fetch. A VM with dirty
/// rings ([`KvmDirtyRings`](crate::KvmDirtyRings)) has no such bitmaps.
///
/// A clone serves the next attempt, with the same [`slots`](KvmDirtyLog::slots).
#[derive(Debug)]
pub struct KvmDirtyLog {
    slots: KvmSlots,
    manual_protect: bool,
    /// Whether KVM clears only the pages of KVM_CLEAR_DIRTY_LOG (manual protection).
    clears: bool,
    /// Started, and not stopped.
    serving: bool,
}

impl KvmDirtyLog {
    /// A log of these slots of `vm`. Their logging is on while a migration runs; when the first
    /// begins, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 is switched on for the VM, and stays on.
    ///
    /// # Safety
    /// When a migration starts, the VM must have every one of `slots` exactly as it says: with this
    /// guest address, this length, and this memory. A slot that is removed or changed later is
    /// reported to [`slots`](Self::slots) before. (KVM is told all of it to change a flag. It would
    /// map the memory of a slot that is not there, and keep the mapping when the memory is gone.)
    #[expect(unsafe_code, reason = "the slots must be true")]
    pub unsafe fn new(vm: Arc<VmFd>, slots: Vec<KvmSlot>) -> Self {
        Self { slots: KvmSlots::new(vm, slots), manual_protect: true, clears: false, serving: false }
    }

    /// Tells the log of slots that come and go, also while a migration runs.
    pub fn slots(&self) -> KvmSlots {
        self.slots.clone()
    }

    /// Declares that slots over `block` may come and go, and that all changes are reported to
    /// [`slots`](Self::slots): so all of the block counts as covered, and not only what has a slot
    /// when the migration begins.
    #[must_use]
    pub fn hotplug(self, block: &RamBlock) -> Self {
        self.slots.hotplug(block);
        self
    }

    /// Has KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 off instead: for a VM whose own code fetches the dirty
    /// logs of other slots, a display's perhaps, and counts on KVM to clear them.
    #[must_use]
    pub fn without_manual_protect(mut self) -> Self {
        self.manual_protect = false;
        self
    }

    fn choose_who_clears(&mut self) -> Result<(), DirtyLogError> {
        let (vm, cap) = (self.slots.vm(), KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2);
        let offered = u32::try_from(vm.check_extension_raw(cap.into())).unwrap_or(0);
        if offered & KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE != 0 {
            let mode = if self.manual_protect { KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE } else { 0 };
            let mode = kvm_enable_cap { cap, args: [mode.into(), 0, 0, 0], ..Default::default() };
            vm.enable_cap(&mode).map_err(|cause| {
                DirtyLogError::new("setting KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2").because(cause)
            })?;
            self.clears = self.manual_protect;
        }
        Ok(())
    }

    /// Moves what KVM has noted to `report`.
    fn take(
        &self,
        slots: &mut Slots,
        mut report: impl FnMut(&Slot, &[u64]) -> Result<(), DirtyLogError>,
    ) -> Result<(), DirtyLogError> {
        for known in slots.iter_mut() {
            let bitmap =
                fetch(self.slots.vm(), &known.slot).map_err(|cause| not_fetched(&known.slot, cause))?;
            known.keep(bitmap.words());
            // Before they are cleared: what KVM forgets must be known here. A write that comes in
            // between is to a page that is reported, and happens before the page is read.
            report(known, bitmap.words())?;
            if self.clears {
                clear(self.slots.vm(), &known.slot, bitmap.words())?;
            }
        }
        Ok(())
    }
}

impl DirtyLog for KvmDirtyLog {
    fn name(&self) -> &str {
        "kvm"
    }

    fn start(&mut self, ram: &[RamBlock]) -> Result<(), DirtyLogError> {
        self.slots.claim(ram)?;
        self.serving = true;
        self.choose_who_clears()?;
        self.slots.log_on(ram)?;
        // What a slot that was logging before has noted, which may be all its pages, none of them
        // protected.
        self.take(&mut self.slots.lock(), |_, _| Ok(()))
    }

    fn covers(&self, block: &RamBlock) -> Coverage {
        self.slots.covers(block)
    }

    fn sync(&mut self, bitmaps: &[Arc<DirtyBitmap>]) -> Result<(), DirtyLogError> {
        // Locked to the end: a slot that is fetched here must not be removed or made anew
        // meanwhile.
        let mut slots = self.slots.lock();
        slots.follow(bitmaps)?;
        self.take(&mut slots, |known, words| {
            let bitmap = bitmap_of(bitmaps, known.place, known.slot.block.name())?;
            for (word, bits) in words.iter().enumerate().filter(|(_, bits)| **bits != 0) {
                bitmap.set_bits(known.slot.first_page() + word * 64, *bits);
            }
            Ok(())
        })
    }

    fn stop(&mut self) {
        if !std::mem::take(&mut self.serving) {
            return;
        }
        let slots = self.slots.clone();
        // Only a slot that is there and logs has a bitmap.
        let gone = |error: &io::Error| error.raw_os_error() == Some(libc::ENOENT);
        slots.log_off(|_, slot| !fetch(slots.vm(), slot).is_err_and(|error| gone(&error)));
    }
}

impl Clone for KvmDirtyLog {
    fn clone(&self) -> Self {
        Self { slots: self.slots.clone(), manual_protect: self.manual_protect, clears: false, serving: false }
    }
}

/// One bit for each page of a slot that logs.
fn fetch(vm: &VmFd, slot: &KvmSlot) -> io::Result<SlotBitmap> {
    let mut bitmap = SlotBitmap::new(slot.pages())?;
    sys::get_dirty_log(vm, slot.id, &mut bitmap)?;
    Ok(bitmap)
}

fn not_fetched(slot: &KvmSlot, cause: io::Error) -> DirtyLogError {
    let why = match cause.raw_os_error() {
        Some(libc::ENOENT) => ": it was removed or made anew, and KvmSlots was not told",
        Some(libc::EFAULT) => ": it has become longer, and KvmSlots was not told",
        _ => "",
    };
    DirtyLogError::new(format!("fetching the dirty log of {slot}{why}")).because(cause)
}

/// Has KVM clear what is set in `bitmap` and protect those pages: at most [`CLEAR_AT_ONCE`] words a
/// call, from the first set one on.
fn clear(vm: &VmFd, slot: &KvmSlot, bitmap: &[u64]) -> Result<(), DirtyLogError> {
    for (piece, words) in bitmap.chunks(CLEAR_AT_ONCE).enumerate() {
        let Some(clean) = words.iter().position(|bits| *bits != 0) else { continue };
        let (_, words) = words.split_at(clean);
        let first = (piece * CLEAR_AT_ONCE + clean) * 64;
        let pages = (words.len() * 64).min(slot.pages() - first);
        #[expect(clippy::cast_possible_truncation, reason = "at most 64 x CLEAR_AT_ONCE")]
        let pages = pages as u32;
        sys::clear_dirty_log(vm, slot.id, first as u64, pages, words).map_err(|cause| {
            let changed =
                if cause.raw_os_error() == Some(libc::EINVAL) { ": has it become shorter?" } else { "" };
            DirtyLogError::new(format!("clearing the dirty log of {slot}{changed}")).because(cause)
        })?;
    }
    Ok(())
}
