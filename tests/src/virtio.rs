//! What a guest's drivers do: a split virtqueue in guest memory, and disk requests over it. The
//! example `vhost_user_blk` has this file, too.

use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use multifd_engine::vhost::{EventFd, Ring, RingEvents};
use multifd_engine::vm_memory::bitmap::AtomicBitmap;
use multifd_engine::vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

/// Guest memory in a file that back-ends can map; what is written through it is noted.
pub type Memory = GuestMemoryMmap<AtomicBitmap>;

/// What these functions return.
pub type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// VIRTIO_F_VERSION_1.
pub const VERSION_1: u64 = 1 << 32;
/// Bytes of a sector, whatever the disk.
pub const SECTOR: usize = 512;

/// Descriptor flags.
const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// Memory of these regions, one after the other in a file without a name.
///
/// # Errors
/// There is no memory, or regions overlap.
pub fn memory(regions: &[(GuestAddress, usize)]) -> Result<Memory> {
    let shm = Path::new("/dev/shm");
    let file = if shm.is_dir() { tempfile::tempfile_in(shm)? } else { tempfile::tempfile()? };
    file.set_len(regions.iter().map(|(_, len)| *len as u64).sum())?;
    let mut offset = 0;
    let mut ranges = Vec::new();
    for (start, len) in regions {
        ranges.push((*start, *len, Some(FileOffset::new(file.try_clone()?, offset))));
        offset += *len as u64;
    }
    Ok(Memory::from_ranges_with_files(ranges)?)
}

/// A part of guest memory, as a descriptor names it.
#[derive(Clone, Copy, Debug)]
pub struct Buffer {
    /// Its first byte.
    pub at: GuestAddress,
    /// Bytes.
    pub len: u32,
    /// The device writes it; else it reads it.
    pub device_writes: bool,
}

/// A driver's side of a split ring.
#[derive(Debug)]
pub struct Queue {
    memory: Memory,
    size: u16,
    descriptors: GuestAddress,
    available: GuestAddress,
    used: GuestAddress,
    free: Vec<u16>,
    /// The descriptors of each request in flight, by its head.
    chains: Vec<Vec<u16>>,
    next_available: u16,
    next_used: u16,
    kick: EventFd,
    call: EventFd,
}

impl Queue {
    /// A ring of `size` entries (a power of two up to 128) in the three pages from `at` on:
    /// descriptors, available, used.
    ///
    /// # Errors
    /// There are no more descriptors of this process to be had.
    pub fn new(memory: &Memory, at: GuestAddress, size: u16) -> Result<Self> {
        Ok(Self {
            memory: memory.clone(),
            size,
            descriptors: at,
            available: GuestAddress(at.0 + 0x1000),
            used: GuestAddress(at.0 + 0x2000),
            free: (0..size).rev().collect(),
            chains: vec![Vec::new(); usize::from(size)],
            next_available: 0,
            next_used: 0,
            kick: EventFd::new(0)?,
            call: EventFd::new(0)?,
        })
    }

    /// The same driver, in memory to which it was moved.
    #[must_use]
    pub fn moved_to(mut self, memory: &Memory) -> Self {
        self.memory = memory.clone();
        self
    }

    /// What a back-end is told of it.
    pub fn ring(&self) -> Ring {
        Ring {
            size: self.size,
            descriptors: self.descriptors,
            available: self.available,
            used: self.used,
            base: 0,
            enabled: true,
        }
    }

    /// The page that the device writes for every request.
    pub fn used_page(&self) -> GuestAddress {
        self.used
    }

    /// How driver and back-end wake each other.
    ///
    /// # Errors
    /// There are no more descriptors of this process to be had.
    pub fn events(&self) -> Result<RingEvents> {
        Ok(RingEvents { kick: self.kick.try_clone()?, call: self.call.try_clone()? })
    }

    /// Makes a request available: its head. Kick afterwards.
    ///
    /// # Errors
    /// More buffers than free descriptors.
    pub fn add(&mut self, buffers: &[Buffer]) -> Result<u16> {
        let at = self.free.len().checked_sub(buffers.len()).ok_or("the ring is full")?;
        let chain = self.free.split_off(at);
        let next = chain.iter().skip(1).copied().map(Some).chain([None]);
        for ((descriptor, buffer), next) in chain.iter().zip(buffers).zip(next) {
            let at = GuestAddress(self.descriptors.0 + 16 * u64::from(*descriptor));
            let flags = if next.is_some() { NEXT } else { 0 } | if buffer.device_writes { WRITE } else { 0 };
            self.memory.write_obj(buffer.at.0, at)?;
            self.memory.write_obj(buffer.len, GuestAddress(at.0 + 8))?;
            self.memory.write_obj(flags, GuestAddress(at.0 + 12))?;
            self.memory.write_obj(next.unwrap_or(0), GuestAddress(at.0 + 14))?;
        }
        let head = *chain.first().ok_or("a request without buffers")?;
        if let Some(kept) = self.chains.get_mut(usize::from(head)) {
            *kept = chain;
        }
        let slot = u64::from(self.next_available % self.size);
        self.memory.write_obj(head, GuestAddress(self.available.0 + 4 + 2 * slot))?;
        self.next_available = self.next_available.wrapping_add(1);
        // The device sees the index after what it stands for.
        self.memory.store(self.next_available, GuestAddress(self.available.0 + 2), Ordering::Release)?;
        Ok(head)
    }

    /// Wakes the back-end.
    ///
    /// # Errors
    /// As write(2).
    pub fn kick(&self) -> Result<()> {
        Ok(self.kick.write(1)?)
    }

    /// The next request that the device has done, and how many bytes it says it wrote.
    ///
    /// # Errors
    /// The used ring names no request.
    pub fn used(&mut self) -> Result<Option<(u16, u32)>> {
        let index: u16 = self.memory.load(GuestAddress(self.used.0 + 2), Ordering::Acquire)?;
        if index == self.next_used {
            return Ok(None);
        }
        let entry = GuestAddress(self.used.0 + 4 + 8 * u64::from(self.next_used % self.size));
        let (head, len): (u32, u32) =
            (self.memory.read_obj(entry)?, self.memory.read_obj(GuestAddress(entry.0 + 4))?);
        let head = u16::try_from(head)?;
        let chain = self.chains.get_mut(usize::from(head)).map(std::mem::take).unwrap_or_default();
        if chain.is_empty() {
            return Err(format!("the device used request {head}, which is not in flight").into());
        }
        self.free.extend(chain);
        self.next_used = self.next_used.wrapping_add(1);
        Ok(Some((head, len)))
    }

    /// Requests in flight.
    pub fn in_flight(&self) -> u16 {
        self.next_available.wrapping_sub(self.next_used)
    }
}

/// The driver of a virtio-blk disk, which compares what it reads with what it wrote.
#[derive(Debug)]
pub struct Disk {
    /// Its only ring.
    pub queue: Queue,
    memory: Memory,
    /// Where each slot has its header, status and data: 4 KiB, then [`Disk::DATA`].
    area: GuestAddress,
    /// By slot: the request in flight.
    slots: Vec<Option<Request>>,
    /// What the disk must hold.
    model: Vec<u8>,
    random: u64,
    /// Requests done.
    pub done: u64,
}

/// A request in flight: it has its slot's part of the disk to itself.
#[derive(Clone, Copy, Debug)]
struct Request {
    head: u16,
    write: bool,
    /// Bytes from the disk's first.
    place: usize,
    at: GuestAddress,
    len: usize,
}

impl Disk {
    /// Longest data of a request.
    pub const DATA: usize = 64 << 10;
    /// Requests at a time.
    pub const SLOTS: usize = 16;
    /// Bytes of guest memory that it needs: three pages for the ring, then the slots.
    pub const MEMORY: u64 = 0x3000 + (Self::SLOTS * (0x1000 + Self::DATA)) as u64;
    /// Bytes of a slot's part of the disk.
    const PART: usize = 256 << 10;
    /// Bytes of the disk.
    pub const LEN: usize = Self::SLOTS * Self::PART;

    /// A driver that has its memory from `at` on, of a disk of zeros.
    ///
    /// # Errors
    /// As [`Queue::new`].
    pub fn new(memory: &Memory, at: GuestAddress, seed: u64) -> Result<Self> {
        Ok(Self {
            queue: Queue::new(memory, at, 128)?,
            memory: memory.clone(),
            area: GuestAddress(at.0 + 0x3000),
            slots: vec![None; Self::SLOTS],
            model: vec![0; Self::LEN],
            random: seed,
            done: 0,
        })
    }

    /// The same driver, in memory to which it was moved.
    #[must_use]
    pub fn moved_to(mut self, memory: &Memory) -> Self {
        self.queue = self.queue.moved_to(memory);
        self.memory = memory.clone();
        self
    }

    /// Takes what is done, checks it, and makes up to `count` new random requests.
    ///
    /// # Errors
    /// A request failed, or read other bytes than were written.
    pub fn work(&mut self, count: usize) -> Result<()> {
        self.take_done()?;
        for _ in 0..count {
            let slot = self.below(Self::SLOTS);
            if self.slots.get(slot).is_some_and(Option::is_none) {
                self.submit(slot)?;
            }
        }
        self.queue.kick()
    }

    /// Takes what the device has done, and checks it.
    ///
    /// # Errors
    /// As [`Disk::work`].
    pub fn take_done(&mut self) -> Result<()> {
        while let Some((head, _)) = self.queue.used()? {
            let slot = self.slots.iter().position(|slot| slot.is_some_and(|request| request.head == head));
            let slot = slot.ok_or("a request that is not in flight is done")?;
            if let Some(request) = self.slots.get_mut(slot).and_then(Option::take) {
                self.check(slot, request)?;
            }
            self.done += 1;
        }
        Ok(())
    }

    /// Waits until the device has done everything.
    ///
    /// # Errors
    /// It has not after `within`, or as [`Disk::work`].
    pub fn finish(&mut self, within: Duration) -> Result<()> {
        self.wait(0, within)
    }

    /// Waits until no more than `left` requests are in flight.
    ///
    /// # Errors
    /// As [`Disk::finish`].
    pub fn wait(&mut self, left: u16, within: Duration) -> Result<()> {
        let deadline = Instant::now() + within;
        self.queue.kick()?;
        self.take_done()?;
        while self.queue.in_flight() > left {
            if Instant::now() > deadline {
                return Err(
                    format!("{} requests are not done after {within:?}", self.queue.in_flight()).into()
                );
            }
            std::thread::yield_now();
            self.take_done()?;
        }
        Ok(())
    }

    fn check(&mut self, slot: usize, request: Request) -> Result<()> {
        let status: u8 = self.memory.read_obj(GuestAddress(self.header(slot).0 + 16))?;
        if status != 0 {
            return Err(format!("status {status} of {request:?}").into());
        }
        let mut data = vec![0; request.len];
        self.memory.read_slice(&mut data, request.at)?;
        let model = self.model.get_mut(request.place..request.place + request.len).ok_or("past the end")?;
        if request.write {
            model.copy_from_slice(&data);
        } else if *model != *data {
            return Err(format!("{request:?} read other bytes than were written").into());
        }
        Ok(())
    }

    fn submit(&mut self, slot: usize) -> Result<()> {
        let write = self.below(2) == 0;
        let len = (1 + self.below(Self::DATA / SECTOR)) * SECTOR;
        let offset = self.below(Self::DATA - len + 1);
        let place = slot * Self::PART + self.below((Self::PART - len) / SECTOR + 1) * SECTOR;
        let header = self.header(slot);
        let at = GuestAddress(header.0 + 0x1000 + offset as u64);
        if write {
            let seed = self.below(251);
            let data: Vec<u8> = (seed..seed + len).map(|byte| byte.to_le_bytes()[0]).collect();
            self.memory.write_slice(&data, at)?;
        }
        self.memory.write_obj(u64::from(write), header)?;
        self.memory.write_obj((place / SECTOR) as u64, GuestAddress(header.0 + 8))?;
        self.memory.write_obj(0xff_u8, GuestAddress(header.0 + 16))?;
        let buffer = |at, len, device_writes| Buffer { at, len, device_writes };
        let head = self.queue.add(&[
            buffer(header, 16, false),
            buffer(at, u32::try_from(len)?, !write),
            buffer(GuestAddress(header.0 + 16), 1, true),
        ])?;
        if let Some(free) = self.slots.get_mut(slot) {
            *free = Some(Request { head, write, place, at, len });
        }
        Ok(())
    }

    fn header(&self, slot: usize) -> GuestAddress {
        GuestAddress(self.area.0 + (slot * (0x1000 + Self::DATA)) as u64)
    }

    /// SplitMix64.
    fn below(&mut self, limit: usize) -> usize {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = self.random;
        bits = (bits ^ bits >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ bits >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        usize::try_from((bits ^ bits >> 31) >> 1).unwrap_or(0) % limit.max(1)
    }
}
