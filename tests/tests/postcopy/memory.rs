//! Memory of all kinds whose pages follow: threads read it while it comes in.
#![allow(clippy::indexing_slicing, clippy::expect_used, reason = "test code may panic")]

use std::fs::File;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;

use multifd_engine::vm_memory::{Bytes as _, MmapRegion};
use multifd_engine::{
    Channel, Destination, DestinationBuilder, HostMemory, Incoming, PAGE, PostcopyGuest, RamBlock,
};
use multifd_tests::{Failure, Outcome};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

use crate::author::{Author, Block, STATE, content};

/// What is behind a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Anonymous,
    /// Shared with a file in memory.
    Memfd,
    /// The same with huge pages of 2 MiB.
    Huge,
    /// Private huge pages, none of which is set aside: the pool may be empty when one is needed.
    Unreserved,
}

pub(crate) const HUGE: usize = 2 << 20;

impl Kind {
    pub(crate) fn host(self) -> usize {
        if matches!(self, Self::Huge | Self::Unreserved) { HUGE / PAGE } else { 1 }
    }

    pub(crate) fn memory(self, len: usize) -> Outcome<HostMemory> {
        let flags = match self {
            Self::Anonymous => return Ok(HostMemory::anonymous(len)?),
            Self::Unreserved => return unreserved(len),
            Self::Memfd => MemfdFlags::CLOEXEC,
            Self::Huge => MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB,
        };
        let file = File::from(memfd_create("ram", flags)?);
        ftruncate(&file, len as u64)?;
        Ok(HostMemory::map_file(file, len)?)
    }
}

fn unreserved(len: usize) -> Outcome<HostMemory> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_HUGETLB;
    let region = MmapRegion::<()>::build(None, len, libc::PROT_READ | libc::PROT_WRITE, flags);
    let region = region.map_err(|error| Failure::new(error.to_string()))?;
    Ok(HostMemory::from_region(Arc::new(region))?)
}

/// A destination and its scripted source, up to the switch.
pub(crate) struct Pair {
    pub(crate) author: Author,
    pub(crate) guest: PostcopyGuest,
    pub(crate) memory: Vec<RamBlock>,
}

impl Pair {
    /// Blocks of so many pages of each kind.
    pub(crate) fn switched(kinds: &[(Kind, usize)]) -> Outcome<Self> {
        Self::switched_with(kinds, |destination| destination)
    }

    /// The same with a destination that is set so.
    pub(crate) fn switched_with(
        kinds: &[(Kind, usize)],
        set: impl FnOnce(DestinationBuilder) -> DestinationBuilder,
    ) -> Outcome<Self> {
        const NAMES: [&str; 3] = ["ram.a", "ram.b", "ram.c"];
        let blocks: Vec<_> = NAMES
            .iter()
            .zip(kinds)
            .map(|(name, (kind, pages))| Block { name, pages: *pages, host: kind.host() })
            .collect();
        let memory = blocks
            .iter()
            .zip(kinds)
            .map(|(block, (kind, pages))| Ok(block.over(kind.memory(pages * PAGE)?)))
            .collect::<Outcome<Vec<_>>>()?;
        let (ours, theirs) = UnixStream::pair()?;
        let destination = set(Destination::builder(memory.clone()).postcopy(true))
            .over(Channel::try_from(theirs)?, Vec::new())
            .map_err(text)?;
        let receiving = start(move || destination.receive_live());
        let mut author = Author::new(ours, &blocks)?;
        let written = author.precopy().and_then(|()| author.switch());
        let incoming =
            receiving.join().map_err(|_| Failure::new("the destination panicked"))?.map_err(text)?;
        written?;
        let Incoming::Postcopy(guest) = incoming else { return Err(Failure::new("no post-copy")) };
        assert_eq!(guest.opaque_state("device"), Some((3, STATE)));
        Ok(Self { author, guest, memory })
    }
}

/// A thread of the test's own.
#[expect(clippy::disallowed_methods, reason = "the engine's threads are its own; this one is the test's")]
pub(crate) fn start<T: Send + 'static>(body: impl FnOnce() -> T + Send + 'static) -> thread::JoinHandle<T> {
    thread::spawn(body)
}

pub(crate) fn text(error: multifd_engine::Error) -> Failure {
    Failure::new(error.chain())
}

/// Loads a page, as a vCPU would: a fault waits for it.
pub(crate) fn load(block: &RamBlock, page: usize) -> [u8; PAGE] {
    let mut bytes = [0; PAGE];
    let slice = block.memory().slice(page * PAGE, PAGE).expect("a page of the block");
    slice.read_slice(&mut bytes, 0).expect("a page's bytes");
    bytes
}

/// Fails unless every page is the source's.
pub(crate) fn check(memory: &[RamBlock]) {
    for (block, ram) in memory.iter().enumerate() {
        for page in 0..ram.pages() {
            assert!(load(ram, page) == content(block, page, false), "page {page} of block {block}");
        }
    }
}
