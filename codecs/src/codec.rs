//! The three traits of a codec: one shared factory, and an encoder and a decoder per channel.

use std::fmt::Debug;

pub use multifd_wire::CodecId;

use crate::error::{CodecError, DecodeFailed, EncodeFailed};

/// Pages that one packet carries at most, in bytes: 512 KiB (docs/wire.md §7.2).
pub const MAX_BATCH_LEN: usize = 512 << 10;

/// Payload of one packet at most, in bytes: 1 MiB, the size of QEMU's receive buffer (docs/wire.md
/// §8).
pub const MAX_PAYLOAD_LEN: usize = 1 << 20;

/// A compression method for page batches: the shared factory of encoders and decoders, one per
/// migration.
///
/// In QEMU's words this is `MultiFDMethods`: `encoder()` is send_setup, [`Encoder::prepare`] is
/// send_prepare, `decoder()` is recv_setup, [`Decoder::recv_pages`] is recv_pages, and dropping one
/// of them is the cleanup.
///
/// A codec of your own needs these three traits and an id;
/// [`conformance::check`](crate::conformance::check) tells whether it keeps the rules. Here is one
/// that packs runs of a byte into pairs:
///
/// ```
/// use multifd_codecs::{Codec, CodecError, CodecId, DecodeFailed, Decoder, EncodeFailed, Encoder};
/// use multifd_codecs::conformance;
///
/// #[derive(Debug)]
/// struct RunLength;
///
/// impl Codec for RunLength {
///     fn id(&self) -> CodecId { CodecId::new(0x18).unwrap() } // one that is free for codecs of your own
///     fn name(&self) -> &str { "run-length" }
///     fn encoder(&self) -> Result<Box<dyn Encoder>, CodecError> { Ok(Box::new(Pack)) }
///     fn decoder(&self) -> Result<Box<dyn Decoder>, CodecError> { Ok(Box::new(Unpack { dead: false })) }
/// }
///
/// struct Pack;
/// impl Encoder for Pack {
///     fn prepare(&mut self, pages: &[u8], out: &mut Vec<u8>) -> Result<(), EncodeFailed> {
///         for run in pages.chunk_by(|a, b| a == b).flat_map(|run| run.chunks(255)) {
///             out.extend([run.len() as u8, run[0]]); // at worst two bytes for one: 1 MiB for 512 KiB
///         }
///         Ok(())
///     }
/// }
///
/// struct Unpack { dead: bool }
/// impl Unpack {
///     fn unpack(payload: &[u8], pages: &mut [u8]) -> Result<(), DecodeFailed> {
///         let (expected, mut produced) = (pages.len(), 0);
///         let (pairs, rest) = payload.as_chunks::<2>();
///         for &[len, byte] in pairs {
///             let run = pages.get_mut(produced..produced + usize::from(len));
///             run.ok_or(DecodeFailed::TooLong { expected })?.fill(byte);
///             produced += usize::from(len);
///         }
///         match (produced == expected, rest.len()) {
///             (true, 0) => Ok(()),
///             (true, unread) => Err(DecodeFailed::Unread { unread, payload: payload.len() }),
///             (false, _) => Err(DecodeFailed::TooShort { produced, expected }),
///         }
///     }
/// }
/// impl Decoder for Unpack {
///     fn recv_pages(&mut self, payload: &[u8], pages: &mut [u8]) -> Result<(), DecodeFailed> {
///         if self.dead {
///             return Err(DecodeFailed::Dead);
///         }
///         Self::unpack(payload, pages).inspect_err(|_| self.dead = true)
///     }
/// }
///
/// conformance::check(&RunLength);
/// ```
pub trait Codec: Debug + Send + Sync + 'static {
    /// The value of the packet's codec field. Both ends have to mean the same by it. A codec of
    /// your own takes one from 0x18 on with several bits; both ends refuse a
    /// [reserved](CodecId::is_reserved) one.
    fn id(&self) -> CodecId;

    /// Short name for people: lower case, no spaces, e.g. `zstd`.
    fn name(&self) -> &str;

    /// Sets up the sending half of one channel.
    ///
    /// # Errors
    /// The library below has no memory or no such mode.
    fn encoder(&self) -> Result<Box<dyn Encoder>, CodecError>;

    /// Sets up the receiving half of one channel.
    ///
    /// # Errors
    /// The library below has no memory or no such mode.
    fn decoder(&self) -> Result<Box<dyn Decoder>, CodecError>;

    /// Name and settings, for display: `zstd:1`. Without settings, the name.
    fn describe(&self) -> String {
        self.name().to_owned()
    }
}

/// The sending half of a codec on one channel, with its history of that channel.
///
/// Called by the channel's worker thread only, so it need not be `Sync`. It must not block, and
/// must not panic whatever the pages hold. It should not allocate per packet, but for the growth of
/// `out`.
pub trait Encoder: Send {
    /// Appends the payload of one packet to `out`, and never touches what is there already.
    ///
    /// `pages` are whole pages back to back in private memory, which does not change meanwhile. At
    /// most [`MAX_PAYLOAD_LEN`] bytes come out of at most [`MAX_BATCH_LEN`] bytes of pages; no
    /// pages give no payload. The peer can decode the payload without seeing the next one.
    ///
    /// # Errors
    /// The library below refused. `out` is as before, and each later call is an error, too: the
    /// history is out of step.
    fn prepare(&mut self, pages: &[u8], out: &mut Vec<u8>) -> Result<(), EncodeFailed>;
}

/// The receiving half of a codec on one channel, with its history of that channel.
///
/// Called by the channel's worker thread only, so it need not be `Sync`. It must not block, must
/// not panic whatever the peer sends, and must not allocate by a length that the peer chose without
/// a limit.
pub trait Decoder: Send {
    /// Consumes all of `payload` and fills `pages` exactly, or fails.
    ///
    /// The payloads of a channel come in the order in which its encoder made them.
    ///
    /// # Errors
    /// The payload is corrupt, yields fewer or more bytes than `pages` has, or has bytes left over.
    /// `pages` may be partly written. The decoder is dead then: each later call fails.
    fn recv_pages(&mut self, payload: &[u8], pages: &mut [u8]) -> Result<(), DecodeFailed>;

    /// Bytes that the decoder holds by now because of what the peer has sent, such as a window.
    /// They count towards the limit of a destination's memory. Default: 0, for what is small.
    fn memory(&self) -> usize {
        0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn traits_are_object_safe_and_cross_threads() {
        fn shared<T: Send + Sync + ?Sized>() {}
        fn sent<T: Send + ?Sized>() {}
        shared::<dyn Codec>();
        sent::<dyn Encoder>();
        sent::<dyn Decoder>();
        shared::<CodecError>();
        shared::<EncodeFailed>();
        shared::<DecodeFailed>();
    }
}
