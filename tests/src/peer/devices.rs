//! Device sections that mean nothing, and that try to look like the end of the stream.

use multifd_wire::{Footer, Item, SectionHead, SectionId};
use serde_json::json;

/// Name, number and content of each section.
const SECTIONS: [(&str, u32, &[u8]); 3] = [
    ("timer", 0, &[0; 17]),
    // The start of an end, and footers of others.
    ("cpu", 4, &[0, 6, 0, 0, 0, 40, b'{', 0x7e, 0, 0, 0, 4, 4, 0x7e, 0, 0, 0, 1]),
    ("globalstate", 41, b"\0\0\0\x08running\0"),
];

/// FULL sections, one after the other.
pub fn sections() -> Vec<u8> {
    let mut bytes = Vec::new();
    for (name, id, content) in SECTIONS {
        let id = SectionId(id);
        let head = SectionHead { id, idstr: name.to_owned(), instance_id: 0, version_id: 2 };
        Item::SectionFull(head).encode(&mut bytes);
        bytes.extend(content);
        Footer(id).encode(&mut bytes);
    }
    bytes
}

/// A FULL section of some `len` bytes, to come before the others.
pub fn padding(len: usize) -> Vec<u8> {
    let id = SectionId(2);
    let mut bytes = Vec::with_capacity(len + 64);
    let head = SectionHead { id, idstr: "padding".to_owned(), instance_id: 0, version_id: 1 };
    Item::SectionFull(head).encode(&mut bytes);
    bytes.resize(bytes.len() + len, 0x55);
    Footer(id).encode(&mut bytes);
    bytes
}

/// The sections and the end of the stream.
pub fn tail() -> Vec<u8> {
    [sections(), vec![0], description()].concat()
}

/// The vmdescription: type byte, length, JSON.
pub fn description() -> Vec<u8> {
    let device = |(name, _, content): &(&str, u32, &[u8])| {
        let field = json!({"name": "data", "size": content.len(), "type": "buffer"});
        json!({"name": name, "instance_id": 0, "size": content.len(), "fields": [field]})
    };
    let devices: Vec<_> = SECTIONS.iter().map(device).collect();
    let text = json!({"page_size": 4096, "devices": devices}).to_string();
    let mut bytes = vec![6];
    bytes.extend(u32::try_from(text.len()).unwrap_or(u32::MAX).to_be_bytes());
    bytes.extend(text.bytes());
    bytes
}
