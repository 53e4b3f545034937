//! How the pages of a channel are encoded: not at all, by the migration's codec, or by what suits
//! the link at the moment.

use std::sync::Arc;
use std::time::Duration;

use multifd_codecs::{Codec, CodecId, Encoder};
use multifd_wire::PacketFlags;

use crate::error::{Error, ErrorKind, Phase, Result};
use crate::source::codec_auto::{Change, Chooser, Measured};
use crate::stream::dialect;

/// The codecs of one channel.
pub(super) enum Encoding {
    /// Pages go as they are.
    Plain,
    /// By one codec.
    Fixed(CodecId, Box<dyn Encoder>),
    /// By the codec that is best at the moment. `None` before it is known which the destination
    /// has.
    Auto(Option<Auto>),
}

/// Several codecs, each with its own stream.
pub(super) struct Auto {
    chooser: Chooser,
    streams: Vec<Stream>,
}

struct Stream {
    codec: Arc<dyn Codec>,
    /// Tells streams of one codec apart.
    number: u8,
    /// `None` before its first packet.
    encoder: Option<Box<dyn Encoder>>,
}

/// What a packet's header says of its payload.
#[derive(Clone, Copy)]
pub(super) struct Encoded {
    pub(super) flags: PacketFlags,
    pub(super) stream: u8,
    /// The payload is the pages as they are.
    pub(super) is_plain: bool,
    /// By its place among several.
    codec: usize,
}

impl Encoding {
    pub(super) fn new(codec: &dyn Codec, auto: bool) -> Result<Self> {
        Ok(match codec.id() {
            _ if auto => Self::Auto(None),
            CodecId::NONE => Self::Plain,
            id => Self::Fixed(id, encoder(codec, Phase::Setup)?),
        })
    }

    /// What the destination can do is known: `features`, 0 for a QEMU, which has been told of one
    /// codec.
    pub(super) fn settle(&mut self, features: u64) {
        if matches!(self, Self::Auto(None)) {
            let streams: Vec<Stream> = dialect::codecs_by_cost(features).map(Stream::of).collect();
            *self = match streams.len() {
                0 | 1 => Self::Plain,
                _ => {
                    let chooser = Chooser::new(streams.iter().map(|stream| stream.codec.describe()));
                    Self::Auto(Some(Auto { chooser, streams }))
                }
            };
        }
    }

    /// Pages may be encoded: they are copied first.
    pub(super) fn encodes(&self) -> bool {
        !matches!(self, Self::Plain)
    }

    /// Flags of a packet in which nothing is encoded.
    pub(super) fn flags(&self) -> PacketFlags {
        PacketFlags::pages(if let Self::Fixed(id, _) = self { *id } else { CodecId::NONE })
    }

    /// Encodes the pages of a packet, to what is empty.
    pub(super) fn encode(&mut self, pages: &[u8], payload: &mut Vec<u8>) -> Result<Encoded> {
        let plain = Encoded { flags: self.flags(), stream: 0, is_plain: true, codec: 0 };
        match self {
            Self::Plain | Self::Auto(None) => Ok(plain),
            Self::Fixed(_, encoder) => {
                prepare(&mut **encoder, pages, payload)?;
                Ok(Encoded { is_plain: false, ..plain })
            }
            Self::Auto(Some(auto)) => auto.encode(pages, payload),
        }
    }

    /// A packet has gone. Gives the change of codec that this leads to.
    pub(super) fn sent(&mut self, encoded: Encoded, measured: Measured) -> Option<Change> {
        match self {
            Self::Auto(Some(auto)) => auto.chooser.record(encoded.codec, measured),
            _ => None,
        }
    }
}

impl Auto {
    fn encode(&mut self, pages: &[u8], payload: &mut Vec<u8>) -> Result<Encoded> {
        let codec = self.chooser.next();
        let count = self.streams.len();
        let stream = self.streams.get_mut(codec);
        let Stream { codec: of, number, encoder } = stream
            .ok_or_else(|| Error::bug(Phase::Active, format_args!("codec {codec} of {count} was chosen")))?;
        let (flags, stream) = (PacketFlags::pages(of.id()), *number);
        let is_plain = of.id() == CodecId::NONE;
        if !is_plain {
            let encoder = match encoder {
                Some(encoder) => encoder,
                None => encoder.insert(self::encoder(&**of, Phase::Active)?),
            };
            prepare(&mut **encoder, pages, payload)?;
        }
        Ok(Encoded { flags, stream, is_plain, codec })
    }
}

impl Stream {
    fn of((codec, number): (Arc<dyn Codec>, u8)) -> Self {
        Self { codec, number, encoder: None }
    }
}

fn encoder(codec: &dyn Codec, phase: Phase) -> Result<Box<dyn Encoder>> {
    codec.encoder().map_err(|error| {
        Error::new(ErrorKind::Codec, phase, format!("no encoder for {}", codec.name())).because(error)
    })
}

fn prepare(encoder: &mut dyn Encoder, pages: &[u8], payload: &mut Vec<u8>) -> Result<()> {
    encoder
        .prepare(pages, payload)
        .map_err(|error| Error::new(ErrorKind::Codec, Phase::Active, "pages do not encode").because(error))
}

/// µs, as counters have them.
pub(super) fn micros(time: Duration) -> usize {
    usize::try_from(time.as_micros()).unwrap_or(usize::MAX)
}
