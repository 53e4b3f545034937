//! The RAM section, as far as the machine decides about it: its pieces and its sync points. Spec:
//! docs/wire.md §9.

use multifd_wire::SectionId;

use super::{Effect, Effects};
use crate::error::{Error, Phase, Result};

/// Which piece of the section is being read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Piece {
    Start,
    Part,
    End,
}

/// Where the sync points of the parallel channels are on main. Not negotiated: START shows it,
/// which always has one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum SyncRule {
    /// START is not over.
    Unknown,
    /// A FLUSH record at each (machine types from 8.1 on).
    AtFlush,
    /// Every end of a section (machine types up to 8.0). Also right for a stream without channels:
    /// nothing is waited for.
    AtSectionEnd,
    /// Nowhere: no page comes on a channel after the switch to post-copy.
    Never,
}

/// The RAM section, from its START on.
#[derive(Debug)]
pub(super) struct Ram {
    pub(super) id: SectionId,
    /// Pages lie elsewhere, and there is no parallel channel to wait for.
    pub(super) mapped: bool,
    rule: SyncRule,
    /// END was begun.
    ended: bool,
    /// The last sync point was in END.
    ended_in_sync: bool,
    /// A sync point was passed since this was last asked.
    synced: bool,
}

impl Ram {
    pub(super) fn new(id: SectionId, mapped: bool) -> Self {
        Self { id, mapped, rule: SyncRule::Unknown, ended: false, ended_in_sync: false, synced: false }
    }

    /// The section behind the switch to post-copy: its END is to come again.
    pub(super) fn behind_switch(id: SectionId) -> Self {
        Self { rule: SyncRule::Never, ..Self::new(id, false) }
    }

    /// A further piece of section `id` begins.
    pub(super) fn go_on(ram: Option<Self>, id: SectionId) -> Result<Self> {
        match ram {
            Some(ram) if ram.id == id && ram.ended => {
                Err(Error::misbehaved(Phase::Active, "more of ram after its END"))
            }
            Some(ram) if ram.id == id => Ok(ram),
            Some(ram) => {
                let detail = format!("section id {id}, the only live section is ram ({})", ram.id);
                Err(Error::misbehaved(Phase::Active, detail))
            }
            None => Err(Error::misbehaved(Phase::Setup, format!("section id {id} was never started"))),
        }
    }

    /// True once the records of END were read.
    pub(super) fn ended(&self) -> bool {
        self.ended
    }

    /// True once END was read, and a sync point in it.
    pub(super) fn ended_in_sync(&self) -> bool {
        self.ended_in_sync
    }

    /// True if a sync point was passed since the last call.
    pub(super) fn take_sync(&mut self) -> bool {
        std::mem::take(&mut self.synced)
    }

    pub(super) fn on_flush(&mut self, piece: Piece, effects: &mut Effects) -> Result<()> {
        if self.mapped {
            return Err(Error::bug(Phase::Active, "a FLUSH among pages at fixed places"));
        }
        match self.rule {
            SyncRule::Unknown => self.rule = SyncRule::AtFlush,
            // Per-round sources say so in START; a stray FLUSH of a stream without channels (QEMU
            // 8.1.0) means nothing.
            SyncRule::AtSectionEnd | SyncRule::Never => return Ok(()),
            SyncRule::AtFlush => effects.push(Effect::CountRound),
        }
        self.sync(piece, effects);
        Ok(())
    }

    pub(super) fn on_end_of_records(&mut self, piece: Piece, effects: &mut Effects) {
        self.ended |= piece == Piece::End;
        if self.mapped {
            return;
        }
        if piece == Piece::Start && self.rule == SyncRule::Unknown {
            self.rule = SyncRule::AtSectionEnd;
        }
        if self.rule == SyncRule::AtSectionEnd {
            self.sync(piece, effects);
        }
    }

    fn sync(&mut self, piece: Piece, effects: &mut Effects) {
        self.ended_in_sync = piece == Piece::End;
        self.synced = true;
        effects.push(Effect::SyncPoint);
    }
}
