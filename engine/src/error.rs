//! What went wrong: who is to blame, in which phase, on which channel; and whether the source guest
//! may run on.

use std::borrow::Cow;
use std::error::Error as StdError;
use std::fmt;

use multifd_transports::{Endpoint, TransportError};
use multifd_wire::Invalid;

/// A migration that did not succeed.
///
/// `Display` gives phase, channel, what was seen, and all causes behind it in one line: `{error}`
/// is the whole story. The causes are also `source()`, for a caller that looks for a type among
/// them.
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    phase: Phase,
    channel: Option<String>,
    detail: Cow<'static, str>,
    source: Option<Box<dyn StdError + Send + Sync>>,
    remedy: Option<Remedy>,
    /// The guest may be running at the destination.
    handed_over: bool,
}

/// Who or what is to blame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// A parameter or a call order that cannot work; nothing was sent.
    ApiMisuse,
    /// The engine contradicts itself: a bug of ours. The migration ends, rather than go on with
    /// what may be wrong.
    Bug,
    /// The caller asked to stop.
    Cancelled,
    /// A codec could not encode, or the payload does not decode.
    Codec,
    /// A wait ran into its deadline.
    Deadline,
    /// Guest memory could not be mapped, read or written.
    GuestMemory,
    /// Both ends are sound but cannot work together.
    Incompatible,
    /// Bytes that no sound peer sends.
    InvalidStream,
    /// The guest writes faster than its pages can be sent, and the limits say to give up.
    NotConverging,
    /// A thread of ours panicked: a bug of ours.
    Panicked,
    /// The peer reported a failure of its own, with this status.
    PeerAborted(u32),
    /// Sound bytes at a moment or with a meaning that the protocol does not allow.
    PeerMisbehaved,
    /// A checkpoint or a file could not be read or written.
    Storage,
    /// A connection could not be made, or broke.
    Transport,
}

/// What the operator can do, where the error knows it. The words for it are the caller's: it has
/// flags, or a file of settings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Remedy {
    /// The destination ended the migration, or waits for something else: its own log says why.
    /// Number of channels, codec, machine type, sizes of RAM and ROM, or TLS may be set differently
    /// at the two ends.
    CompareSettings,
    /// The guest has more RAM than this end was told to take: allow more, or find room for it.
    RaiseMaxRam,
    /// The peer speaks TLS: give this end credentials, too.
    SetUpTls,
}

/// Where in a migration it happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Phase {
    /// The destination waits for its channels.
    Accept,
    /// RAM moves.
    Active,
    /// The guest is handed over.
    Commit,
    /// The source opens its channels.
    Connect,
    /// Device state moves, the guest is stopped.
    Device,
    /// The guest runs at the destination, its RAM follows.
    Postcopy,
    /// Headers and the list of RAM blocks.
    Setup,
}

/// The result of everything that takes part in a migration.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An error of `kind` in `phase`; `detail` says what was seen and what was expected.
    pub(crate) fn new(kind: ErrorKind, phase: Phase, detail: impl Into<Cow<'static, str>>) -> Self {
        Self {
            kind,
            phase,
            channel: None,
            detail: detail.into(),
            source: None,
            remedy: None,
            handed_over: false,
        }
    }

    /// Names the channel, unless a closer place has done so.
    #[must_use]
    pub(crate) fn on(mut self, channel: impl Into<String>) -> Self {
        self.channel.get_or_insert_with(|| channel.into());
        self
    }

    /// Attaches the cause.
    #[must_use]
    pub(crate) fn because(mut self, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// Who or what is to blame.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// Where in the migration it happened.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// The channel it happened on, if it was one: `main` or `channel 3`, with the peer's address.
    pub fn channel(&self) -> Option<&str> {
        self.channel.as_deref()
    }

    /// True if the guest cannot be running at the destination, whatever [`Error::phase`] it
    /// happened in.
    ///
    /// False once the byte that lets the destination run the guest has been handed to the kernel,
    /// unless the destination has refused the guest after all.
    pub fn source_may_resume(&self) -> bool {
        !self.handed_over
    }

    /// What the operator can do, if that is known: of this error, or of a connection that was
    /// refused before it.
    pub fn remedy(&self) -> Option<Remedy> {
        self.remedy
    }

    /// The whole chain in one line, `a: b: c`: what `Display` gives.
    pub fn chain(&self) -> String {
        self.to_string()
    }

    /// The same without the phase: channel, what was seen, all causes.
    pub(crate) fn write_reason(&self, f: &mut impl fmt::Write) -> fmt::Result {
        if let Some(channel) = &self.channel {
            write!(f, "{channel}: ")?;
        }
        f.write_str(&self.detail)?;
        let mut cause = self.source();
        while let Some(error) = cause {
            write!(f, ": {error}")?;
            // One of ours has said its causes already.
            cause = if error.is::<Self>() { None } else { error.source() };
        }
        Ok(())
    }

    /// Marks an error that ended a migration after the guest was handed over.
    #[must_use]
    pub(crate) fn after_hand_over(mut self) -> Self {
        self.handed_over = true;
        self
    }

    /// Whether it is of the connections, or of what they carry, and not of either end: another link
    /// may do better.
    pub(crate) fn is_of_the_link(&self) -> bool {
        matches!(self.kind, ErrorKind::Deadline | ErrorKind::InvalidStream | ErrorKind::Transport)
    }

    /// What a wait gives that the stop switch has ended: the cause is in the switch.
    pub(crate) fn stopped(phase: Phase) -> Self {
        Self::new(ErrorKind::Cancelled, phase, "stopped")
    }

    pub(crate) fn invalid(phase: Phase, invalid: Invalid) -> Self {
        Self::new(ErrorKind::InvalidStream, phase, "invalid stream").because(invalid)
    }

    /// What cannot be was seen: `detail` says what.
    pub(crate) fn bug(phase: Phase, detail: impl fmt::Display) -> Self {
        Self::new(ErrorKind::Bug, phase, format!("{detail} (a bug in multifd)"))
    }

    pub(crate) fn misbehaved(phase: Phase, detail: impl Into<Cow<'static, str>>) -> Self {
        Self::new(ErrorKind::PeerMisbehaved, phase, detail)
    }

    pub(crate) fn incompatible(phase: Phase, detail: impl Into<Cow<'static, str>>) -> Self {
        Self::new(ErrorKind::Incompatible, phase, detail)
    }

    /// Says what can be done, unless that is said.
    #[must_use]
    pub(crate) fn remedied_by(mut self, remedy: Option<Remedy>) -> Self {
        self.remedy = self.remedy.or(remedy);
        self
    }

    /// A peer that speaks TLS to this end, which is not set up for it.
    pub(crate) fn unexpected_tls(phase: Phase, peer: &str) -> Self {
        Self::incompatible(phase, format!("the {peer} speaks TLS, and this side is not set up for it"))
            .remedied_by(Some(Remedy::SetUpTls))
    }

    /// Adds to what was seen.
    #[must_use]
    pub(crate) fn noting(mut self, note: impl fmt::Display) -> Self {
        self.detail = format!("{} ({note})", self.detail).into();
        self
    }

    /// `doing` names the operation that failed: "receiving a packet header".
    pub(crate) fn io(phase: Phase, doing: impl fmt::Display, error: std::io::Error) -> Self {
        let kind = match error.kind() {
            std::io::ErrorKind::TimedOut => ErrorKind::Deadline,
            _ => ErrorKind::Transport,
        };
        Self::new(kind, phase, format!("{doing}")).because(error)
    }

    /// The same for a file.
    pub(crate) fn storage(phase: Phase, doing: impl fmt::Display, error: std::io::Error) -> Self {
        Self::new(ErrorKind::Storage, phase, format!("{doing}")).because(error)
    }

    pub(crate) fn transport(phase: Phase, error: TransportError) -> Self {
        match error.endpoint() {
            Endpoint::File { .. } => Self::new(ErrorKind::Storage, phase, "no file").because(error),
            _ => Self::new(ErrorKind::Transport, phase, "no connection").because(error),
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.phase)?;
        // A cancel, say, that came too late: the operator must not take it for one that came in
        // time.
        if self.handed_over && !matches!(self.phase, Phase::Commit | Phase::Postcopy) {
            f.write_str(", after the hand-over")?;
        }
        f.write_str(if self.channel.is_some() { ", " } else { ": " })?;
        self.write_reason(f)
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.source.as_deref().map(|source| source as &(dyn StdError + 'static))
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Accept => "accept",
            Self::Active => "active",
            Self::Commit => "commit",
            Self::Connect => "connect",
            Self::Device => "device",
            Self::Postcopy => "post-copy",
            Self::Setup => "setup",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_alone_says_its_causes_once() {
        let inner = Error::storage(Phase::Setup, "making ram.img", std::io::ErrorKind::StorageFull.into());
        let error = Error::new(ErrorKind::GuestMemory, Phase::Setup, "no memory").on("main").because(inner);
        let text = "setup, main: no memory: setup: making ram.img: no storage space";
        assert_eq!((error.to_string(), error.chain()), (text.to_owned(), text.to_owned()));
    }

    #[test]
    fn only_a_hand_over_keeps_the_source_from_running_on() {
        let error = || Error::new(ErrorKind::Deadline, Phase::Commit, "no answer");
        assert!(error().source_may_resume(), "the phase says where, and no more");
        let error = error().after_hand_over();
        assert!(!error.source_may_resume());
        assert_eq!((error.phase(), error.to_string().as_str()), (Phase::Commit, "commit: no answer"));
        let cancelled = Error::stopped(Phase::Active).after_hand_over();
        assert_eq!(cancelled.to_string(), "active, after the hand-over: stopped");
    }
}
