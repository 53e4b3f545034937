//! The ways of a source that docs/wire.md allows.

use super::Codec;
use crate::ZeroPages;

/// How a scripted source goes about it. The default is QEMU 10 on one connection, with a return
/// path.
#[derive(Clone, Debug)]
pub struct Style {
    /// The machine type.
    pub machine: &'static str,
    /// Multifd channels; 0: all on main.
    pub channels: u8,
    /// How packets are packed.
    pub codec: Codec,
    /// Pages in a packet.
    pub packet_pages: usize,
    /// Where sync points are on main.
    pub sync: SyncPoints,
    /// How a channel's SYNC looks.
    pub sync_packets: SyncPackets,
    /// Ends every channel with a SYNC that main knows nothing of (9.1, 9.2).
    pub unmatched_sync: bool,
    /// `pages_alloc` of packets with pages, as a multiple of what fits in: up to 100 before 9.0.
    pub pages_alloc_factor: u32,
    /// How zero pages go.
    pub zero_pages: ZeroPages,
    /// Names the block in every record on main.
    pub full_names: bool,
    /// Sends pages of later rounds as differences.
    pub xbzrle: bool,
    /// FLUSH records although there are no channels (8.1.0).
    pub stray_flush: bool,
    /// Opens the return path and waits for SHUT.
    pub return_path: bool,
    /// Announces that it may switch to postcopy.
    pub advise: bool,
    /// Announces the switch-over.
    pub switchover_start: bool,
    /// Ends with a vmdescription.
    pub description: bool,
}

/// Where the sync points are on main (docs/wire.md §9).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum SyncPoints {
    /// FLUSH records.
    PerRound,
    /// Every end of a piece of the RAM section.
    PerSection,
}

/// How a channel's SYNC looks.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum SyncPackets {
    /// A packet of its own, zeros in it (9.0 and later).
    Clean,
    /// A packet of its own, made of the leftovers of the last one (8.x).
    Stale,
    /// The last packet with pages has the flag, if there is one (7.2).
    WithPages,
}

impl Default for Style {
    fn default() -> Self {
        Self {
            machine: "pc-q35-10.0",
            channels: 0,
            codec: Codec::None,
            packet_pages: 16,
            sync: SyncPoints::PerRound,
            sync_packets: SyncPackets::Clean,
            unmatched_sync: false,
            pages_alloc_factor: 1,
            zero_pages: ZeroPages::Multifd,
            full_names: false,
            xbzrle: false,
            stray_flush: false,
            return_path: true,
            advise: false,
            switchover_start: false,
            description: true,
        }
    }
}

impl Style {
    /// The default with this many channels.
    pub fn multifd(channels: u8) -> Self {
        Self { channels, ..Self::default() }
    }
}
