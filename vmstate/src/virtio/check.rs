//! What is inconsistent in the state of a virtio device, with itself and with guest RAM.

use super::{Core, Features, Kind, NO_VECTOR, Queue, Status, Transport, VirtioDevice};
use crate::examine::{GuestRam, Remark};

/// Bytes of a descriptor.
const DESCRIPTOR: u64 = 16;
/// Bytes of an entry of the used ring, and of the two events of a packed ring.
const USED: u64 = 8;
const EVENTS: u64 = 4;
/// Alignment of a legacy ring's parts where its driver does not choose it.
const LEGACY_ALIGN: u64 = 4096;

/// Where a ring is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Ring {
    size: u64,
    descriptors: u64,
    avail: u64,
    used: u64,
}

impl<T: Transport, K: Kind> VirtioDevice<T, K> {
    /// What fields mean: status and features by name, where rings are.
    pub(crate) fn remarks(&self) -> Vec<Remark> {
        let features = Features { device: K::ID, bits: self.core.accepted() };
        let mut remarks = vec![
            Remark::new("status", self.core.status.to_string()),
            Remark::new("features", features.to_string()),
        ];
        for index in 0..self.core.queues.len() {
            let Some(ring) = self.ring(index) else { continue };
            let Ring { size, descriptors, avail, used } = ring;
            let text = format!("{size} entries at {descriptors:#x}, avail {avail:#x}, used {used:#x}");
            remarks.push(Remark::new(format!("queue[{index}]"), text));
        }
        remarks
    }

    /// What is inconsistent: status, features, vectors, and each ring with guest RAM.
    pub fn check(&self, ram: &dyn GuestRam) -> Vec<Remark> {
        let mut findings = Vec::new();
        self.core.check(Features { device: K::ID, bits: self.core.accepted() }, &mut findings);
        for (index, queue) in self.core.queues.iter().enumerate() {
            let name = format!("queue[{index}]");
            if let Some((vector, entries)) = self.transport.vector(index)
                && vector != NO_VECTOR
                && usize::from(vector) >= entries
            {
                findings
                    .push(Remark::new(format!("{name}.vector"), format!("{vector}, of {entries} vectors")));
            }
            if let Some(registers) = self.transport.registers(index)
                && queue.descriptors != 0
                && registers.descriptors != queue.descriptors
            {
                let text =
                    format!("{:#x}, but the driver has set {:#x}", queue.descriptors, registers.descriptors);
                findings.push(Remark::new(format!("{name}.descriptors"), text));
            }
            if let Some(ring) = self.ring(index) {
                self.check_ring(index, &ring, ram, &mut findings);
            }
        }
        findings
    }

    fn is_packed(&self) -> bool {
        self.core.accepted() & Features::RING_PACKED != 0
    }

    /// The ring of a queue that its driver has set up.
    fn ring(&self, index: usize) -> Option<Ring> {
        let queue = self.core.queues.get(index).filter(|queue| queue.descriptors != 0)?;
        let (size, descriptors) = (u64::from(queue.size), queue.descriptors);
        let modern = self.core.rings.as_ref().filter(|_| self.core.accepted() & Features::VERSION_1 != 0);
        let (avail, used) = match modern.and_then(|rings| rings.rings.get(index)) {
            Some(addresses) => (addresses.avail, addresses.used),
            None => legacy(queue)?,
        };
        Some(Ring { size, descriptors, avail, used })
    }

    fn check_ring(&self, index: usize, ring: &Ring, ram: &dyn GuestRam, findings: &mut Vec<Remark>) {
        let Ring { size, descriptors, avail, used } = *ring;
        let mut find =
            |field: &str, text| findings.push(Remark::new(format!("queue[{index}].{field}"), text));
        let packed = self.is_packed();
        if !packed && !size.is_power_of_two() {
            find("size", format!("{size}, which is no power of two"));
        }
        let (avail_len, used_len) = if packed { (EVENTS, EVENTS) } else { (6 + 2 * size, 6 + USED * size) };
        let parts = [
            ("descriptors", descriptors, DESCRIPTOR * size, 16),
            ("avail", avail, avail_len, if packed { 4 } else { 2 }),
            ("used", used, used_len, 4),
        ];
        let mut inside = true;
        for (name, at, len, align) in parts {
            if at % align != 0 {
                find(name, format!("{at:#x}, which is no multiple of {align}"));
            }
            if at.checked_add(len).is_none() || ram.holds(at, len) == Some(false) {
                inside = false;
                find(name, format!("{at:#x}, of which not all {len} bytes are RAM"));
            }
        }
        let last_avail = self.core.queues.get(index).map_or(0, |queue| queue.last_avail);
        if packed {
            let state = self.core.packed.as_ref().and_then(|packed| packed.rings.get(index));
            if let Some(state) = state.filter(|state| u64::from(state.last_avail_idx) >= size) {
                find("last_avail_idx", format!("{}, of {size} entries", state.last_avail_idx));
            }
        } else if inside && let Some((avail, used)) = ram.read_u16(avail + 2).zip(ram.read_u16(used + 2)) {
            indices(last_avail, avail, used, size, find);
        }
    }
}

/// The index sanity check: a ring has no more requests than entries, neither those that wait nor
/// those in flight.
fn indices(last_avail: u16, avail: u16, used: u16, size: u64, mut find: impl FnMut(&str, String)) {
    let waiting = avail.wrapping_sub(last_avail);
    if u64::from(waiting) > size {
        let text =
            format!("{last_avail}, but the driver is at {avail}: {waiting} requests in {size} entries");
        find("last_avail_idx", text);
    }
    let in_flight = last_avail.wrapping_sub(used);
    if u64::from(in_flight) > size {
        let text = format!("{last_avail}, but {used} are done: {in_flight} requests in {size} entries");
        find("last_avail_idx", text);
    }
}

/// Where the other parts of a legacy ring are: behind its descriptors.
fn legacy(queue: &Queue) -> Option<(u64, u64)> {
    let size = u64::from(queue.size);
    let align = match queue.align {
        0 => LEGACY_ALIGN,
        align => u64::from(align),
    };
    let avail = queue.descriptors.checked_add(DESCRIPTOR * size)?;
    // Flags, index, the ring, and the event that the driver waits for.
    let end = avail.checked_add(6 + 2 * size)?;
    Some((avail, end.checked_next_multiple_of(align)?))
}

impl Core {
    fn check(&self, features: Features, findings: &mut Vec<Remark>) {
        let mut find = |field: &str, text| findings.push(Remark::new(field, text));
        let status = self.status;
        if status.unknown() != 0 {
            find("status", format!("{status}, with bits that have no meaning"));
        }
        if status.has(Status::DRIVER_OK | Status::FAILED) {
            find("status", format!("{status}, both at once"));
        }
        let modern = features.bits & Features::VERSION_1 != 0;
        if modern && status.has(Status::DRIVER_OK) && !status.has(Status::FEATURES_OK) {
            find("status", format!("{status}, a modern driver that has not chosen its features"));
        }
        if features.unknown() != 0 {
            find("features", format!("{:#x} are not known", features.unknown()));
        }
        if features.bits & Features::RING_PACKED != 0 && self.packed.is_none() {
            find("features", "packed rings, whose state is not here".to_owned());
        }
        if self.broken.is_some_and(|broken| broken.0) {
            find("broken", "the device has stopped because of an error of its driver".to_owned());
        }
        let running = status.has(Status::DRIVER_OK) && !self.queues.is_empty();
        if running && self.queues.iter().all(|queue| queue.descriptors == 0) {
            find("status", format!("{status}, but no queue is set up"));
        }
        for (index, queue) in self.queues.iter().enumerate() {
            if queue.align != 0 && !queue.align.is_power_of_two() {
                find(&format!("queue[{index}].align"), format!("{}, which is no power of two", queue.align));
            }
        }
    }
}
