//! Device sections by the descriptions of `multifd-vmstate`.

use multifd_vmstate::Section;
use multifd_vmstate::examine::{GuestRam, examine};

use crate::Input;

/// A section of any name, version and payload; what is read is the same bytes when it is saved.
///
/// Input: length of the name, the name, the version, the payload.
pub fn vmstate(input: &[u8]) {
    let mut input = Input(input);
    let len = usize::from(input.u8());
    let Ok(name) = str::from_utf8(input.bytes(len)) else { return };
    let version = input.u8().into();
    let payload = input.0;
    let section = Section { name, instance: 0, version, payload };
    if let Some(Ok(examined)) = examine(section, &OddRam)
        && examined.description.version == Some(version)
    {
        assert_eq!(examined.description.payload_len(), Some(payload.len() as u64), "{name}");
    }
}

/// Half of all addresses are RAM.
struct OddRam;

impl GuestRam for OddRam {
    fn holds(&self, address: u64, _len: u64) -> Option<bool> {
        Some(address >> 12 & 1 == 0)
    }

    fn read_u16(&self, address: u64) -> Option<u16> {
        Some((address >> 4 & 0xffff) as u16)
    }
}
