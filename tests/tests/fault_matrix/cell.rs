//! A cell of the matrix: what breaks, where, and at which end.

use std::fmt;

/// What happens.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) enum Kind {
    /// Both directions of a connection end.
    Cut,
    /// The same by RST, which throws away what is on its way.
    Reset,
    /// One direction ends.
    HalfClose,
    /// Nothing comes any more, and the connections stay.
    Stall,
    /// Nothing comes for a while.
    StallAndGoOn,
    /// A bit of the message's first byte is another.
    Corrupt,
    /// The message comes twice.
    Duplicate,
    /// The message comes after all that the other connections have to bring.
    Reorder,
    /// The end is killed.
    Kill,
    /// The end is stopped, and goes on when the other end has given up.
    Stop,
    /// A user's Ctrl-C at the end.
    Cancel,
    /// The file system of the end is full.
    DiskFull,
    /// The end may open no more files.
    NoDescriptors,
}

impl Kind {
    pub(crate) const ALL: [Self; 13] = [
        Self::Cut,
        Self::Reset,
        Self::HalfClose,
        Self::Stall,
        Self::StallAndGoOn,
        Self::Corrupt,
        Self::Duplicate,
        Self::Reorder,
        Self::Kill,
        Self::Stop,
        Self::Cancel,
        Self::DiskFull,
        Self::NoDescriptors,
    ];

    /// Both ends must bear it.
    pub(crate) fn is_harmless(self) -> bool {
        matches!(self, Self::StallAndGoOn | Self::Reorder)
    }

    /// It is done to a process.
    pub(crate) fn is_of_a_process(self) -> bool {
        matches!(self, Self::Kill | Self::Stop | Self::Cancel)
    }

    /// It is there from the start.
    pub(crate) fn is_of_the_machine(self) -> bool {
        matches!(self, Self::DiskFull | Self::NoDescriptors)
    }

    /// It can change what arrives: a plain stream has no checksums.
    pub(crate) fn alters(self) -> bool {
        matches!(self, Self::Corrupt | Self::Duplicate)
    }
}

#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) enum End {
    Source,
    Destination,
}

/// Before which message, or how scarce the end's resources are.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Place {
    /// Whose message.
    pub(crate) end: End,
    /// 0: main.
    pub(crate) lane: u8,
    /// Its number on the lane. For a disk that is full: pages that it holds; for descriptors: how
    /// many there are.
    pub(crate) message: usize,
}

/// How the guest travels.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) enum Link {
    Single,
    Channels,
    Zstd,
    Tls,
    Exec,
    /// From a file.
    File,
    /// A guest of QEMU comes in.
    FromQemu,
    /// A guest goes out to QEMU.
    ToQemu,
}

impl Link {
    pub(crate) fn channels(self) -> Option<u8> {
        match self {
            Self::Channels | Self::Zstd | Self::Tls => Some(2),
            Self::Single | Self::Exec | Self::File | Self::FromQemu | Self::ToQemu => None,
        }
    }

    pub(crate) fn is_encrypted(self) -> bool {
        self == Self::Tls
    }

    /// Whether the destination answers.
    pub(crate) fn is_confirmed(self) -> bool {
        !matches!(self, Self::Exec | Self::File)
    }

    /// Whether the end is a QEMU.
    pub(crate) fn is_qemu(self, end: End) -> bool {
        matches!((self, end), (Self::FromQemu, End::Source) | (Self::ToQemu, End::Destination))
    }

    /// Whether there is a QEMU.
    pub(crate) fn has_qemu(self) -> bool {
        matches!(self, Self::FromQemu | Self::ToQemu)
    }

    /// Whether the kind can happen to the end.
    pub(crate) fn has(self, kind: Kind, hurt: End) -> bool {
        let of_file = matches!(kind, Kind::Cut | Kind::Corrupt | Kind::Duplicate);
        match (self, hurt) {
            (Self::File, End::Source) => of_file,
            (Self::File, End::Destination) => kind.is_of_the_machine(),
            // A source of a live guest has no disk.
            (_, End::Source) if kind == Kind::DiskFull => false,
            // A QEMU waits without a limit for a source that never comes.
            (Self::ToQemu, End::Source) if kind == Kind::NoDescriptors => false,
            // What QEMU does without descriptors is no matter of ours.
            (link, end) if link.is_qemu(end) => !kind.is_of_the_machine() && kind != Kind::Cancel,
            // QEMU waits without a limit for an end that was stopped.
            (link, _) if link.has_qemu() && kind == Kind::Stop => false,
            // A QEMU that does not hear that its guest has arrived runs it on
            // (docs/reliability.md).
            (Self::FromQemu, End::Destination) => kind.is_of_the_machine() || kind == Kind::StallAndGoOn,
            // Its answers go nowhere.
            (Self::Exec, End::Destination) => kind.is_of_the_machine() || kind.is_of_a_process(),
            _ => true,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Cell {
    pub(crate) link: Link,
    pub(crate) kind: Kind,
    /// Whose connections, process or machine.
    pub(crate) hurt: End,
    pub(crate) place: Place,
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Place { end, lane, message } = self.place;
        let Self { link, kind, hurt, .. } = self;
        match kind.is_of_the_machine() {
            true => write!(f, "{link:?}: {kind:?} at the {hurt:?}, room for {message}"),
            false => {
                write!(
                    f,
                    "{link:?}: {kind:?} at the {hurt:?}, before message {message} of the {end:?} on lane {lane}"
                )
            }
        }
    }
}

/// What became of the guest.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) enum Fate {
    /// The source runs it on.
    Source,
    /// The destination has it, and the source knows.
    Destination,
    /// The destination has it; the source says that it must not run on.
    DestinationUnknown,
    /// The source sent all of it and must not run on, and the destination has not got it: the
    /// operator decides.
    Undecided,
    /// The source was killed, and its guest with it.
    Killed,
}
