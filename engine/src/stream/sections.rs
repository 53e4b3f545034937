//! Sections whose length only their owner knows, and what can follow them. Spec: docs/wire.md
//! §16.3, §16.4.

use multifd_wire::{Footer, Item, ItemType, SectionId};

/// Device sections that came before the end of RAM, type bytes and footers included: devices that
/// must be there before the pages are (virtio-mem), or whose state may go ahead. They stay where
/// the source had them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EarlySections {
    /// Those before the RAM section.
    pub before_ram: Vec<u8>,
    /// Those between the pieces of the RAM section.
    pub within_ram: Vec<u8>,
}

impl EarlySections {
    /// No device was early.
    pub fn is_empty(&self) -> bool {
        self.before_ram.is_empty() && self.within_ram.is_empty()
    }

    /// All of them, in the order of the stream.
    pub(crate) fn concat(&self) -> Vec<u8> {
        [&self.before_ram[..], &self.within_ram].concat()
    }
}

/// Can a stream go on like this behind a section's footer? `None`: there are too few bytes to say.
///
/// `ram`: the RAM section, if it has begun. `seen`: the numbers of all other sections so far.
pub(crate) fn goes_on(next: &[u8], ram: Option<SectionId>, seen: impl Fn(SectionId) -> bool) -> Option<bool> {
    let (item, used) = match Item::parse(next) {
        Ok(Some(parsed)) => parsed,
        Ok(None) => return None,
        Err(_) => return Some(false),
    };
    match item {
        Item::Command(_) => Some(true),
        Item::Eof => description_begins(next.get(used..).unwrap_or_default()),
        Item::SectionEnd(id) | Item::SectionPart(id) => Some(ram == Some(id) || seen(id)),
        Item::SectionFull(head) | Item::SectionStart(head) => {
            let new = ram != Some(head.id) && !seen(head.id);
            Some(new && head.idstr.bytes().all(|byte| byte == b' ' || byte.is_ascii_graphic()))
        }
    }
}

fn description_begins(bytes: &[u8]) -> Option<bool> {
    const VM_DESCRIPTION: u8 = ItemType::VmDescription.byte();
    match bytes {
        [VM_DESCRIPTION, _, _, _, _, brace, ..] => Some(*brace == b'{'),
        [] | [VM_DESCRIPTION, ..] => None,
        _ => Some(false),
    }
}

/// How far a section without a length is known to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Found {
    /// It ends after so many bytes, footer included.
    Whole(usize),
    /// So many bytes are its payload; more must come to say what the others are.
    Unsure(usize),
}

/// Looks for the end of section `id` in the next bytes of its payload: the first footer of it that
/// can be one.
///
/// `follows`: can a stream go on like this behind it? `None`: there are too few bytes to say. See
/// [`goes_on`].
pub(crate) fn find_footer(bytes: &[u8], id: SectionId, follows: impl Fn(&[u8]) -> Option<bool>) -> Found {
    let footer = Footer(id).to_bytes();
    let ends = bytes.windows(footer.len()).enumerate().filter(|(_, window)| *window == footer);
    for (at, _) in ends {
        let next = bytes.get(at + footer.len()..).unwrap_or_default();
        match follows(next) {
            Some(true) => return Found::Whole(at + footer.len()),
            Some(false) => {}
            None => return Found::Unsure(at),
        }
    }
    Found::Unsure(bytes.len().saturating_sub(footer.len() - 1))
}
