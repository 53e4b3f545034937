use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use crate::{Invalid, Parsed};

/// Why a parser left early. `NeedMore` travels by `?` like an error and becomes `Ok(None)` in
/// [`prefix`].
pub(crate) enum Stop {
    NeedMore,
    Invalid(Invalid),
}

impl From<Invalid> for Stop {
    fn from(invalid: Invalid) -> Self {
        Self::Invalid(invalid)
    }
}

/// Parses a value from the front of `buf`.
pub(crate) fn prefix<'a, T>(
    buf: &'a [u8],
    body: impl FnOnce(&mut Reader<'a>) -> Result<T, Stop>,
) -> Parsed<T> {
    let mut reader = Reader { rest: buf };
    match body(&mut reader) {
        Ok(value) => Ok(Some((value, buf.len() - reader.rest.len()))),
        Err(Stop::NeedMore) => Ok(None),
        Err(Stop::Invalid(invalid)) => Err(invalid),
    }
}

/// Parses a value that must fill `buf` exactly: the body of a message whose length is already
/// known.
pub(crate) fn whole<'a, T>(
    what: &'static str,
    buf: &'a [u8],
    body: impl FnOnce(&mut Reader<'a>) -> Result<T, Stop>,
) -> Result<T, Invalid> {
    match prefix(buf, body)? {
        Some((value, used)) if used == buf.len() => Ok(value),
        Some((_, used)) => Err(Invalid::new(what, format_args!("{} bytes", buf.len()), used)),
        None => Err(Invalid::new(what, format_args!("{} bytes", buf.len()), "more")),
    }
}

/// The bytes of a buffer that are not parsed yet. Each read takes from the front or stops with
/// `NeedMore`.
pub(crate) struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    pub(crate) fn take(&mut self, len: usize) -> Result<&'a [u8], Stop> {
        let (head, rest) = self.rest.split_at_checked(len).ok_or(Stop::NeedMore)?;
        self.rest = rest;
        Ok(head)
    }

    pub(crate) fn array<const N: usize>(&mut self) -> Result<[u8; N], Stop> {
        let (head, rest) = self.rest.split_first_chunk().ok_or(Stop::NeedMore)?;
        self.rest = rest;
        Ok(*head)
    }

    /// A header of fixed layout.
    pub(crate) fn raw<T>(&mut self) -> Result<&'a T, Stop>
    where
        T: FromBytes + Immutable + KnownLayout + Unaligned,
    {
        let (head, rest) = T::ref_from_prefix(self.rest).map_err(|_| Stop::NeedMore)?;
        self.rest = rest;
        Ok(head)
    }

    pub(crate) fn u8(&mut self) -> Result<u8, Stop> {
        self.array().map(u8::from_be_bytes)
    }

    pub(crate) fn be16(&mut self) -> Result<u16, Stop> {
        self.array().map(u16::from_be_bytes)
    }

    pub(crate) fn be32(&mut self) -> Result<u32, Stop> {
        self.array().map(u32::from_be_bytes)
    }

    pub(crate) fn be64(&mut self) -> Result<u64, Stop> {
        self.array().map(u64::from_be_bytes)
    }

    /// A counted string: one length byte, then as many bytes.
    pub(crate) fn cstr8(&mut self) -> Result<&'a [u8], Stop> {
        let len = self.u8()?;
        self.take(usize::from(len))
    }

    /// What is left, without taking it.
    pub(crate) fn rest(&self) -> &'a [u8] {
        self.rest
    }
}
