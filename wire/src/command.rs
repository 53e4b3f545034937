use crate::reader::{Reader, Stop, whole};
use crate::writer::{put_counted16, put_cstr8};
use crate::{BlockName, Invalid, ResumeOpening};

/// What the source tells the destination between sections. Spec: docs/wire.md §4.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// 0x4d46, of the multifd dialect: a digest of all pages of this block, as they were sent last.
    Digest {
        /// The block.
        block: BlockName,
        /// The digest. Spec: docs/wire.md §27.8.
        digest: u64,
    },
    /// 8: turn COLO on.
    EnableColo,
    /// 1: the destination may send on the return path.
    OpenReturnPath,
    /// 7: this many bytes follow, a nested stream of items.
    Packaged(u32),
    /// 2: to be answered by a PONG of the same value.
    Ping(u32),
    /// 0x4d50, of the multifd dialect: pages come on the parallel channels after the switch to
    /// postcopy, too. Spec: docs/wire.md §27.10.
    PostcopyChannels,
    /// 3: postcopy may come. `None` if it is for dirty bitmaps only.
    PostcopyAdvise(Option<Advise>),
    /// 4: serve page faults from now on.
    PostcopyListen,
    /// 9: the link is back, go on with postcopy.
    PostcopyResume,
    /// 5: start the vCPUs.
    PostcopyRun,
    /// 6: drop these ranges, they are stale or were never sent.
    RamDiscard {
        /// The block all ranges are in.
        block: BlockName,
        /// 1..=[`MAX_DISCARD_RANGES`] ranges.
        ranges: Vec<DiscardRange>,
    },
    /// 0x4d52, of the multifd dialect: the source answers for the number of the destination's
    /// [`Challenge`](crate::ReturnMessage::Challenge). Spec: docs/wire.md §27.11.
    Proof([u8; ResumeOpening::NONCE_LEN]),
    /// 10: say which pages of this block have arrived.
    RecvBitmap(BlockName),
    /// 0x4d51, of the multifd dialect: the source would go on over another link when this one
    /// breaks. Its public key, from which both ends make the secret by which they know each other
    /// then. Spec: docs/wire.md §27.11.
    Resumable([u8; ResumeOpening::NONCE_LEN]),
    /// 11: the switchover begins.
    SwitchoverStart,
}

/// Page sizes of the source; both must equal the destination's. Spec: docs/wire.md §4.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Advise {
    /// Bitwise OR of the host page sizes of all blocks, in bytes.
    pub page_sizes: u64,
    /// Target page size in bytes.
    pub target_page: u64,
}

/// A range of bytes in a block; its end fits a u64. Spec: docs/wire.md §4.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiscardRange {
    /// First byte, from the block's start.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
}

/// Most ranges in one discard command. Spec: docs/wire.md §4.
pub const MAX_DISCARD_RANGES: usize = 12;

const OPEN_RETURN_PATH: u16 = 1;
const PING: u16 = 2;
const POSTCOPY_ADVISE: u16 = 3;
const POSTCOPY_LISTEN: u16 = 4;
const POSTCOPY_RUN: u16 = 5;
const RAM_DISCARD: u16 = 6;
const PACKAGED: u16 = 7;
const ENABLE_COLO: u16 = 8;
const POSTCOPY_RESUME: u16 = 9;
const RECV_BITMAP: u16 = 10;
const SWITCHOVER_START: u16 = 11;
const POSTCOPY_CHANNELS: u16 = 0x4d50;
const RESUMABLE: u16 = 0x4d51;
const PROOF: u16 = 0x4d52;
const DIGEST: u16 = 0x4d46;

/// Longest body: a discard of [`MAX_DISCARD_RANGES`] ranges in a block with the longest name.
const MAX_BODY: usize = 1 + 1 + BlockName::MAX_LEN + 1 + 16 * MAX_DISCARD_RANGES;

impl Command {
    /// Reads what follows the item type byte.
    pub(crate) fn read(r: &mut Reader<'_>) -> Result<Self, Stop> {
        let id = r.be16()?;
        let len = usize::from(r.be16()?);
        check_len(id, len)?;
        Ok(whole("command body", r.take(len)?, |r| Self::read_body(id, len, r))?)
    }

    fn read_body(id: u16, len: usize, r: &mut Reader<'_>) -> Result<Self, Stop> {
        Ok(match id {
            OPEN_RETURN_PATH => Self::OpenReturnPath,
            PING => Self::Ping(r.be32()?),
            POSTCOPY_ADVISE if len == 0 => Self::PostcopyAdvise(None),
            POSTCOPY_ADVISE => {
                Self::PostcopyAdvise(Some(Advise { page_sizes: r.be64()?, target_page: r.be64()? }))
            }
            POSTCOPY_CHANNELS => Self::PostcopyChannels,
            POSTCOPY_LISTEN => Self::PostcopyListen,
            POSTCOPY_RUN => Self::PostcopyRun,
            RAM_DISCARD => read_discard(r)?,
            PACKAGED => Self::Packaged(r.be32()?),
            ENABLE_COLO => Self::EnableColo,
            POSTCOPY_RESUME => Self::PostcopyResume,
            RECV_BITMAP => Self::RecvBitmap(BlockName::try_from(r.cstr8()?)?),
            SWITCHOVER_START => Self::SwitchoverStart,
            RESUMABLE => Self::Resumable(r.array()?),
            PROOF => Self::Proof(r.array()?),
            DIGEST => Self::Digest { block: BlockName::try_from(r.cstr8()?)?, digest: r.be64()? },
            _ => return Err(unknown(id).into()),
        })
    }

    /// Writes what follows the item type byte.
    pub(crate) fn write(&self, out: &mut Vec<u8>) {
        out.extend(self.id().to_be_bytes());
        put_counted16(out, |out| match self {
            Self::Ping(value) | Self::Packaged(value) => out.extend(value.to_be_bytes()),
            Self::PostcopyAdvise(Some(advise)) => {
                out.extend(advise.page_sizes.to_be_bytes());
                out.extend(advise.target_page.to_be_bytes());
            }
            Self::RamDiscard { block, ranges } => write_discard(out, block, ranges),
            Self::Digest { block, digest } => {
                put_cstr8(out, block.as_str());
                out.extend(digest.to_be_bytes());
            }
            Self::RecvBitmap(block) => put_cstr8(out, block.as_str()),
            Self::Proof(bytes) | Self::Resumable(bytes) => out.extend(bytes),
            Self::EnableColo
            | Self::OpenReturnPath
            | Self::PostcopyAdvise(None)
            | Self::PostcopyChannels
            | Self::PostcopyListen
            | Self::PostcopyResume
            | Self::PostcopyRun
            | Self::SwitchoverStart => {}
        });
    }

    fn id(&self) -> u16 {
        match self {
            Self::Digest { .. } => DIGEST,
            Self::EnableColo => ENABLE_COLO,
            Self::OpenReturnPath => OPEN_RETURN_PATH,
            Self::Packaged(_) => PACKAGED,
            Self::Ping(_) => PING,
            Self::PostcopyAdvise(_) => POSTCOPY_ADVISE,
            Self::PostcopyChannels => POSTCOPY_CHANNELS,
            Self::PostcopyListen => POSTCOPY_LISTEN,
            Self::PostcopyResume => POSTCOPY_RESUME,
            Self::PostcopyRun => POSTCOPY_RUN,
            Self::Proof(_) => PROOF,
            Self::RamDiscard { .. } => RAM_DISCARD,
            Self::RecvBitmap(_) => RECV_BITMAP,
            Self::Resumable(_) => RESUMABLE,
            Self::SwitchoverStart => SWITCHOVER_START,
        }
    }
}

/// Refuses a wrong length before its bytes are waited for.
fn check_len(id: u16, len: usize) -> Result<(), Invalid> {
    let (good, expected) = match id {
        PING | PACKAGED => (len == 4, "4 bytes"),
        POSTCOPY_ADVISE => (len == 0 || len == 16, "0 or 16 bytes"),
        RAM_DISCARD => (len <= MAX_BODY, "at most 450 bytes"),
        RECV_BITMAP => (len <= 1 + BlockName::MAX_LEN, "at most 256 bytes"),
        DIGEST => ((10..=9 + BlockName::MAX_LEN).contains(&len), "10..=264 bytes"),
        PROOF | RESUMABLE => (len == ResumeOpening::NONCE_LEN, "32 bytes"),
        OPEN_RETURN_PATH | POSTCOPY_CHANNELS | POSTCOPY_LISTEN | POSTCOPY_RUN | ENABLE_COLO
        | POSTCOPY_RESUME | SWITCHOVER_START => (len == 0, "0 bytes"),
        _ => return Err(unknown(id)),
    };
    if good {
        return Ok(());
    }
    Err(Invalid::new("command length", format_args!("{len} bytes for command {id}"), expected))
}
const _: () = assert!(MAX_BODY == 450);

fn unknown(id: u16) -> Invalid {
    Invalid::new("command", id, "1..=11")
}

fn read_discard(r: &mut Reader<'_>) -> Result<Command, Stop> {
    match r.u8()? {
        0 => {}
        version => return Err(Invalid::new("discard version", version, 0).into()),
    }
    let block = BlockName::try_from(r.cstr8()?)?;
    match r.u8()? {
        0 => {}
        end => return Err(Invalid::new("byte after the discard's block name", end, 0).into()),
    }
    let mut ranges = Vec::with_capacity(MAX_DISCARD_RANGES);
    while !r.rest().is_empty() {
        let (offset, len) = (r.be64()?, r.be64()?);
        if offset.checked_add(len).is_none() {
            let seen = format!("{len:#x} bytes at {offset:#x}");
            return Err(Invalid::new("discard range", seen, "an end below 2^64").into());
        }
        ranges.push(DiscardRange { offset, len });
    }
    if !(1..=MAX_DISCARD_RANGES).contains(&ranges.len()) {
        let expected = format!("1..={MAX_DISCARD_RANGES}");
        return Err(Invalid::new("discard ranges", ranges.len(), expected).into());
    }
    Ok(Command::RamDiscard { block, ranges })
}

fn write_discard(out: &mut Vec<u8>, block: &BlockName, ranges: &[DiscardRange]) {
    debug_assert!((1..=MAX_DISCARD_RANGES).contains(&ranges.len()), "{} discard ranges", ranges.len());
    out.push(0);
    put_cstr8(out, block.as_str());
    out.push(0);
    for range in ranges {
        out.extend(range.offset.to_be_bytes());
        out.extend(range.len.to_be_bytes());
    }
}
