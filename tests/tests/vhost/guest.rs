//! A guest's memory, a copy of it that follows by what logs report, and connections to back-ends.

use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use multifd_engine::vhost::vhost::VhostBackend;
use multifd_engine::vhost::vhost::vhost_user::message::VhostUserProtocolFeatures;
use multifd_engine::vhost::vhost::vhost_user::{Frontend, VhostUserFrontend};
use multifd_engine::vhost::{VhostDevices, VhostRegion, VhostUser};
use multifd_engine::vm_memory::GuestAddress;
use multifd_engine::wire::Configuration;
use multifd_engine::{DirtyBitmap, DirtyLog, PAGE, RamBlock, Source, SourceBuilder};
use multifd_tests::virtio::{self, Memory};

pub const SOON: Duration = Duration::from_secs(20);
pub const HIGH: GuestAddress = GuestAddress(4 << 30);
/// Of the two regions, each.
pub const LEN: usize = 8 << 20;
pub const MAC: [u8; 6] = [0x52, 0x54, 0, 0x12, 0x34, 0x56];

/// Two regions with a hole between them, as x86 guests have.
pub fn memory() -> Memory {
    virtio::memory(&[(GuestAddress(0), LEN), (HIGH, LEN)]).unwrap()
}

pub fn blocks(memory: &Memory) -> Vec<RamBlock> {
    RamBlock::of_guest_memory(memory).unwrap()
}

pub fn devices(memory: &Memory) -> VhostDevices {
    VhostDevices::new(VhostRegion::of_guest_memory(memory).unwrap()).unwrap()
}

pub fn source(ram: Vec<RamBlock>) -> SourceBuilder {
    let configuration = Configuration::new("test-10.0");
    Source::builder(ram, configuration).timeout(SOON)
}

/// A back-end that has agreed on protocol features.
pub struct Attached {
    pub front_end: Frontend,
    pub user: VhostUser,
}

/// What these tests use, of what there is.
pub fn wanted() -> VhostUserProtocolFeatures {
    VhostUserProtocolFeatures::MQ
        | VhostUserProtocolFeatures::LOG_SHMFD
        | VhostUserProtocolFeatures::RARP
        | VhostUserProtocolFeatures::REPLY_ACK
        | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
}

/// As an embedder does: the owner is set, protocol features are negotiated.
pub fn attach(socket: UnixStream, wanted: VhostUserProtocolFeatures) -> Attached {
    let mut front_end = Frontend::from_stream(socket, 8);
    front_end.set_owner().unwrap();
    front_end.get_features().unwrap();
    let protocol = front_end.get_protocol_features().unwrap() & wanted;
    front_end.set_protocol_features(protocol).unwrap();
    let user = VhostUser::new(&front_end, protocol).unwrap().timeout(SOON);
    Attached { front_end, user }
}

/// A destination: it has what was reported, as it was when it was copied.
pub struct Replica {
    ram: Vec<RamBlock>,
    pages: Vec<Vec<u8>>,
    pub bitmaps: Vec<Arc<DirtyBitmap>>,
}

impl Replica {
    pub fn of(ram: &[RamBlock]) -> Self {
        let pages = ram.iter().map(|block| vec![0; block.pages() * PAGE]).collect();
        let mut replica = Self { ram: ram.to_vec(), pages, bitmaps: bitmaps(ram) };
        replica.bitmaps.iter().for_each(|bitmap| bitmap.set_range(0, bitmap.pages()));
        replica.copy();
        replica
    }

    /// Asks the logs, and copies what they report.
    pub fn follow(&mut self, logs: &mut [&mut dyn DirtyLog]) {
        for log in logs {
            log.sync(&self.bitmaps).unwrap_or_else(|error| panic!("{}: {error}", log.name()));
        }
        self.copy();
    }

    fn copy(&mut self) {
        for ((block, copy), bitmap) in self.ram.iter().zip(&mut self.pages).zip(&mut self.bitmaps) {
            let dirty = std::mem::replace(bitmap, Arc::new(DirtyBitmap::new(block.pages())));
            for (page, into) in copy.chunks_mut(PAGE).enumerate().filter(|(page, _)| dirty.test(*page)) {
                assert!(block.read_page(page, into));
            }
        }
    }

    /// The pages, by block, that differ from the guest's memory.
    pub fn different(&self) -> Vec<(usize, usize)> {
        let mut now = [0; PAGE];
        let mut different = Vec::new();
        for (place, (block, copy)) in self.ram.iter().zip(&self.pages).enumerate() {
            for (page, copy) in copy.chunks(PAGE).enumerate() {
                assert!(block.read_page(page, &mut now));
                if now != copy {
                    different.push((place, page));
                }
            }
        }
        different
    }
}

pub fn bitmaps(ram: &[RamBlock]) -> Vec<Arc<DirtyBitmap>> {
    ram.iter().map(|block| Arc::new(DirtyBitmap::new(block.pages()))).collect()
}

/// The set pages of each bitmap.
pub fn set(bitmaps: &[Arc<DirtyBitmap>]) -> Vec<(usize, usize)> {
    let of = |(place, bitmap): (usize, &Arc<DirtyBitmap>)| {
        (0..bitmap.pages())
            .filter(|page| bitmap.test(*page))
            .map(move |page| (place, page))
            .collect::<Vec<_>>()
    };
    bitmaps.iter().enumerate().flat_map(of).collect()
}

/// Where the page of a guest address is: block of [`memory`], page in it.
pub fn place(at: GuestAddress) -> (usize, usize) {
    let (place, offset) = at.0.checked_sub(HIGH.0).map_or((0, at.0), |offset| (1, offset));
    (place, offset as usize / PAGE)
}

/// Pages that differ between two memories.
pub fn different(here: &Memory, there: &Memory) -> Vec<(usize, usize)> {
    let (mut a, mut b) = ([0; PAGE], [0; PAGE]);
    let mut different = Vec::new();
    for (place, (here, there)) in blocks(here).iter().zip(blocks(there)).enumerate() {
        for page in 0..here.pages() {
            assert!(here.read_page(page, &mut a) && there.read_page(page, &mut b));
            if a != b {
                different.push((place, page));
            }
        }
    }
    different
}
