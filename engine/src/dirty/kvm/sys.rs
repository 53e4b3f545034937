//! The requests of KVM's migration interface that kvm-ioctls has not, or has as unsafe functions.
#![expect(unsafe_code, reason = "requests with pointers, and a ring that is shared with the kernel")]

use std::io;
use std::os::fd::AsRawFd;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU32, Ordering};

use kvm_bindings::{
    KVM_DIRTY_LOG_PAGE_OFFSET, kvm_clear_dirty_log, kvm_clear_dirty_log__bindgen_ty_1, kvm_dirty_gfn,
    kvm_dirty_log, kvm_dirty_log__bindgen_ty_1,
};
use kvm_ioctls::{VcpuFd, VmFd};

use crate::guest::PAGE;
use crate::os::ioctl::request;

pub(super) use kvm_bindings::kvm_userspace_memory_region as Region;

const KIND: u8 = 0xae;
const KVM_GET_DIRTY_LOG: libc::Ioctl = request(1, KIND, 0x42, size_of::<kvm_dirty_log>());
const KVM_CLEAR_DIRTY_LOG: libc::Ioctl = request(3, KIND, 0xc0, size_of::<kvm_clear_dirty_log>());
const KVM_RESET_DIRTY_RINGS: libc::Ioctl = request(0, KIND, 0xc7, 0);

const _: () = assert!(KVM_GET_DIRTY_LOG == 0x4010_ae42 && KVM_CLEAR_DIRTY_LOG == 0xc018_aec0);
const _: () = assert!(KVM_RESET_DIRTY_RINGS == 0xaec7);

/// Changes the flags of a slot. What else `region` says must be what the slot has: KVM makes a slot
/// that is not there, and moves one that is at another guest address.
pub(super) fn set_region(vm: &VmFd, region: Region) -> io::Result<()> {
    // SAFETY: the caller that made the log guaranteed that the VM has this slot, with this memory:
    // it is not mapped anew.
    unsafe { vm.set_user_memory_region(region) }.map_err(io::Error::from)
}

/// Whether the slot of `probe` is there. `probe` has another length than it, and the guest address
/// of another slot: KVM refuses to resize a slot that is there (EINVAL), and to make one over
/// another (EEXIST).
pub(super) fn slot_is_there(vm: &VmFd, probe: Region) -> bool {
    // SAFETY: refused, unless both slots are gone; then what is made here is taken away at once,
    // and its memory lives as long as the log's RAM block does.
    match unsafe { vm.set_user_memory_region(probe) } {
        Err(error) => error.errno() != libc::EEXIST,
        Ok(()) => {
            // SAFETY: takes away what was made above.
            let removed = unsafe { vm.set_user_memory_region(Region { memory_size: 0, ..probe }) };
            if let Err(error) = removed {
                tracing::warn!(slot = probe.slot, %error, "a slot that was made to look for it stays");
            }
            false
        }
    }
}

/// Fetches one bit a page of a slot that logs. `NotFound`: there is no such slot, or it does not
/// log. `EFAULT`: it is longer than `bitmap`. Of a shorter one, the rest of `bitmap` is set.
pub(super) fn get_dirty_log(vm: &VmFd, slot: u32, bitmap: &mut SlotBitmap) -> io::Result<()> {
    bitmap.words_mut().fill(u64::MAX);
    let into = kvm_dirty_log__bindgen_ty_1 { dirty_bitmap: bitmap.start.as_ptr().cast() };
    let log = kvm_dirty_log { slot, padding1: 0, __bindgen_anon_1: into };
    // SAFETY: the kernel fills `bitmap` from its start, and fails at its end, behind which nothing
    // can be written: the slot may have become longer in the meantime.
    let result = unsafe { libc::ioctl(vm.as_raw_fd(), KVM_GET_DIRTY_LOG, &raw const log) };
    answer(result).map(drop)
}

/// Words that KVM fills. They end at a page that cannot be accessed.
#[derive(Debug)]
pub(super) struct SlotBitmap {
    mapping: NonNull<libc::c_void>,
    /// Bytes, with the page at the end.
    mapped: usize,
    start: NonNull<u64>,
    words: usize,
}

// SAFETY: the mapping belongs to the process, not to a thread.
unsafe impl Send for SlotBitmap {}

impl SlotBitmap {
    /// A bitmap for a slot of `pages`.
    pub(super) fn new(pages: usize) -> io::Result<Self> {
        let words = pages.div_ceil(64);
        let bytes = words.checked_mul(8).ok_or(io::ErrorKind::OutOfMemory)?;
        let usable = bytes.checked_next_multiple_of(PAGE).ok_or(io::ErrorKind::OutOfMemory)?;
        let mapped = usable.checked_add(PAGE).ok_or(io::ErrorKind::OutOfMemory)?;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let start = unsafe { libc::mmap(ptr::null_mut(), mapped, libc::PROT_NONE, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let mapping = NonNull::new(start).ok_or(io::ErrorKind::OutOfMemory)?;
        // SAFETY: `usable - bytes` is inside of the mapping, and a multiple of 8.
        let first = unsafe { mapping.byte_add(usable - bytes) }.cast();
        let this = Self { mapping, mapped, start: first, words };
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: all of the new mapping but its last page.
        let result = unsafe { libc::mprotect(this.mapping.as_ptr(), usable, access) };
        answer(result).map(|_| this)
    }

    /// The words, as they were filled.
    pub(super) fn words(&self) -> &[u64] {
        // SAFETY: readable, aligned, initialised by the kernel, and borrowed as `self` is.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.words) }
    }

    fn words_mut(&mut self) -> &mut [u64] {
        // SAFETY: as above, and writable.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.words) }
    }
}

impl Drop for SlotBitmap {
    fn drop(&mut self) {
        // SAFETY: exactly what `new` mapped.
        unsafe { libc::munmap(self.mapping.as_ptr(), self.mapped) };
    }
}

/// Clears the bits that are set in `bitmap`, and protects their pages again. Bit 0 is the slot's
/// page `first`, which is a multiple of 64; so is `pages` unless the slot ends there.
pub(super) fn clear_dirty_log(
    vm: &VmFd,
    slot: u32,
    first: u64,
    pages: u32,
    bitmap: &[u64],
) -> io::Result<()> {
    assert!(bitmap.len() * 64 >= pages as usize);
    let from = kvm_clear_dirty_log__bindgen_ty_1 { dirty_bitmap: bitmap.as_ptr().cast_mut().cast() };
    let log = kvm_clear_dirty_log { slot, num_pages: pages, first_page: first, __bindgen_anon_1: from };
    // SAFETY: the kernel reads `pages` bits of `bitmap`, checked above.
    let result = unsafe { libc::ioctl(vm.as_raw_fd(), KVM_CLEAR_DIRTY_LOG, &raw const log) };
    answer(result).map(drop)
}

/// Protects the pages of all entries that were given back, in all rings of the VM.
pub(super) fn reset_dirty_rings(vm: &VmFd) -> io::Result<()> {
    loop {
        // SAFETY: the request has no argument.
        let result = unsafe { libc::ioctl(vm.as_raw_fd(), KVM_RESET_DIRTY_RINGS, 0) };
        match answer(result) {
            // A signal came: some pages are not protected yet.
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result.map(drop),
        }
    }
}

fn answer(result: i32) -> io::Result<i32> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// The ring of one vCPU. The kernel puts in pages that become dirty, we give the entries back in
/// the same order.
///
/// ```text
///   flags 0 ── kernel: DIRTY ── we: RESET ── kernel, at KVM_RESET_DIRTY_RINGS: page protected, flags 0
/// ```
#[derive(Debug)]
pub(super) struct Ring {
    entries: NonNull<kvm_dirty_gfn>,
    /// A power of two.
    len: u32,
    /// Entries looked at since the ring was made; wraps around.
    next: u32,
}

// SAFETY: the mapping belongs to the process, not to a thread.
unsafe impl Send for Ring {}

const DIRTY: u32 = 1;
const RESET: u32 = 2;

impl Ring {
    /// Maps the ring, which has `len` entries: what the VM was made with.
    pub(super) fn map(vcpu: &VcpuFd, len: u32) -> io::Result<Self> {
        let bytes = len as usize * size_of::<kvm_dirty_gfn>();
        let offset = i64::from(KVM_DIRTY_LOG_PAGE_OFFSET) * PAGE as i64;
        let (access, fd) = (libc::PROT_READ | libc::PROT_WRITE, vcpu.as_raw_fd());
        // SAFETY: a new mapping at an address of the kernel's choice.
        let start = unsafe { libc::mmap(ptr::null_mut(), bytes, access, libc::MAP_SHARED, fd, offset) };
        match NonNull::new(start) {
            Some(start) if start.as_ptr() != libc::MAP_FAILED => {
                Ok(Self { entries: start.cast(), len, next: 0 })
            }
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Takes out the next entry: slot and page in it.
    pub(super) fn take(&mut self) -> Option<(u32, u64)> {
        let index = self.next % self.len;
        // SAFETY: index < len, so the entry lies in the mapping.
        let entry = unsafe { self.entries.add(index as usize) }.as_ptr();
        // SAFETY: as above; the pointer is made without a reference.
        let flags = unsafe { &raw mut (*entry).flags };
        // SAFETY: aligned, lives as long as `self`; the kernel uses it as an atomic as well.
        let flags = unsafe { AtomicU32::from_ptr(flags) };
        if flags.load(Ordering::Acquire) & DIRTY == 0 {
            return None;
        }
        // SAFETY: inside the mapping. The kernel wrote the entry before its flag and leaves it
        // alone until it is reset.
        let kvm_dirty_gfn { slot, offset, .. } = unsafe { entry.read_volatile() };
        flags.store(RESET, Ordering::Release);
        self.next = self.next.wrapping_add(1);
        Some((slot, offset))
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        let bytes = self.len as usize * size_of::<kvm_dirty_gfn>();
        // SAFETY: exactly what `map` mapped, known here only.
        unsafe { libc::munmap(self.entries.as_ptr().cast(), bytes) };
    }
}
