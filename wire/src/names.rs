use std::borrow::Borrow;
use std::fmt;
use std::sync::Arc;

use crate::Invalid;

/// Name of a RAM block (idstr): 1 to 255 bytes of UTF-8 without NUL, such as `pc.ram`. A clone
/// costs no copy.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockName(Arc<str>);

impl BlockName {
    /// Longest name, in bytes: what a length byte can say, and what leaves room for the NUL in a
    /// packet header.
    pub const MAX_LEN: usize = 255;

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<&str> for BlockName {
    type Error = Invalid;

    fn try_from(name: &str) -> Result<Self, Invalid> {
        Self::try_from(name.as_bytes())
    }
}

impl TryFrom<&[u8]> for BlockName {
    type Error = Invalid;

    fn try_from(name: &[u8]) -> Result<Self, Invalid> {
        checked("block name", name).map(|name| Self(name.into()))
    }
}

impl AsRef<str> for BlockName {
    fn as_ref(&self) -> &str {
        self.as_str()
    }
}

/// Lets a map keyed by names be asked with a `&str`.
impl Borrow<str> for BlockName {
    fn borrow(&self) -> &str {
        self.as_str()
    }
}

impl fmt::Debug for BlockName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self.as_str(), f)
    }
}

impl fmt::Display for BlockName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Checks a name of any sort: 1 to 255 bytes of UTF-8 without NUL.
pub(crate) fn checked<'a>(what: &'static str, name: &'a [u8]) -> Result<&'a str, Invalid> {
    if name.is_empty() || name.len() > BlockName::MAX_LEN {
        return Err(Invalid::new(what, format_args!("{} bytes", name.len()), "1..=255 bytes"));
    }
    let wrong = |expected| Invalid::new(what, name.escape_ascii(), expected);
    if name.contains(&0) {
        return Err(wrong("no NUL byte"));
    }
    std::str::from_utf8(name).map_err(|_| wrong("valid UTF-8"))
}

/// Takes the name out of a NUL-terminated field, as packet headers have it.
pub(crate) fn from_field<'a>(what: &'static str, field: &'a [u8]) -> Result<&'a str, Invalid> {
    match field.iter().position(|&byte| byte == 0) {
        Some(end) => checked(what, field.get(..end).unwrap_or_default()),
        None => Err(Invalid::new(what, "no NUL byte", format_args!("one within {} bytes", field.len()))),
    }
}

/// Puts a name into a NUL-terminated, zeroed field of a packet header.
pub(crate) fn into_field(name: &str, field: &mut [u8]) {
    let room = field.len().saturating_sub(1);
    debug_assert!(name.len() <= room, "{} bytes in a name field of {room}", name.len());
    for (to, from) in field.iter_mut().take(room).zip(name.bytes()) {
        *to = from;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn length_limits() {
        assert!(BlockName::try_from("").is_err());
        assert!(BlockName::try_from("a").is_ok());
        assert!(BlockName::try_from("a".repeat(255).as_str()).is_ok());
        assert!(BlockName::try_from("a".repeat(256).as_str()).is_err());
    }

    #[test]
    fn refuses_nul_and_broken_utf8() {
        let nul = BlockName::try_from(&b"pc\0ram"[..]).unwrap_err();
        assert_eq!(nul.to_string(), "block name: pc\\x00ram, expected no NUL byte");
        assert!(BlockName::try_from(&[0xff][..]).is_err());
        assert_eq!(BlockName::try_from("/rom@ü").unwrap().to_string(), "/rom@ü");
    }

    #[test]
    fn field_needs_its_nul() {
        let mut field = [0; 256];
        into_field(&"n".repeat(255), &mut field);
        assert_eq!(from_field("block name", &field).unwrap().len(), 255);
        field[255] = b'n';
        assert!(from_field("block name", &field).is_err());
        assert!(from_field("block name", &[0; 4]).is_err());
    }
}
