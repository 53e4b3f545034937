use crate::reader::{Reader, Stop, prefix, whole};
use crate::writer::{put_counted16, put_cstr8};
use crate::{BlockName, Invalid, MigrationId, Parsed, ResumeOpening};

/// What the destination sends back on the main connection. Spec: docs/wire.md §11.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReturnMessage {
    /// 0x4d47: a multifd destination is alive, and not done yet.
    Alive,
    /// 0x4d52: a multifd destination answers for the number of a [`ResumeOpening`], and asks for an
    /// answer of the same kind.
    Challenge {
        /// Random, for this connection alone.
        nonce: [u8; ResumeOpening::NONCE_LEN],
        /// That the destination is the one that knows the migration. Spec: docs/wire.md §27.11.
        proof: [u8; ResumeOpening::NONCE_LEN],
    },
    /// 0x4d00 to 0x4dff, apart from those that are known: of a later version of the dialect. Means
    /// nothing here.
    Extension {
        /// The type.
        kind: u16,
        /// At most [`MAX_RETURN_MESSAGE`] bytes.
        body: Vec<u8>,
    },
    /// 0x4d48: why a multifd destination failed. SHUT follows.
    Failure(Failure),
    /// 0x4d46: the destination is multifd, not QEMU. Only sent in answer to a PING of
    /// [`HELLO_PING`].
    Hello(Hello),
    /// 0x4d50: the id of a migration that may become a post-copy, for the source to go on with
    /// after its link has gone.
    Id(MigrationId),
    /// 0x4d49: how long a multifd destination took to load the device state, in µs. SHUT follows.
    Loaded(u64),
    /// 0x4d54: the destination knows no migration of the id that a connection has begun with.
    NotKnown,
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
    /// 0x4d51: half of what both ends make the secret of a migration from that can be resumed: the
    /// destination's public key.
    ResumeKey([u8; ResumeOpening::NONCE_LEN]),
    /// 0x4d53: the value of the last PING behind a round that has been answered. What has come
    /// since, the bitmaps say that follow, of each block one.
    Standing(u32),
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

/// What a multifd destination says of its failure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// Where in the migration it was: see docs/wire.md §27.4.
    pub phase: u8,
    /// In words, at most [`Failure::MAX_REASON`] bytes.
    pub reason: String,
}

impl Failure {
    /// Longest reason, in bytes.
    pub const MAX_REASON: usize = MAX_RETURN_MESSAGE - 1;
}

/// Value of the PING with which a multifd source asks whether the other end is multifd, too:
/// `mfd1`. QEMU just answers with a PONG.
pub const HELLO_PING: u32 = 0x6d66_6431;

/// Value of the PING behind the list of RAM blocks: `mfs1`. With its PONG the destination has taken
/// the blocks.
pub const SETUP_PING: u32 = 0x6d66_7331;

/// Value of the PING behind the last RAM: `mfr1`. With its PONG the destination has all of it.
pub const RAM_PING: u32 = 0x6d66_7231;

/// Bit of the PING behind a round of a multifd source, all but the last; the others are the round's
/// number, from 1.
pub const ROUND_PING: u32 = 0x8000_0000;

/// Value of the PINGs with which a source that has nothing to send shows that it is alive: `mfa1`.
pub const ALIVE_PING: u32 = 0x6d66_6131;

/// What a multifd source would have its destination do from the first page on, in a PING straight
/// after that with [`HELLO_PING`]: `mfw` and eight bits. Spec: docs/wire.md §27.1.
///
/// A destination that does not know a wish answers with a PONG, as any other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wishes {
    /// Packets with pages have checksums.
    pub checksums: bool,
    /// A digest of RAM is to be compared at the end.
    pub digest: bool,
    /// The packets of a channel may have different codecs.
    pub mixed: bool,
}

impl Wishes {
    const PING: u32 = 0x6d66_7700;
    const CHECKSUMS: u32 = 1 << 0;
    const DIGEST: u32 = 1 << 1;
    const MIXED: u32 = 1 << 2;

    /// The value of the PING.
    pub fn ping(self) -> u32 {
        let bit = |set: bool, bit: u32| if set { bit } else { 0 };
        Self::PING
            | bit(self.checksums, Self::CHECKSUMS)
            | bit(self.digest, Self::DIGEST)
            | bit(self.mixed, Self::MIXED)
    }

    /// The wishes of a PING; `None` for one that is something else. Those of later versions are
    /// passed over.
    pub fn of_ping(value: u32) -> Option<Self> {
        let has = |bit: u32| value & bit != 0;
        let (checksums, digest) = (has(Self::CHECKSUMS), has(Self::DIGEST));
        let wishes = Self { checksums, digest, mixed: has(Self::MIXED) };
        (value & !0xff == Self::PING).then_some(wishes)
    }
}

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
const ALIVE: u16 = 0x4d47;
const FAILURE: u16 = 0x4d48;
const LOADED: u16 = 0x4d49;
const ID: u16 = 0x4d50;
const RESUME_KEY: u16 = 0x4d51;
const CHALLENGE: u16 = 0x4d52;
const STANDING: u16 = 0x4d53;
const NOT_KNOWN: u16 = 0x4d54;

/// The dialect's types. QEMU has none of them.
const DIALECT: std::ops::RangeInclusive<u16> = 0x4d00..=0x4dff;

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
            ALIVE => Self::Alive,
            FAILURE => {
                let phase = r.u8()?;
                let text = std::str::from_utf8(r.take(r.rest().len())?);
                let reason = text.map_err(|error| Invalid::new("reason of a failure", error, "UTF-8"))?;
                Self::Failure(Failure { phase, reason: reason.to_owned() })
            }
            ID => Self::Id(MigrationId(r.array()?)),
            LOADED => Self::Loaded(r.be64()?),
            RESUME_KEY => Self::ResumeKey(r.array()?),
            CHALLENGE => Self::Challenge { nonce: r.array()?, proof: r.array()? },
            STANDING => Self::Standing(r.be32()?),
            NOT_KNOWN => Self::NotKnown,
            _ if DIALECT.contains(&kind) => Self::Extension { kind, body: r.take(r.rest().len())?.to_vec() },
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
            Self::Pong(value) | Self::ResumeAck(value) | Self::Shut(value) | Self::Standing(value) => {
                out.extend(value.to_be_bytes());
            }
            Self::RecvBitmap(block) => put_cstr8(out, block.as_str()),
            Self::RequestPages { block, offset, len } => {
                out.extend(offset.to_be_bytes());
                out.extend(len.to_be_bytes());
                if let Some(block) = block {
                    put_cstr8(out, block.as_str());
                }
            }
            Self::Alive | Self::NotKnown | Self::SwitchoverAck => {}
            Self::Extension { body, .. } => out.extend(body),
            Self::Failure(failure) => {
                out.push(failure.phase);
                out.extend(failure.reason.as_bytes());
            }
            Self::Id(MigrationId(id)) => out.extend(id),
            Self::Loaded(micros) => out.extend(micros.to_be_bytes()),
            Self::ResumeKey(key) => out.extend(key),
            Self::Challenge { nonce, proof } => {
                out.extend(nonce);
                out.extend(proof);
            }
        });
    }

    fn kind(&self) -> u16 {
        match self {
            Self::Alive => ALIVE,
            Self::Challenge { .. } => CHALLENGE,
            Self::Extension { kind, .. } => *kind,
            Self::Failure(_) => FAILURE,
            Self::Hello(_) => HELLO,
            Self::Id(_) => ID,
            Self::Loaded(_) => LOADED,
            Self::NotKnown => NOT_KNOWN,
            Self::Pong(_) => PONG,
            Self::RecvBitmap(_) => RECV_BITMAP,
            Self::RequestPages { block: Some(_), .. } => REQ_PAGES_ID,
            Self::RequestPages { block: None, .. } => REQ_PAGES,
            Self::ResumeAck(_) => RESUME_ACK,
            Self::ResumeKey(_) => RESUME_KEY,
            Self::Shut(_) => SHUT,
            Self::Standing(_) => STANDING,
            Self::SwitchoverAck => SWITCHOVER_ACK,
        }
    }
}

/// Refuses a wrong length before its bytes are waited for.
fn check_len(kind: u16, len: usize) -> Result<(), Invalid> {
    let (good, expected) = match kind {
        SHUT | PONG | RESUME_ACK | STANDING => (len == 4, "4 bytes"),
        REQ_PAGES_ID => ((14..=12 + 256).contains(&len), "14..=268 bytes"),
        REQ_PAGES => (len == 12, "12 bytes"),
        RECV_BITMAP => ((2..=256).contains(&len), "2..=256 bytes"),
        ALIVE | SWITCHOVER_ACK | NOT_KNOWN => (len == 0, "0 bytes"),
        FAILURE => ((1..=MAX_RETURN_MESSAGE).contains(&len), "1..=512 bytes"),
        ID => (len == MigrationId::LEN, "16 bytes"),
        LOADED => (len == 8, "8 bytes"),
        RESUME_KEY => (len == ResumeOpening::NONCE_LEN, "32 bytes"),
        CHALLENGE => (len == 2 * ResumeOpening::NONCE_LEN, "64 bytes"),
        HELLO => ((10..=MAX_RETURN_MESSAGE).contains(&len), "10..=512 bytes"),
        _ if DIALECT.contains(&kind) => (len <= MAX_RETURN_MESSAGE, "0..=512 bytes"),
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
