//! The embedder's description of its VM, a section before RAM. Spec: docs/wire.md §27.5.
//!
//! The destination must know the VM before it can provide memory for it. The section has no length,
//! as all sections: its payload is written so that it never holds the byte with which a footer
//! begins.

use multifd_wire::{Footer, Item, SectionHead, SectionId};

use crate::error::{Error, ErrorKind, Phase, Result};

/// Name of the section.
const SECTION: &str = "multifd-vm";

/// Its number: far from those of a QEMU's devices, which a checkpoint may send beside it.
const ID: SectionId = SectionId(0x6d66_0001);

/// Version of the layout.
const VERSION: u32 = 1;

/// The footer's first byte, and the one that stands for it and for itself, each with the other bit
/// 5 behind it.
const FLAG: u8 = 0x7e;
const ESCAPE: u8 = 0x7d;
const OTHER: u8 = 0x20;

/// What a source's embedder says of its VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct VmState {
    pub(crate) name: String,
    pub(crate) version: u32,
    pub(crate) bytes: Vec<u8>,
}

impl VmState {
    /// The whole section, footer included.
    ///
    /// # Errors
    /// A name that is not 1..=255 bytes.
    pub(crate) fn encode(&self) -> Result<Vec<u8>, String> {
        let len = u8::try_from(self.name.len()).ok().filter(|len| *len > 0);
        let len = len.ok_or_else(|| {
            format!("the VM's state has a name of {} bytes, expected 1..=255", self.name.len())
        })?;
        let mut out = Vec::with_capacity(self.bytes.len() + 64);
        let head = SectionHead { id: ID, idstr: SECTION.to_owned(), instance_id: 0, version_id: VERSION };
        Item::SectionFull(head).encode(&mut out);
        let plain = [&[len], self.name.as_bytes(), &self.version.to_be_bytes()].concat();
        for byte in plain.iter().chain(&self.bytes) {
            match *byte {
                FLAG | ESCAPE => out.extend([ESCAPE, *byte ^ OTHER]),
                byte => out.push(byte),
            }
        }
        Footer(ID).encode(&mut out);
        Ok(out)
    }

    /// Reads the payload of a section with this head; `None` if it is another's.
    ///
    /// # Errors
    /// The section is the VM's, and no source writes it like this.
    pub(crate) fn parse(head: &SectionHead, payload: &[u8]) -> Result<Option<Self>> {
        if head.idstr != SECTION {
            return Ok(None);
        }
        if head.version_id != VERSION {
            let detail = format!("section {SECTION} of version {}, expected {VERSION}", head.version_id);
            return Err(Error::incompatible(Phase::Setup, detail));
        }
        let mut plain = Vec::with_capacity(payload.len());
        let mut bytes = payload.iter();
        while let Some(byte) = bytes.next() {
            plain.push(match (*byte, bytes.as_slice().first()) {
                (ESCAPE, Some(next)) if matches!(next ^ OTHER, FLAG | ESCAPE) => {
                    bytes.next();
                    next ^ OTHER
                }
                (ESCAPE, next) => return Err(invalid(format!("{next:02x?} behind an escape"))),
                (byte, _) => byte,
            });
        }
        let short = || invalid(format!("{} bytes", plain.len()));
        let (len, rest) = plain.split_first().ok_or_else(short)?;
        let (name, rest) = rest.split_at_checked(usize::from(*len)).ok_or_else(short)?;
        let (version, bytes) = rest.split_first_chunk().ok_or_else(short)?;
        let name = String::from_utf8(name.to_vec()).ok().filter(|name| !name.is_empty());
        let name = name.ok_or_else(|| invalid("a name that is no text".to_owned()))?;
        Ok(Some(Self { name, version: u32::from_be_bytes(*version), bytes: bytes.to_vec() }))
    }
}

fn invalid(seen: String) -> Error {
    Error::new(ErrorKind::InvalidStream, Phase::Setup, format!("section {SECTION}: {seen}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn payload(section: &[u8]) -> (SectionHead, &[u8]) {
        let (item, used) = Item::parse(section).unwrap().unwrap();
        let Item::SectionFull(head) = item else { panic!("{item:?}") };
        (head, &section[used..section.len() - Footer::LEN])
    }

    #[test]
    fn any_content_comes_back_and_none_of_it_looks_like_a_footer() {
        let all: Vec<u8> = (0..=255).cycle().take(1000).collect();
        let footers = [0x7e, 0x6d, 0x66, 0, 1].repeat(10);
        for bytes in [Vec::new(), all, footers, vec![ESCAPE; 7], vec![FLAG]] {
            let state = VmState { name: "my~vm}".to_owned(), version: 0x7e7d_0001, bytes };
            let section = state.encode().unwrap();
            let (head, payload) = payload(&section);
            assert!(!payload.contains(&FLAG));
            assert_eq!(VmState::parse(&head, payload).unwrap(), Some(state));
        }
    }

    #[test]
    fn it_has_these_bytes() {
        let state = VmState { name: "v".to_owned(), version: 2, bytes: vec![FLAG, 5, ESCAPE] };
        let expected = b"\x04\x6d\x66\0\x01\x0amultifd-vm\0\0\0\0\0\0\0\x01\x01v\0\0\0\x02\x7d\x5e\x05\x7d\x5d\x7e\x6d\x66\0\x01";
        assert_eq!(state.encode().unwrap(), expected);
    }

    #[test]
    fn a_section_that_no_source_writes_is_refused() {
        let head = SectionHead { id: ID, idstr: SECTION.to_owned(), instance_id: 0, version_id: 1 };
        for payload in
            [&b""[..], b"\x05ab", b"\x01a\0\0\0", b"\0\0\0\0\x01", b"\x01a\0\0\0\x7d", b"\x01a\0\0\0\x7d\x41"]
        {
            assert!(VmState::parse(&head, payload).is_err(), "{payload:?}");
        }
        let later = SectionHead { version_id: 2, ..head.clone() };
        assert_eq!(VmState::parse(&later, b"\x01a\0\0\0\x01").unwrap_err().kind(), ErrorKind::Incompatible);
        let other = SectionHead { idstr: "virtio-mem".to_owned(), ..head };
        assert_eq!(VmState::parse(&other, b"").unwrap(), None);
        let nameless = VmState { name: String::new(), version: 1, bytes: Vec::new() };
        assert!(nameless.encode().unwrap_err().contains("a name of 0 bytes"));
    }
}
