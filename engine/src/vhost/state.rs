//! What of a device goes with the guest.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use multifd_wire::Invalid;
use vhost::vhost_user::message::{VhostUserInflight, VhostUserProtocolFeatures};
use vm_memory::GuestAddress;

use super::sys;

/// `mfvh`, big-endian like all that follows.
const MAGIC: u32 = 0x6d66_7668;
const VERSION: u16 = 2;
/// Most rings of a device: QEMU's VIRTIO_QUEUE_MAX.
const MAX_RINGS: usize = 1024;
/// Most entries of a ring, by the virtio specification.
const MAX_RING_SIZE: u16 = 1 << 15;
/// Longest in-flight region: 1024 rings of 32768 entries of 16 bytes would be 512 MiB; what exists
/// has some KiB.
const MAX_INFLIGHT: usize = 16 << 20;
/// Longest inner state of a back-end. That of a file system with a million open files has some 100
/// MiB.
pub(super) const MAX_BACK_END: usize = 1 << 30;
/// How a ring is written.
const LEFT_OUT: u8 = 0;
const DISABLED: u8 = 1;
const ENABLED: u8 = 2;

/// The protocol features that the guest, or what goes with it, depends on. The others are between a
/// front-end and its back-end: the two hosts' may differ.
pub(super) const LASTING_PROTOCOL_FEATURES: u64 = VhostUserProtocolFeatures::MQ.bits()
    | VhostUserProtocolFeatures::MTU.bits()
    | VhostUserProtocolFeatures::CRYPTO_SESSION.bits()
    | VhostUserProtocolFeatures::CONFIG.bits()
    | VhostUserProtocolFeatures::INFLIGHT_SHMFD.bits();

/// The protocol feature of a back-end that has a state of its own.
pub(super) const DEVICE_STATE: u64 = VhostUserProtocolFeatures::DEVICE_STATE.bits();

/// A ring, as the guest's driver has set it up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ring {
    /// Entries: 1..=32768, a power of two unless the ring is packed.
    pub size: u16,
    /// The descriptor table.
    pub descriptors: GuestAddress,
    /// The available ring; of a packed ring, the driver's event area.
    pub available: GuestAddress,
    /// The used ring; of a packed ring, the device's event area.
    pub used: GuestAddress,
    /// Where a stopped ring continues: the reply to GET_VRING_BASE. 0 for a new one.
    pub base: u32,
    /// The guest uses it. Of a card with several queue pairs, those beyond the ones that the guest
    /// has asked for are set up and not used: a back-end is told nothing of them.
    pub enabled: bool,
}

/// The memory in which a vhost-user back-end keeps track of the requests that it has taken and not
/// done.
#[derive(Debug)]
pub struct Inflight {
    pub(super) file: File,
    pub(super) offset: u64,
    pub(super) len: u64,
    pub(super) rings: u16,
    pub(super) ring_size: u16,
}

/// The state of a stopped device: goes in the VMM's device state, by [`VhostState::encode`], and is
/// loaded at the destination by [`VhostDevice::load`](super::VhostDevice::load).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VhostState {
    /// The virtio features that guest and device have agreed on.
    pub features: u64,
    /// The protocol features that the source's back-end used; the kernel's: none.
    pub protocol_features: u64,
    /// By index; `None`: the guest has not set it up.
    pub rings: Vec<Option<Ring>>,
    /// The content of the in-flight region, if there is one.
    pub inflight: Option<InflightState>,
    /// What a back-end with the protocol feature DEVICE_STATE has given of its own: virtiofsd's
    /// open files.
    pub back_end: Option<Vec<u8>>,
}

/// The content of an [`Inflight`] region.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InflightState {
    /// Rings that it is for.
    pub rings: u16,
    /// Entries that it has for a ring.
    pub ring_size: u16,
    /// All of it.
    pub bytes: Vec<u8>,
}

impl Inflight {
    /// The region that GET_INFLIGHT_FD gave.
    pub fn new(file: File, region: &VhostUserInflight) -> Self {
        let VhostUserInflight { mmap_size, mmap_offset, num_queues, queue_size } = *region;
        Self { file, offset: mmap_offset, len: mmap_size, rings: num_queues, ring_size: queue_size }
    }

    pub(super) fn save(&self) -> io::Result<InflightState> {
        let len = usize::try_from(self.len).ok().filter(|len| *len <= MAX_INFLIGHT);
        let len =
            len.ok_or_else(|| io::Error::other(format!("{} bytes, limit is {MAX_INFLIGHT}", self.len)))?;
        let mut bytes = vec![0; len];
        self.file.read_exact_at(&mut bytes, self.offset)?;
        Ok(InflightState { rings: self.rings, ring_size: self.ring_size, bytes })
    }

    pub(super) fn load(state: &InflightState) -> io::Result<Self> {
        let len = state.bytes.len() as u64;
        let file = sys::sealed_memfd(c"multifd-vhost-inflight", len)?;
        file.write_all_at(&state.bytes, 0)?;
        Ok(Self { file, offset: 0, len, rings: state.rings, ring_size: state.ring_size })
    }
}

impl VhostState {
    /// As bytes: 34 and up to 31 a ring, the in-flight region, and the back-end's own state.
    pub fn encode(&self) -> Vec<u8> {
        let count = |len: usize| u16::try_from(len).unwrap_or(u16::MAX);
        let mut out = Vec::new();
        out.extend(MAGIC.to_be_bytes());
        out.extend(VERSION.to_be_bytes());
        out.extend(self.features.to_be_bytes());
        out.extend(self.protocol_features.to_be_bytes());
        out.extend(count(self.rings.len()).to_be_bytes());
        for ring in &self.rings {
            let Some(ring) = ring else {
                out.push(LEFT_OUT);
                continue;
            };
            out.push(if ring.enabled { ENABLED } else { DISABLED });
            out.extend(ring.size.to_be_bytes());
            out.extend(ring.base.to_be_bytes());
            for address in [ring.descriptors, ring.available, ring.used] {
                out.extend(address.0.to_be_bytes());
            }
        }
        let none = InflightState { rings: 0, ring_size: 0, bytes: Vec::new() };
        let inflight = self.inflight.as_ref().unwrap_or(&none);
        // Both are bounded where they come from, far below 4 GiB.
        let len = |len: usize| u32::try_from(len).unwrap_or(u32::MAX);
        out.extend(len(inflight.bytes.len()).to_be_bytes());
        out.extend(inflight.rings.to_be_bytes());
        out.extend(inflight.ring_size.to_be_bytes());
        out.extend(&inflight.bytes);
        if let Some(bytes) = &self.back_end {
            out.extend(bytes);
        }
        out
    }

    /// Takes exactly the bytes of [`VhostState::encode`].
    ///
    /// # Errors
    /// Anything else: names the field, its value and what was expected.
    pub fn parse(bytes: &[u8]) -> Result<Self, Invalid> {
        let mut rest = bytes;
        check("vhost state magic", u32::from_be_bytes(take(&mut rest)?), MAGIC)?;
        check("vhost state version", u16::from_be_bytes(take(&mut rest)?), VERSION)?;
        let features = u64::from_be_bytes(take(&mut rest)?);
        let protocol_features = u64::from_be_bytes(take(&mut rest)?);
        let count = usize::from(u16::from_be_bytes(take(&mut rest)?));
        if count > MAX_RINGS {
            return Err(Invalid::new("rings of a vhost device", count, format_args!("up to {MAX_RINGS}")));
        }
        let packed = features & RING_PACKED != 0;
        let rings = (0..count).map(|_| parse_ring(&mut rest, packed)).collect::<Result<_, _>>()?;
        let inflight = parse_inflight(&mut rest)?;
        let back_end = (!rest.is_empty()).then(|| rest.to_vec());
        Ok(Self { features, protocol_features, rings, inflight, back_end })
    }
}

/// VIRTIO_F_RING_PACKED.
pub(super) const RING_PACKED: u64 = 1 << 34;

pub(super) fn check_ring_size(size: u16, packed: bool) -> Result<(), Invalid> {
    if (1..=MAX_RING_SIZE).contains(&size) && (packed || size.is_power_of_two()) {
        return Ok(());
    }
    let expected = format_args!("1..={MAX_RING_SIZE}{}", if packed { "" } else { ", a power of two" });
    Err(Invalid::new("size of a vhost ring", size, expected))
}

fn parse_ring(rest: &mut &[u8], packed: bool) -> Result<Option<Ring>, Invalid> {
    let [kind] = take(rest)?;
    let enabled = match kind {
        LEFT_OUT => return Ok(None),
        DISABLED => false,
        ENABLED => true,
        seen => return Err(Invalid::new("kind of a vhost ring", seen, "0, 1 or 2")),
    };
    let size = u16::from_be_bytes(take(rest)?);
    check_ring_size(size, packed)?;
    let base = u32::from_be_bytes(take(rest)?);
    if !packed && base > u32::from(u16::MAX) {
        return Err(Invalid::new("base of a split ring", base, "16 bits"));
    }
    let mut address = || Ok::<_, Invalid>(GuestAddress(u64::from_be_bytes(take(rest)?)));
    Ok(Some(Ring { size, base, descriptors: address()?, available: address()?, used: address()?, enabled }))
}

fn parse_inflight(rest: &mut &[u8]) -> Result<Option<InflightState>, Invalid> {
    let len = u32::from_be_bytes(take(rest)?);
    let len = usize::try_from(len).ok().filter(|len| *len <= MAX_INFLIGHT).ok_or_else(|| {
        Invalid::new("vhost in-flight region", len, format_args!("up to {MAX_INFLIGHT} bytes"))
    })?;
    let rings = u16::from_be_bytes(take(rest)?);
    let ring_size = u16::from_be_bytes(take(rest)?);
    let (bytes, tail) = rest.split_at_checked(len).ok_or_else(|| {
        Invalid::new("vhost state", format_args!("ends {} bytes early", len - rest.len()), "all of it")
    })?;
    *rest = tail;
    Ok((len > 0).then(|| InflightState { rings, ring_size, bytes: bytes.to_vec() }))
}

fn take<const N: usize>(rest: &mut &[u8]) -> Result<[u8; N], Invalid> {
    let (head, tail) = rest.split_first_chunk().ok_or_else(|| {
        Invalid::new("vhost state", format_args!("ends {} bytes early", N - rest.len()), "all of it")
    })?;
    *rest = tail;
    Ok(*head)
}

fn check<T: PartialEq + std::fmt::LowerHex>(what: &'static str, seen: T, expected: T) -> Result<(), Invalid> {
    if seen == expected {
        return Ok(());
    }
    Err(Invalid::new(what, format_args!("{seen:#x}"), format_args!("{expected:#x}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state() -> VhostState {
        let ring = |number: u64| Ring {
            size: 128,
            descriptors: GuestAddress(number << 32),
            available: GuestAddress(0x1000 * number),
            used: GuestAddress(u64::MAX - number),
            base: 65535,
            enabled: number == 1,
        };
        VhostState {
            features: 0x1_7500_7e46,
            protocol_features: 0x1002,
            rings: vec![Some(ring(1)), None, Some(ring(2))],
            inflight: Some(InflightState { rings: 2, ring_size: 128, bytes: vec![7; 2176] }),
            back_end: Some(vec![9; 20]),
        }
    }

    #[test]
    fn a_state_comes_back_as_it_was() {
        let with = state();
        let without = VhostState { inflight: None, ..state() };
        let bare = VhostState { rings: Vec::new(), back_end: None, ..without.clone() };
        for state in [with, without, bare] {
            assert_eq!(VhostState::parse(&state.encode()), Ok(state));
        }
    }

    #[test]
    fn every_short_prefix_is_refused_or_has_less_of_the_back_end() {
        let bytes = state().encode();
        let fixed = bytes.len() - 20;
        for len in 0..bytes.len() {
            match VhostState::parse(&bytes[..len]) {
                Ok(short) => assert_eq!(short.back_end.map_or(0, |bytes| bytes.len()), len - fixed),
                Err(invalid) => assert!(len < fixed, "{len}: {invalid}"),
            }
        }
    }

    #[test]
    fn what_cannot_be_is_named() {
        let changed = |at: usize, to: u8| {
            let mut bytes = state().encode();
            bytes[at] = to;
            VhostState::parse(&bytes).unwrap_err().to_string()
        };
        assert_eq!(changed(0, 0), "vhost state magic: 0x667668, expected 0x6d667668");
        assert_eq!(changed(5, 1), "vhost state version: 0x1, expected 0x2");
        assert_eq!(changed(22, 5), "rings of a vhost device: 1283, expected up to 1024");
        assert_eq!(changed(24, 3), "kind of a vhost ring: 3, expected 0, 1 or 2");
        assert_eq!(changed(26, 129), "size of a vhost ring: 129, expected 1..=32768, a power of two");
        assert_eq!(changed(27, 1), "base of a split ring: 16842751, expected 16 bits");
    }
}
