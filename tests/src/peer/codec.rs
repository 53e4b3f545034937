//! Payloads as senders make them, ours and others: straight from the libraries, without our own
//! codecs.

use flate2::{Compress, Compression, FlushCompress};
use multifd_wire::CodecId;
use zstd::zstd_safe::zstd_sys::ZSTD_EndDirective;
use zstd::zstd_safe::{CCtx, CParameter, InBuffer, OutBuffer, compress_bound};

/// How the pages of packets are packed (docs/wire.md §8).
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Codec {
    /// As they are.
    #[default]
    None,
    /// One zlib stream a channel, a sync flush after each packet.
    Zlib,
    /// A deflate piece of its own for each packet, ended by a full flush; the two-byte zlib header
    /// once a channel.
    ZlibPieces,
    /// One zstd frame a channel, a flush after each packet.
    Zstd,
    /// A complete zstd frame for each packet.
    ZstdFrames {
        /// With the checksum of its content at the end.
        checksum: bool,
        /// With the length of its content at the start.
        content_size: bool,
    },
}

impl Codec {
    /// Every way of packing.
    pub const ALL: [Self; 8] = [
        Self::None,
        Self::Zlib,
        Self::ZlibPieces,
        Self::Zstd,
        Self::ZstdFrames { checksum: false, content_size: false },
        Self::ZstdFrames { checksum: true, content_size: false },
        Self::ZstdFrames { checksum: false, content_size: true },
        Self::ZstdFrames { checksum: true, content_size: true },
    ];

    /// The packets' codec field.
    pub fn id(self) -> CodecId {
        match self {
            Self::None => CodecId::NONE,
            Self::Zlib | Self::ZlibPieces => CodecId::ZLIB,
            Self::Zstd | Self::ZstdFrames { .. } => CodecId::ZSTD,
        }
    }
}

/// What packs the pages of one channel, with its history.
pub(super) enum Packer {
    None,
    Zlib(Compress),
    ZlibPieces { first: bool },
    Zstd(Box<CCtx<'static>>),
    ZstdFrames(Box<CCtx<'static>>),
}

impl Packer {
    pub(super) fn new(codec: Codec) -> Self {
        match codec {
            Codec::None => Self::None,
            Codec::Zlib => Self::Zlib(Compress::new(Compression::fast(), true)),
            Codec::ZlibPieces => Self::ZlibPieces { first: true },
            Codec::Zstd => Self::Zstd(Box::new(CCtx::create())),
            Codec::ZstdFrames { checksum, content_size } => {
                let mut context = CCtx::create();
                for flag in [CParameter::ChecksumFlag(checksum), CParameter::ContentSizeFlag(content_size)] {
                    context.set_parameter(flag).expect("zstd knows its own flags");
                }
                Self::ZstdFrames(Box::new(context))
            }
        }
    }

    pub(super) fn pack(&mut self, pages: &[u8]) -> Vec<u8> {
        match self {
            Self::None => pages.to_vec(),
            Self::Zlib(stream) => deflate(stream, pages, FlushCompress::Sync),
            Self::ZlibPieces { first } => {
                let mut payload = if std::mem::take(first) { vec![0x78, 0x01] } else { Vec::new() };
                let mut piece = Compress::new(Compression::best(), false);
                payload.extend(deflate(&mut piece, pages, FlushCompress::Full));
                payload
            }
            Self::Zstd(context) => zstd(context, pages, ZSTD_EndDirective::ZSTD_e_flush),
            Self::ZstdFrames(context) => {
                let length = Some(pages.len() as u64);
                context.set_pledged_src_size(length).expect("no frame is open");
                zstd(context, pages, ZSTD_EndDirective::ZSTD_e_end)
            }
        }
    }
}

/// All of `pages` through `stream`, with `flush` at the end.
fn deflate(stream: &mut Compress, pages: &[u8], flush: FlushCompress) -> Vec<u8> {
    let mut out = Vec::with_capacity(pages.len() + pages.len() / 8 + 128);
    stream.compress_vec(pages, &mut out, flush).expect("deflate takes any bytes");
    assert!(out.len() < out.capacity(), "the flush is not complete");
    out
}

fn zstd(context: &mut CCtx<'_>, pages: &[u8], directive: ZSTD_EndDirective) -> Vec<u8> {
    let mut out = Vec::with_capacity(compress_bound(pages.len()) + 128);
    let mut output = OutBuffer::around(&mut out);
    let left = context.compress_stream2(&mut output, &mut InBuffer::around(pages), directive);
    assert_eq!(left, Ok(0), "zstd did not finish");
    out
}

/// A delta that turns `old` into `new` (docs/wire.md §6); `None` if they are equal. Plain loops, no
/// limit.
pub(super) fn xbzrle(old: &[u8], new: &[u8]) -> Option<Vec<u8>> {
    let mut delta = Vec::new();
    let mut pairs = old.iter().zip(new).peekable();
    while pairs.peek().is_some() {
        let same = std::iter::from_fn(|| pairs.next_if(|(old, new)| old == new)).count();
        let changed: Vec<u8> =
            std::iter::from_fn(|| pairs.next_if(|(old, new)| old != new)).map(|(_, new)| *new).collect();
        if changed.is_empty() {
            break;
        }
        run(same, &mut delta);
        run(changed.len(), &mut delta);
        delta.extend(changed);
    }
    (!delta.is_empty()).then_some(delta)
}

fn run(len: usize, delta: &mut Vec<u8>) {
    let [low, high, ..] = len.to_le_bytes();
    if len < 0x80 {
        delta.push(low);
    } else {
        delta.extend([low | 0x80, high << 1 | low >> 7]);
    }
}
