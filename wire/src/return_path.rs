use crate::reader::{Reader, Stop, prefix, whole};
use crate::writer::{put_counted16, put_cstr8};
use crate::{BlockName, Invalid, Parsed};

/// What the destination sends back on the main connection. Spec: docs/wire.md §11.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReturnMessage {
    /// 0x4d46: the destination is multifd, not QEMU. Only sent in answer to a PING of
    /// [`HELLO_PING`].
    Hello(Hello),
    /// 2: answer to a PING, with its value.
    Pong(u32),
    /// 5: the bitmap of received pages follows, outside of the message.
    RecvBitmap(BlockName),
    /// 3 and 4: the guest waits for these bytes.
    RequestPages {
        /// The block; `None` means that of the last request.
        block: Option<BlockName>,
        /// First byte, from the block's start.
        offset: u64,
        /// Bytes.
        len: u32,
    },
    /// 6: postcopy goes on. The value is 1.
    ResumeAck(u32),
    /// 1: the last message. 0 if the guest is loaded, else something failed.
    Shut(u32),
    /// 7: the devices are ready for the switchover.
    SwitchoverAck,
}

/// What a multifd destination can do beyond QEMU's protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hello {
    /// Version of the dialect.
    pub version: u16,
    /// One bit for each feature.
    pub features: u64,
}

/// Value of the PING with which a multifd source asks whether the other end is multifd, too:
/// `mfd1`. QEMU just answers with a PONG.
pub const HELLO_PING: u32 = 0x6d66_6431;

/// Longest body of a message, in bytes. Spec: docs/wire.md §11.
pub const MAX_RETURN_MESSAGE: usize = 512;

const SHUT: u16 = 1;
const PONG: u16 = 2;
const REQ_PAGES_ID: u16 = 3;
const REQ_PAGES: u16 = 4;
const RECV_BITMAP: u16 = 5;
const RESUME_ACK: u16 = 6;
const SWITCHOVER_ACK: u16 = 7;
const HELLO: u16 = 0x4d46;

/// The only value of RESUME_ACK.
const RESUME_VALUE: u32 = 1;

impl ReturnMessage {
    /// # Errors
    /// An unknown type, a length that is wrong for the type or above [`MAX_RETURN_MESSAGE`], or a
    /// malformed name.
    pub fn parse(buf: &[u8]) -> Parsed<Self> {
        prefix(buf, |r| {
            let kind = r.be16()?;
            let len = usize::from(r.be16()?);
            check_len(kind, len)?;
            Ok(whole("return path message", r.take(len)?, |r| Self::read_body(kind, r))?)
        })
    }

    fn read_body(kind: u16, r: &mut Reader<'_>) -> Result<Self, Stop> {
        Ok(match kind {
            SHUT => Self::Shut(r.be32()?),
            PONG => Self::Pong(r.be32()?),
            REQ_PAGES_ID | REQ_PAGES => {
                let (offset, len) = (r.be64()?, r.be32()?);
                let named = kind == REQ_PAGES_ID;
                Self::RequestPages { block: named.then(|| read_name(r)).transpose()?, offset, len }
            }
            RECV_BITMAP => Self::RecvBitmap(read_name(r)?),
            RESUME_ACK => match r.be32()? {
                RESUME_VALUE => Self::ResumeAck(RESUME_VALUE),
                seen => return Err(Invalid::new("resume acknowledgement", seen, RESUME_VALUE).into()),
            },
            SWITCHOVER_ACK => Self::SwitchoverAck,
            HELLO => {
                let hello = Hello { version: r.be16()?, features: r.be64()? };
                // A later version of the dialect may say more.
                r.take(r.rest().len())?;
                Self::Hello(hello)
            }
            _ => return Err(unknown(kind).into()),
        })
    }

    /// Appends the message.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.extend(self.kind().to_be_bytes());
        put_counted16(out, |out| match self {
            Self::Hello(hello) => {
                out.extend(hello.version.to_be_bytes());
                out.extend(hello.features.to_be_bytes());
            }
            Self::Pong(value) | Self::ResumeAck(value) | Self::Shut(value) => out.extend(value.to_be_bytes()),
            Self::RecvBitmap(block) => put_cstr8(out, block.as_str()),
            Self::RequestPages { block, offset, len } => {
                out.extend(offset.to_be_bytes());
                out.extend(len.to_be_bytes());
                if let Some(block) = block {
                    put_cstr8(out, block.as_str());
                }
            }
            Self::SwitchoverAck => {}
        });
    }

    fn kind(&self) -> u16 {
        match self {
            Self::Hello(_) => HELLO,
            Self::Pong(_) => PONG,
            Self::RecvBitmap(_) => RECV_BITMAP,
            Self::RequestPages { block: Some(_), .. } => REQ_PAGES_ID,
            Self::RequestPages { block: None, .. } => REQ_PAGES,
            Self::ResumeAck(_) => RESUME_ACK,
            Self::Shut(_) => SHUT,
            Self::SwitchoverAck => SWITCHOVER_ACK,
        }
    }
}

/// Refuses a wrong length before its bytes are waited for.
fn check_len(kind: u16, len: usize) -> Result<(), Invalid> {
    let (good, expected) = match kind {
        SHUT | PONG | RESUME_ACK => (len == 4, "4 bytes"),
        REQ_PAGES_ID => ((14..=12 + 256).contains(&len), "14..=268 bytes"),
        REQ_PAGES => (len == 12, "12 bytes"),
        RECV_BITMAP => ((2..=256).contains(&len), "2..=256 bytes"),
        SWITCHOVER_ACK => (len == 0, "0 bytes"),
        HELLO => ((10..=MAX_RETURN_MESSAGE).contains(&len), "10..=512 bytes"),
        _ => return Err(unknown(kind)),
    };
    if good {
        return Ok(());
    }
    let seen = format!("{len} bytes for type {kind}");
    Err(Invalid::new("return path message length", seen, expected))
}

fn read_name(r: &mut Reader<'_>) -> Result<BlockName, Stop> {
    Ok(BlockName::try_from(r.cstr8()?)?)
}

fn unknown(kind: u16) -> Invalid {
    Invalid::new("return path message type", kind, "1..=7")
}
