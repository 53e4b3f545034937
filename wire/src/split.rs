use std::ops::Range;

use crate::reader::{Reader, Stop, prefix};
use crate::{DeviceDescription, Footer, Invalid, ItemType, SectionHead, VmDescription};

/// One device section of a tail.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceSection {
    /// Whose section it is.
    pub head: SectionHead,
    /// Range of the payload in the tail.
    pub payload: Range<usize>,
}

/// Most sections of a tail: as many devices as the widest PCI topology has functions.
const MAX_SECTIONS: usize = 1 << 16;

/// Splits the device sections of a tail, the bytes before the 0x00 that ends the items. Spec:
/// docs/wire.md §16.3.
///
/// With a description the sections have the lengths it gives, and every footer must be where they
/// say. Without one, or if some footer is not, a section ends at the first footer of its own that
/// is followed by the next section or the end. That can go wrong only where a payload has the bytes
/// of a footer and of a section head in it.
///
/// # Errors
/// Bytes that do not begin a section, a section without a footer, or more than 65536 sections.
pub fn split_tail(tail: &[u8], description: Option<&VmDescription>) -> Result<Vec<DeviceSection>, Invalid> {
    match description.and_then(|description| split_by_description(tail, &description.devices)) {
        Some(sections) => Ok(sections),
        None => split_by_footers(tail),
    }
}

/// `None` at the first thing that does not fit.
fn split_by_description(tail: &[u8], devices: &[DeviceDescription]) -> Option<Vec<DeviceSection>> {
    let mut sections = Vec::new();
    let mut devices = devices.iter();
    let mut at = 0;
    while at < tail.len() {
        let (head, head_len) = parse_head(tail.get(at..)?).ok()??;
        // Devices that are saved early are described, too, but come before the tail.
        let same = |d: &&DeviceDescription| d.name == head.idstr && d.instance_id == head.instance_id;
        let len = usize::try_from(devices.find(same)?.payload_len()?).ok()?;
        let start = at + head_len;
        let payload = start..start.checked_add(len)?;
        if !tail.get(payload.end..)?.starts_with(&Footer(head.id).to_bytes()) {
            return None;
        }
        at = payload.end + Footer::LEN;
        sections.push(DeviceSection { head, payload });
    }
    Some(sections)
}

fn split_by_footers(tail: &[u8]) -> Result<Vec<DeviceSection>, Invalid> {
    let mut sections = Vec::new();
    let mut at = 0;
    while at < tail.len() {
        if sections.len() == MAX_SECTIONS {
            return Err(Invalid::new(
                "device sections",
                MAX_SECTIONS + 1,
                format_args!("at most {MAX_SECTIONS}"),
            ));
        }
        let here = tail.get(at..).unwrap_or_default();
        let Some((head, head_len)) = parse_head(here)? else {
            return Err(Invalid::new(
                "head of a device section",
                format_args!("{} bytes", here.len()),
                "more",
            ));
        };
        let body = here.get(head_len..).unwrap_or_default();
        let Some(len) = find_footer(body, &head) else {
            let seen = format!("none for {} (section {})", head.idstr, head.id);
            return Err(Invalid::new("section footer", seen, "one"));
        };
        let start = at + head_len;
        at = start + len + Footer::LEN;
        sections.push(DeviceSection { head, payload: start..start + len });
    }
    Ok(sections)
}

/// Where the footer of `head` begins in what follows it: the first that the end or a plausible head
/// comes after. Numbers need not rise from section to section: PCI bridges come first, whenever
/// they were created.
fn find_footer(body: &[u8], head: &SectionHead) -> Option<usize> {
    let footer = Footer(head.id).to_bytes();
    let follows = |at: &usize| {
        let next = body.get(at + Footer::LEN..).unwrap_or_default();
        next.is_empty()
            || parse_head(next).is_ok_and(|next| {
                next.is_some_and(|(next, _)| next.id != head.id && next.idstr.bytes().all(is_printable))
            })
    };
    let matches = body.windows(Footer::LEN).enumerate().filter(|(_, window)| *window == footer);
    matches.map(|(at, _)| at).find(follows)
}

fn is_printable(byte: u8) -> bool {
    byte == b' ' || byte.is_ascii_graphic()
}

const SECTION_FULL: u8 = ItemType::SectionFull.byte();

/// Parses the head of a FULL section, with its type byte.
fn parse_head(buf: &[u8]) -> crate::Parsed<SectionHead> {
    prefix(buf, |r: &mut Reader<'_>| match r.u8()? {
        SECTION_FULL => SectionHead::read(r),
        seen => Err(Stop::Invalid(Invalid::new("device section", format_args!("{seen:#04x}"), "0x04"))),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Item, SectionId};

    /// A section whose payload has a footer of its own in it, but nothing plausible behind that.
    fn section(id: u32, name: &str) -> Vec<u8> {
        let head = SectionHead { id: SectionId(id), idstr: name.to_owned(), instance_id: 0, version_id: 1 };
        let mut out = Vec::new();
        Item::SectionFull(head).encode(&mut out);
        Footer(SectionId(id)).encode(&mut out);
        out.extend(b"payload");
        Footer(SectionId(id)).encode(&mut out);
        out
    }

    fn description(devices: &[(&str, u64)]) -> VmDescription {
        let device = |&(name, size): &(&str, u64)| DeviceDescription {
            name: name.to_owned(),
            instance_id: 0,
            vmsd_name: None,
            version: None,
            size: Some(size),
            fields: Vec::new(),
            subsections: Vec::new(),
        };
        let devices = devices.iter().map(device).collect();
        VmDescription { configuration: None, page_size: Some(4096), devices }
    }

    fn names_and_lens(tail: &[u8], description: Option<&VmDescription>) -> Vec<(String, usize)> {
        let sections = split_tail(tail, description).unwrap();
        sections.into_iter().map(|section| (section.head.idstr, section.payload.len())).collect()
    }

    #[test]
    fn by_description_by_footers_and_by_footers_where_the_description_is_wrong() {
        let tail = [section(9, "bridge"), section(1, "timer"), section(3, "cpu")].concat();
        let expected = ["bridge", "timer", "cpu"].map(|name| (name.to_owned(), 12));
        let right = description(&[("early", 99), ("bridge", 12), ("timer", 12), ("cpu", 12)]);
        let wrong_len = description(&[("bridge", 12), ("timer", 11), ("cpu", 12)]);
        let huge = description(&[("bridge", u64::MAX), ("timer", 12), ("cpu", 12)]);
        let missing = description(&[("bridge", 12), ("cpu", 12)]);
        assert!(split_by_description(&tail, &right.devices).is_some());
        for wrong in [&wrong_len, &huge, &missing] {
            assert!(split_by_description(&tail, &wrong.devices).is_none());
            assert_eq!(names_and_lens(&tail, Some(wrong)), expected);
        }
        assert_eq!(names_and_lens(&tail, Some(&right)), expected);
        assert_eq!(names_and_lens(&tail, None), expected);
        assert_eq!(split_tail(&[], None).unwrap(), []);
    }

    #[test]
    fn refuses_a_tail_that_ends_early() {
        let tail = section(1, "timer");
        for len in 1..tail.len() {
            let cut = split_tail(&tail[..len], None);
            // The footer in the payload is a good end, too.
            assert_eq!(cut.is_ok(), len == tail.len() - 12, "{len}");
        }
        assert!(split_tail(&[1, 2, 3], None).is_err());
    }
}
