//! What goes into the machine, and what comes out.

use std::time::Instant;

use multifd_wire::{
    BlockName, Configuration, DiscardRange, Item, ReturnMessage, SectionHead, SectionId, Wishes,
};

use crate::error::Phase;

/// One thing from the main stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::destination) enum Input {
    /// The list of blocks was read, and there is memory for them.
    Blocks,
    /// Stream header and configuration.
    Configuration(Configuration),
    /// The devices' sections of a package were read.
    Devices,
    /// A device section before the end of RAM was read.
    Device(DeviceEnd),
    /// End of the records of a piece of RAM.
    EndOfRecords,
    /// A FLUSH record.
    Flush,
    /// The footer that closes a section.
    Footer(SectionId),
    /// A command, the head of a section, or the end of the items.
    Item(Item),
    /// A piece of the live section of dirty bitmaps was read, and has none.
    NoBitmaps(SectionId),
    /// The bytes of a package were read: items come from there now.
    Package,
}

/// How the section of a device that came before the end of RAM ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::destination) enum DeviceEnd {
    /// At its footer, and the stream goes on.
    Footer,
    /// With the stream: the section belongs to the devices' part of a stream without an END of RAM.
    Stream,
}

/// What the driver knows when it hands an input over.
#[derive(Clone, Copy, Debug)]
pub(in crate::destination) struct Observed {
    pub(in crate::destination) now: Instant,
    /// Pages that have come so far, on all channels.
    pub(in crate::destination) pages: u64,
    /// Parallel channels have joined.
    pub(in crate::destination) has_channels: bool,
}

/// What the driver does next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::destination) enum Effect {
    /// Send on the return path; errors are of this phase.
    Answer(Phase, ReturnMessage),
    /// Answer this PING when the guest's device state has been loaded.
    AnswerWhenLoaded(u32),
    /// The source has this uuid, as each of its channels must.
    CheckUuid([u8; 16]),
    /// Compare the digest of the block's pages with the source's.
    Compare {
        /// The block.
        block: BlockName,
        /// The source's.
        digest: u64,
    },
    /// Another pass over RAM has begun.
    CountRound,
    /// These pages are as if they had never come.
    Discard {
        /// The block.
        block: BlockName,
        /// Bytes of it.
        ranges: Vec<DiscardRange>,
    },
    /// Check what the source wishes to be checked.
    Heed(Wishes),
    /// The device sections read since the last live item were early.
    KeepEarly {
        /// RAM has begun before them.
        within_ram: bool,
    },
    /// Wait until every channel has reached the sync point at the switch, and let none go on before
    /// LISTEN.
    HoldChannels,
    /// Connections may come until the end: the source may switch to post-copy.
    KeepListening,
    /// Serve page faults from now on.
    Listen,
    /// Messages may go out on the return path.
    OpenReturnPath,
    /// The source goes on with post-copy over this link.
    Resume,
    /// The source would go on over another link when this one breaks: its public key.
    Resumable([u8; 32]),
    /// The package ends; the guest may run.
    Run,
    /// Tell the source which pages of the block are here.
    SendBitmap(BlockName),
    /// All pages of a round have come; the source is about to be told so by the answer to this
    /// PING.
    Settle(u32),
    /// From now on channels may carry packets of the multifd dialect.
    SpeakDialect,
    /// Wait until every channel has reached its SYNC.
    SyncPoint,
}

/// What comes next in the stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::destination) enum Expected {
    /// The list of blocks; with `mapped`, their pages, too.
    Blocks {
        /// Pages lie at fixed places of the file.
        mapped: bool,
    },
    /// Stream header and configuration.
    Configuration,
    /// The payload and the footer of an early device's section.
    Device {
        /// Its head, which was read.
        head: SectionHead,
        /// The RAM section, if it has begun.
        ram: Option<SectionId>,
    },
    /// Nothing: a post-copy has ended. The machine is done.
    End,
    /// The footer of a section.
    Footer,
    /// A section or a command; in a package, of the package.
    Item,
    /// The payload and the footer of a piece of dirty bitmaps that has none.
    NoBitmaps,
    /// The bytes of a package.
    Package {
        /// How many.
        len: usize,
    },
    /// The sections of a package's devices.
    PackagedDevices {
        /// The head of the first, which was read.
        head: SectionHead,
    },
    /// Records of RAM, up to FLUSH or the end of the piece.
    Records {
        /// Pages lie elsewhere: no record may hold one.
        mapped: bool,
    },
    /// The devices' part, up to the end of the stream. The machine is done.
    Tail {
        /// The item that it begins with, which was read; `None` after an early device that turned
        /// out to belong to it.
        begins: Option<Item>,
    },
}
