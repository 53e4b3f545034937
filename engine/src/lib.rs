//! Moves the RAM of a live guest between hosts, in QEMU's migration stream.
//!
//! ```text
//!  Source                                            Destination
//!   RamBlocks, all pages dirty                        IncomingRam: memory for the announced blocks
//!     Round: workers claim batches                      gate: sync points
//!     pack, encode ──── channel 0..N, main ────────>    unpack, decode, land
//!   DeviceState ─────── main ──────────────────────>  Arrived ── accept: the source lets go
//! ```
//!
//! A guest that has been received can also be kept: [`Checkpoint`] is a directory with its RAM and
//! device state, which a [`Source`] sends on. [`Recording`] reads a stream that QEMU wrote to a
//! file.
//!
//! The embedder owns the virtual machine: nothing here starts, stops or inspects a vCPU. All calls
//! block; threads are the engine's own, one a channel, and end with the migration, whatever ends
//! it. Nothing asks for an async runtime, and nothing panics on the threads of one.

#[cfg(feature = "at-rest")]
mod at_rest;
mod config;
mod convergence;
mod destination;
mod dirty;
mod error;
mod guest;
mod io;
mod os;
mod report;
mod run;
mod source;
mod stream;
mod sync;
#[cfg(feature = "vhost")]
pub mod vhost;
mod work;

#[cfg(feature = "at-rest")]
pub use at_rest::checkpoint::{Checkpoint, CheckpointBlock, CheckpointWriter, EarlyState, Manifest};
#[cfg(feature = "at-rest")]
pub use at_rest::libvirt::{LibvirtFormat, LibvirtImage};
#[cfg(feature = "at-rest")]
pub use at_rest::recording::{
    Devices, PageContent, PageRecord, RecordedPages, RecordedSection, Recording, SectionContent, StoredPages,
};
pub use config::{DestinationConfig, SourceConfig, parameter, rule};
pub use convergence::{AutoConverge, Decision, DowntimeLedger, Limits, OnStall, RoundRecord};
pub use destination::{
    Arrived, ChangedPages, Destination, DestinationBuilder, DevicePacket, DigestsDiffer, FreshRam, Incoming,
    IncomingRam, PostcopyEnd, PostcopyGuest, SwitchoverAck,
};
pub use dirty::{
    Coverage, DirtyLog, DirtyLogError, DirtyMarker, RegionLog, SoftwareLog, UserfaultLog, conformance,
};
#[cfg(feature = "kvm")]
pub use dirty::{KvmDirtyLog, KvmDirtyRing, KvmDirtyRings, KvmSlot, KvmSlots};
pub use error::{Error, ErrorKind, Phase, Remedy, Result};
pub use guest::{DirtyBitmap, HostMemory, PAGE, RamBlock, RamChanges};
pub use report::{
    BackEndWaits, DigestVerdict, FaultLatency, Figures, PageFaults, PostcopyReport, Report, ThreadWaits,
};
pub use run::counters::{ChannelProgress, Progress};
pub use run::session::{Canceller, DEFAULT_TIMEOUT, HandOver, ProgressReader};
pub use run::state::MigrationState;
pub use source::{
    AuditReport, Control, DeviceState, MissedPages, Postcopy, Precopy, Served, Source, SourceBuilder,
    StopCopy, XbzrleStats, ZeroCopySend, ZeroCopyStats, ZeroPages,
};
pub use stream::sections::EarlySections;

/// Parts for the benches, tests and tools of this workspace. Not covered by semantic versioning.
#[doc(hidden)]
pub mod unstable {
    pub use crate::convergence::{Convergence, RoundFacts};
    pub use crate::guest::hash as page_hash;
    pub use crate::os::pagemap::{PageQuery, PageRun};
    pub use crate::work::{
        Batch, BlockIndex, Claim, Next, Origin, PerBlock, Place, Requested, Round, UrgentPages, WantedPage,
    };
}

// What the first lines of an embedder need; the rest is in the modules below.
#[cfg(feature = "lz4")]
pub use multifd_codecs::Lz4;
#[cfg(feature = "zlib")]
pub use multifd_codecs::Zlib;
#[cfg(feature = "zstd")]
pub use multifd_codecs::Zstd;
pub use multifd_codecs::{Codec, Codecs, Uncompressed};
pub use multifd_transports::{
    ByteStream, Channel, Endpoint, SocketOptions, ThreadHook, TlsClient, TlsServer,
};
pub use multifd_wire::{BlockName, Configuration, DescribedSection, SectionHead};

pub use multifd_codecs as codecs;
pub use multifd_transports as transports;
pub use multifd_wire as wire;
pub use vm_memory;

/// The first lines that the package shows.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
pub struct Readme;
