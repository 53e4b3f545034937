//! What a codec can answer instead of bytes.
//!
//! The texts are for the log. None of them goes to the peer: it learns only that the migration
//! failed.

use std::error::Error;

/// What a library below a codec, or an embedder's own codec, gives as its reason.
pub type Reason = Box<dyn Error + Send + Sync>;

/// An encoder or a decoder could not be set up, at the start of a migration.
#[derive(Debug, thiserror::Error)]
#[error("codec {codec}: no {part} could be set up")]
pub struct CodecError {
    codec: String,
    part: &'static str,
    #[source]
    source: Reason,
}

impl CodecError {
    /// `codec` has no encoder to offer, for this reason.
    pub fn encoder(codec: impl Into<String>, source: impl Into<Reason>) -> Self {
        Self { codec: codec.into(), part: "encoder", source: source.into() }
    }

    /// `codec` has no decoder to offer, for this reason.
    pub fn decoder(codec: impl Into<String>, source: impl Into<Reason>) -> Self {
        Self { codec: codec.into(), part: "decoder", source: source.into() }
    }
}

/// A batch of pages could not be encoded. Our side is to blame: any bytes can be encoded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EncodeFailed {
    /// An earlier call failed, so the stream that the peer has seen cannot be continued.
    #[error("encoder used after it failed")]
    Dead,
    /// The library below refused to go on.
    #[error("pages could not be encoded")]
    Library(#[source] Reason),
}

impl EncodeFailed {
    /// Wraps the reason of the library below, or a text.
    pub fn library(reason: impl Into<Reason>) -> Self {
        Self::Library(reason.into())
    }
}

/// A payload is not what its packet header promises. The peer or the path to it is to blame.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DecodeFailed {
    /// The bytes break the rules of the format.
    #[error("payload is corrupt")]
    Corrupt(#[source] Reason),
    /// An earlier call failed, so the place in the stream is lost.
    #[error("decoder used after it failed")]
    Dead,
    /// The stream was ended. It has to stay open for the whole migration (docs/wire.md §8).
    #[error("payload ends the stream after {produced} of {expected} bytes, it has to stay open")]
    StreamEnded {
        /// Bytes of pages that came out of this payload.
        produced: usize,
        /// Bytes of pages that the packet header promises.
        expected: usize,
    },
    /// The payload yields more bytes than the pages hold.
    #[error("payload holds more than {expected} bytes of pages")]
    TooLong {
        /// Bytes of pages that the packet header promises.
        expected: usize,
    },
    /// The payload yields fewer bytes than the pages hold.
    #[error("payload holds {produced} bytes of pages, expected {expected}")]
    TooShort {
        /// Bytes of pages that came out of this payload.
        produced: usize,
        /// Bytes of pages that the packet header promises.
        expected: usize,
    },
    /// All pages are there, but the payload stops before the flush that ends a packet.
    #[error("payload of {payload} bytes stops short of the end of its last block")]
    Unfinished {
        /// Length of the payload in bytes.
        payload: usize,
    },
    /// All pages are there, and the codec would not read the rest of the payload.
    #[error("{unread} of {payload} payload bytes left over")]
    Unread {
        /// Bytes beyond the end of the pages.
        unread: usize,
        /// Length of the payload in bytes.
        payload: usize,
    },
}

impl DecodeFailed {
    /// Wraps the reason of the library below, or a text.
    pub fn corrupt(reason: impl Into<Reason>) -> Self {
        Self::Corrupt(reason.into())
    }
}
