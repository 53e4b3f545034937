//! Page batches in, packet payloads out: the codecs of the parallel channels, and two tools of the
//! page path beside them.
//!
//! ```text
//!   up to 128 pages,      Encoder::prepare      payload of        Decoder::recv_pages      the same pages
//!   private memory     ---------------------->  one packet     ------------------------->  at the destination
//!                        one per channel, with its history,  made by the shared Codec
//!
//!   zero::is_zero      which pages need not be sent at all
//!   xbzrle             the difference between a page and the copy that the destination has
//! ```
//!
//! | codec | id | payload (docs/wire.md §8) |
//! | --- | --- | --- |
//! | [`Uncompressed`] | 0 | the pages |
//! | `Lz4` (feature `lz4`) | 0x0a | a block of lz4; another multifd only |
//! | `Zlib` (feature `zlib`) | 2 | a piece of one zlib stream per channel, ended by a sync flush |
//! | `Zstd` (feature `zstd`, needs a C compiler) | 4 | a piece of one zstd frame per channel, ended by a flush |
//! | your own | any | see [`Codec`] for an example, [`conformance::check`] for the rules |
//!
//! No I/O, no threads, no clock. Codecs see private memory only, never guest memory: a guest writes
//! while we read, and a compressor that reads a byte twice is broken by that.

pub mod conformance;
pub mod xbzrle;
pub mod zero;

mod choice;
mod codec;
mod error;
mod level;
#[cfg(feature = "lz4")]
mod lz4;
mod parse;
mod random;
mod registry;
mod uncompressed;
#[cfg(feature = "zlib")]
mod zlib;
#[cfg(feature = "zstd")]
mod zstd;

pub use choice::{CodecChoice, CodecFamily};
pub use codec::{Codec, CodecId, Decoder, Encoder, MAX_BATCH_LEN, MAX_PAYLOAD_LEN};
pub use error::{CodecError, DecodeFailed, EncodeFailed, Reason};
pub use level::{LevelOutOfRange, ZlibLevel, ZstdLevel};
#[cfg(feature = "lz4")]
pub use lz4::Lz4;
pub use parse::{InvalidCodec, parse_codec};
pub use random::looks_random;
pub use registry::Codecs;
pub use uncompressed::Uncompressed;
#[cfg(feature = "zlib")]
pub use zlib::{Zlib, inflate_page};
#[cfg(feature = "zstd")]
pub use zstd::{WINDOW_LOG_MAX, Zstd};
