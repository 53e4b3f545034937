use std::fmt;

use crate::names::checked;
use crate::reader::{Reader, Stop, prefix};
use crate::writer::put_cstr8;
use crate::{Command, Invalid, Parsed};

/// Head of one item of the main channel: a command, or the start of a section. Spec: docs/wire.md
/// §1.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Item {
    /// 0x08: a command, complete.
    Command(Command),
    /// 0x00: no more items.
    Eof,
    /// 0x03: last piece of a live section. The payload and a [`Footer`] follow.
    SectionEnd(SectionId),
    /// 0x04: a section in one piece, such as a device. The payload and a [`Footer`] follow.
    SectionFull(SectionHead),
    /// 0x02: a further piece of a live section. The payload and a [`Footer`] follow.
    SectionPart(SectionId),
    /// 0x01: first piece of a live section. The payload and a [`Footer`] follow.
    SectionStart(SectionHead),
}

/// Number by which the pieces of a section are known in one stream; chosen by the source. Spec:
/// docs/wire.md §3.1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SectionId(pub u32);

/// Who a section belongs to. Spec: docs/wire.md §3.1.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SectionHead {
    /// The number that later pieces and the footer carry.
    pub id: SectionId,
    /// Name of the section's owner, 1..=255 bytes: `ram`, `0000:00:03.0/virtio-net`.
    pub idstr: String,
    /// Tells owners of the same name apart, from 0.
    pub instance_id: u32,
    /// Version of the payload's layout.
    pub version_id: u32,
}

/// What closes every section: 0x7e and the section's number. Spec: docs/wire.md §1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Footer(pub SectionId);

/// First byte of each thing on the main channel behind the stream header: what it is. Spec:
/// docs/wire.md §1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum ItemType {
    /// No more items: [`Item::Eof`].
    Eof = 0x00,
    /// [`Item::SectionStart`].
    SectionStart = 0x01,
    /// [`Item::SectionPart`].
    SectionPart = 0x02,
    /// [`Item::SectionEnd`].
    SectionEnd = 0x03,
    /// [`Item::SectionFull`].
    SectionFull = 0x04,
    /// A [`Subsection`](crate::Subsection), within a device section or the configuration.
    Subsection = 0x05,
    /// A [`VmDescription`](crate::VmDescription), behind the end of the items: be32 length and JSON
    /// follow.
    VmDescription = 0x06,
    /// A [`Configuration`](crate::Configuration), before the items.
    Configuration = 0x07,
    /// [`Item::Command`].
    Command = 0x08,
    /// [`Footer`].
    Footer = 0x7e,
}

const EOF: u8 = ItemType::Eof.byte();
const SECTION_START: u8 = ItemType::SectionStart.byte();
const SECTION_PART: u8 = ItemType::SectionPart.byte();
const SECTION_END: u8 = ItemType::SectionEnd.byte();
const SECTION_FULL: u8 = ItemType::SectionFull.byte();
const SUBSECTION: u8 = ItemType::Subsection.byte();
const VM_DESCRIPTION: u8 = ItemType::VmDescription.byte();
const CONFIGURATION: u8 = ItemType::Configuration.byte();
const COMMAND: u8 = ItemType::Command.byte();
const FOOTER: u8 = ItemType::Footer.byte();

impl ItemType {
    /// The byte on the wire.
    pub const fn byte(self) -> u8 {
        self as u8
    }
}

impl Item {
    /// Parses the head of an item; a section's payload is not part of it.
    ///
    /// # Errors
    /// An unknown type byte, a malformed name, or a malformed command.
    pub fn parse(buf: &[u8]) -> Parsed<Self> {
        prefix(buf, |r| {
            Ok(match r.u8()? {
                EOF => Self::Eof,
                SECTION_START => Self::SectionStart(SectionHead::read(r)?),
                SECTION_PART => Self::SectionPart(SectionId(r.be32()?)),
                SECTION_END => Self::SectionEnd(SectionId(r.be32()?)),
                SECTION_FULL => Self::SectionFull(SectionHead::read(r)?),
                COMMAND => Self::Command(Command::read(r)?),
                seen => return Err(unknown_item(seen).into()),
            })
        })
    }

    /// Appends the head.
    pub fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Self::Command(command) => {
                out.push(COMMAND);
                command.write(out);
            }
            Self::Eof => out.push(EOF),
            Self::SectionEnd(id) => put_id(out, SECTION_END, *id),
            Self::SectionFull(head) => head.write(out, SECTION_FULL),
            Self::SectionPart(id) => put_id(out, SECTION_PART, *id),
            Self::SectionStart(head) => head.write(out, SECTION_START),
        }
    }
}

impl SectionHead {
    pub(crate) fn read(r: &mut Reader<'_>) -> Result<Self, Stop> {
        Ok(Self {
            id: SectionId(r.be32()?),
            idstr: checked("section name", r.cstr8()?)?.to_owned(),
            instance_id: r.be32()?,
            version_id: r.be32()?,
        })
    }

    fn write(&self, out: &mut Vec<u8>, item: u8) {
        put_id(out, item, self.id);
        put_cstr8(out, &self.idstr);
        out.extend(self.instance_id.to_be_bytes());
        out.extend(self.version_id.to_be_bytes());
    }
}

impl Footer {
    /// Bytes on the wire.
    pub const LEN: usize = 5;

    /// # Errors
    /// The type byte is not 0x7e. Whether the number is right is for the caller to say.
    pub fn parse(buf: &[u8]) -> Parsed<Self> {
        prefix(buf, |r| match r.u8()? {
            FOOTER => Ok(Self(SectionId(r.be32()?))),
            seen => Err(Invalid::new("section footer", format_args!("{seen:#04x}"), "0x7e").into()),
        })
    }

    /// The footer's bytes.
    pub const fn to_bytes(self) -> [u8; Self::LEN] {
        let [a, b, c, d] = self.0.0.to_be_bytes();
        [FOOTER, a, b, c, d]
    }

    /// Appends the footer.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.extend(self.to_bytes());
    }
}

impl fmt::Display for SectionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

fn put_id(out: &mut Vec<u8>, item: u8, id: SectionId) {
    out.push(item);
    out.extend(id.0.to_be_bytes());
}

fn unknown_item(seen: u8) -> Invalid {
    let name = match seen {
        SUBSECTION => " (subsection)",
        VM_DESCRIPTION => " (vm description)",
        CONFIGURATION => " (configuration)",
        FOOTER => " (section footer)",
        _ => "",
    };
    Invalid::new(
        "item type",
        format_args!("{seen:#04x}{name}"),
        "a section (1..=4), a command (8) or the end (0)",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_item_begins_with_the_byte_of_its_type() {
        let id = SectionId(9);
        let head = || SectionHead { id, idstr: "ram".to_owned(), instance_id: 0, version_id: 4 };
        for (item, kind, byte) in [
            (Item::Eof, ItemType::Eof, 0x00),
            (Item::SectionStart(head()), ItemType::SectionStart, 0x01),
            (Item::SectionPart(id), ItemType::SectionPart, 0x02),
            (Item::SectionEnd(id), ItemType::SectionEnd, 0x03),
            (Item::SectionFull(head()), ItemType::SectionFull, 0x04),
            (Item::Command(Command::SwitchoverStart), ItemType::Command, 0x08),
        ] {
            let mut bytes = Vec::new();
            item.encode(&mut bytes);
            assert_eq!((bytes[0], kind.byte()), (byte, byte), "{item:?}");
        }
        assert_eq!(Footer(id).to_bytes()[0], ItemType::Footer.byte());
    }
}
