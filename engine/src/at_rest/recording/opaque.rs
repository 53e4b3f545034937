//! Sections whose length only their owner knows. Spec: docs/wire.md §16.3.

use multifd_wire::{Footer, MAX_TAIL, SectionHead, SectionId};

use super::devices::RecordedSection;
use super::file::FileReader;
use super::invalid;
use crate::error::{Phase, Result};
use crate::stream::sections::goes_on;

/// Longest head of an item: a discard command with a body of 450 bytes, so this is enough to judge one by.
const LOOK_AHEAD: usize = 512;

/// Bytes looked at in one go.
const WINDOW: usize = 64 << 10;

/// Reads a payload up to its footer and passes over both. With a length that the description gives the footer is where that
/// says; without one, or if it is not, it is the first of this section that something plausible comes after.
pub(super) fn payload(
    reader: &mut FileReader<'_>,
    head: &SectionHead,
    described: Option<u64>,
    known: &Known<'_>,
    mut keep: impl FnMut(&[u8]) -> Result<()>,
) -> Result<()> {
    if let Some(len) = described
        && footer_is_at(reader, len, head.id)?
    {
        let mut left = usize::try_from(len).unwrap_or(MAX_TAIL);
        while left > 0 {
            let piece = left.min(WINDOW);
            keep(reader.take(Phase::Device, "a device section", piece)?)?;
            left -= piece;
        }
        return reader.take(Phase::Device, "a section footer", Footer::LEN).map(drop);
    }
    let start = reader.position();
    let footer = Footer(head.id).to_bytes();
    loop {
        let position = reader.position();
        let bytes = reader.peek(WINDOW)?;
        let at_end = bytes.len() < WINDOW;
        // So far that what follows a footer can be judged.
        let judged = if at_end { bytes.len() } else { bytes.len() - Footer::LEN - LOOK_AHEAD };
        let is_footer = |at: &usize| {
            let here = bytes.get(*at..).unwrap_or_default();
            here.starts_with(&footer) && plausible(here.get(Footer::LEN..).unwrap_or_default(), known)
        };
        let found = (0..judged).find(is_footer);
        let taken = found.unwrap_or(judged);
        keep(bytes.get(..taken).unwrap_or_default())?;
        if found.is_none() && at_end {
            let detail = format!(
                "the file ends at byte {}, section {} of {} that begins at byte {start} has no footer",
                position + bytes.len() as u64,
                head.id,
                head.idstr
            );
            return Err(invalid(Phase::Device, detail));
        }
        reader.consume(taken);
        if found.is_some() {
            reader.consume(Footer::LEN);
            return Ok(());
        }
    }
}

/// The sections that later pieces may belong to, and those that have been.
pub(super) struct Known<'k> {
    pub(super) ram: Option<SectionId>,
    pub(super) sections: &'k [RecordedSection],
}

fn footer_is_at(reader: &FileReader<'_>, len: u64, id: SectionId) -> Result<bool> {
    let mut footer = [0; Footer::LEN];
    let Some(position) = reader.position().checked_add(len) else { return Ok(false) };
    let count = reader.file().read_at(&mut footer, position)?;
    Ok(count == footer.len() && footer == Footer(id).to_bytes())
}

/// Can a stream go on like this after a section?
fn plausible(next: &[u8], known: &Known<'_>) -> bool {
    let seen = |id| known.sections.iter().any(|section| section.head.id == id);
    // The file ends within what follows. If nothing does, or the end of the items, this section is whole.
    goes_on(next, known.ram, seen).unwrap_or(matches!(next, [] | [0]))
}
