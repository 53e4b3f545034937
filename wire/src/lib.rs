//! Bytes of the QEMU migration stream: layouts, limits, parse and encode. No I/O, no threads, no
//! clock.
//!
//! ```text
//! main channel     StreamHeader  Configuration  Item Item Item ...  0x00  VmDescription
//!                                               |
//!                        Command ---------------+--------------- SectionHead  payload  Footer
//!                                                                             |
//!                  "ram": RamRecord (MemSize -> BlockEntry...), page bytes ---+--- devices: opaque, see TailScanner, Structure
//!
//! multifd channel  InitialPacket  { RamPacket + payload | DeviceStatePacket + payload } ...
//! return path      ReturnMessage ReturnMessage ...
//! ```
//!
//! Things of variable length are parsed from the front of a buffer and give [`Parsed`]: more bytes
//! needed, or the value and how many bytes it took. Things of fixed length are parsed from an
//! array. Whatever a parser returns has passed every check that needs no other knowledge than the
//! bytes; nothing is allocated before its length has been checked against a limit. Sections (§) are
//! those of `docs/wire.md`.
//!
//! ```
//! use multifd_wire::{Command, Item};
//!
//! let mut bytes = Vec::new();
//! Item::Command(Command::Ping(1)).encode(&mut bytes);
//! assert_eq!(bytes, [8, 0, 2, 0, 4, 0, 0, 0, 1]);
//!
//! assert_eq!(Item::parse(&bytes[..6])?, None);
//! assert_eq!(Item::parse(&bytes)?, Some((Item::Command(Command::Ping(1)), 9)));
//! assert_eq!(Item::parse(&[8, 0, 99, 0, 0]).unwrap_err().to_string(), "command: 99, expected 1..=11");
//! # Ok::<(), multifd_wire::Invalid>(())
//! ```
#![forbid(unsafe_code)]

mod block_list;
mod command;
mod configuration;
mod described;
mod fields;
mod invalid;
mod item;
mod migration_id;
mod multifd;
mod names;
mod page_size;
mod ram;
mod reader;
mod return_path;
mod split;
mod stream;
mod tail;
mod vmdesc;
mod writer;

pub use block_list::{BlockEntry, BlockListBuilder, BlockListFormat, MAX_BLOCKS, MappedRamHeader};
pub use command::{Advise, Command, DiscardRange, MAX_DISCARD_RANGES};
pub use configuration::Configuration;
pub use described::DescribedSection;
pub use fields::{Contents, Field, Run, Structure, Subsection, Value};
pub use invalid::{Invalid, Parsed};
pub use item::{Footer, Item, ItemType, SectionHead, SectionId};
pub use migration_id::MigrationId;
pub use multifd::{
    CodecId, DeviceStatePacket, InitialPacket, MAX_DEVICE_STATE_PAYLOAD, MAX_PAYLOAD, MULTIFD_MAGIC,
    PACKET_PREFIX_LEN, PacketChecks, PacketFlags, PacketKind, RamPacket, RamPacketHeader, codec_stream,
    header_len, pages_per_packet, put_codec_stream,
};
pub use names::BlockName;
pub use page_size::PageSize;
pub use ram::{BlockRef, RAM_SECTION, RAM_SECTION_VERSION, RamRecord};
pub use return_path::{
    ALIVE_PING, Failure, HELLO_PING, Hello, MAX_RETURN_MESSAGE, RAM_PING, ReturnMessage, SETUP_PING, Wishes,
};
pub use split::{DeviceSection, split_tail};
pub use stream::{STREAM_MAGIC, STREAM_VERSION, StreamHeader};
pub use tail::{TailEnd, TailScanner};
pub use vmdesc::{
    DeviceDescription, FieldDescription, MAX_VMDESC, MAX_VMDESC_NODES, StructDescription, VMDESC_NODE_LEN,
    VmDescription,
};

/// The first lines that the package shows.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
pub struct Readme;
