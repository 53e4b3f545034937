//! Sections whose length only their owner knows. Spec: docs/wire.md §16.3.

use std::collections::HashMap;

use multifd_wire::{Footer, SectionHead, SectionId};

use super::file::FileReader;
use super::invalid;
use crate::error::{Error, Phase, Result};
use crate::stream::sections::{Found, find_footer, goes_on};

const WHAT: &str = "a device section";

/// Bytes looked at in one go.
const WINDOW: usize = 64 << 10;

/// Reads a payload up to its footer and passes over both. With a length that the description gives
/// the footer is where that says; without one, or if it is not, it is the first of this section
/// that something plausible comes after.
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
        let mut left = len;
        while left > 0 {
            let piece = usize::try_from(left).map_or(WINDOW, |left| left.min(WINDOW));
            keep(reader.take(Phase::Device, WHAT, piece)?)?;
            left -= piece as u64;
        }
        return reader.take(Phase::Device, "a section footer", Footer::LEN).map(drop);
    }
    let start = reader.position();
    loop {
        let position = reader.position();
        let bytes = reader.peek(Phase::Device, WHAT, WINDOW)?;
        let at_end = bytes.len() < WINDOW;
        let end = position + bytes.len() as u64;
        let found = find_footer(bytes, head.id, |next| plausible(next, known, at_end));
        let (taken, footer) = match found {
            Found::Whole(len) => (len - Footer::LEN, Footer::LEN),
            Found::Unsure(len) => (len, 0),
        };
        let payload = bytes.get(..taken);
        keep(payload.ok_or_else(|| Error::bug(Phase::Device, "a footer before its section"))?)?;
        reader.consume(taken + footer);
        match found {
            Found::Whole(_) => return Ok(()),
            Found::Unsure(_) if at_end => {
                let detail = format!(
                    "the file ends at byte {end}, section {} of {} that begins at byte {start} has no footer",
                    head.id, head.idstr
                );
                return Err(invalid(Phase::Device, detail));
            }
            Found::Unsure(_) => {}
        }
    }
}

/// The sections that later pieces may belong to, and those that have been.
pub(super) struct Known<'k> {
    pub(super) ram: Option<SectionId>,
    pub(super) places: &'k HashMap<SectionId, Option<usize>>,
}

fn footer_is_at(reader: &FileReader<'_>, len: u64, id: SectionId) -> Result<bool> {
    let mut footer = [0; Footer::LEN];
    let Some(position) = reader.position().checked_add(len) else { return Ok(false) };
    let count = reader.source().read_at(&mut footer, position)?;
    Ok(count == footer.len() && footer == Footer(id).to_bytes())
}

/// Can a stream go on like this after a section? If the file ends there, or within the end of the
/// items, this section is whole.
fn plausible(next: &[u8], known: &Known<'_>, at_end: bool) -> Option<bool> {
    let seen = |id| known.places.contains_key(&id);
    goes_on(next, known.ram, seen).or_else(|| at_end.then_some(matches!(next, [] | [0])))
}
