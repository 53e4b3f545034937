use std::fmt;
use std::ops::Range;

use crate::{Footer, Invalid, ItemType, MAX_VMDESC, VmDescription};

/// Finds the end of the device sections, whose lengths only the devices know. Spec: docs/wire.md
/// §16.3.
///
/// The stream ends in `0x00 0x06 be32-length json`. The scanner takes bytes as they arrive, from
/// the first device section on, keeps them, and says when such an end is complete. Each byte is
/// looked at once:
///
/// * a zero byte may be the 0x00 of an end, if what follows looks like one: then it is a candidate;
/// * JSON has no zero byte, so the next zero byte in a candidate's text rules the candidate out.
///   Hence a byte gets to a JSON parser at most three times, as often as candidates fit into six
///   bytes.
#[derive(Debug)]
pub struct TailScanner {
    bytes: Vec<u8>,
    /// Most bytes that are kept.
    limit: usize,
    /// All before this has been looked at. `scanned <= bytes.len()`
    scanned: usize,
    /// Zero bytes that are not ruled out yet, ascending. They are within `LEAD` bytes of each
    /// other.
    candidates: Vec<usize>,
}

/// The tail's parts, as ranges of [`TailScanner::bytes`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TailEnd {
    /// Bytes of the device sections, which is all before the 0x00 that ends the items.
    pub devices_len: usize,
    /// The text of the description.
    pub vmdesc: Range<usize>,
    /// Bytes of the tail. Nothing follows in a stream: bytes after these show that the end is a
    /// false one.
    pub total: usize,
}

/// 0x00, 0x06 and the length.
const LEAD: usize = 6;
const VM_DESCRIPTION: u8 = ItemType::VmDescription.byte();

impl Default for TailScanner {
    fn default() -> Self {
        Self::new()
    }
}

impl TailScanner {
    /// A scanner that has seen nothing, of bytes that are in memory already.
    pub fn new() -> Self {
        Self::with_limit(usize::MAX)
    }

    /// One that keeps at most so many bytes, of a peer who may send any number.
    pub fn with_limit(limit: usize) -> Self {
        Self { bytes: Vec::new(), limit, scanned: 0, candidates: Vec::new() }
    }

    /// Takes the next bytes and tells the end of the tail, once it is there. Not to be called after
    /// that.
    ///
    /// # Errors
    /// More bytes than the limit, or than there is memory for, and no end.
    pub fn push(&mut self, bytes: &[u8]) -> Result<Option<TailEnd>, Invalid> {
        let len = self.bytes.len().saturating_add(bytes.len());
        let refused = |expected: fmt::Arguments<'_>| {
            Invalid::new("device state without an end", format_args!("{len} bytes"), expected)
        };
        if len > self.limit {
            return Err(refused(format_args!("at most {}", self.limit)));
        }
        self.bytes.try_reserve(bytes.len()).map_err(|_| refused(format_args!("what fits in memory")))?;
        self.bytes.extend_from_slice(bytes);
        while let Some(zero) = self.next_zero() {
            if let Some(end) = self.complete_candidate(zero) {
                return Ok(Some(end));
            }
            self.candidates.retain(|start| zero < start + LEAD);
            match looks_like_end(self.bytes.get(zero..).unwrap_or_default()) {
                Some(true) => self.candidates.push(zero),
                Some(false) => {}
                // Look again when there are more bytes.
                None => return Ok(None),
            }
            self.scanned = zero + 1;
        }
        self.scanned = self.bytes.len();
        Ok(self.complete_candidate(self.bytes.len()))
    }

    /// Do the bytes so far end like a stream without a description: a section footer, then 0x00?
    ///
    /// Only a hint while more can arrive; sure when the connection is at its end.
    pub fn ends_without_description(&self) -> bool {
        match self.bytes.last_chunk::<{ Footer::LEN + 1 }>() {
            Some([footer @ .., 0]) => matches!(Footer::parse(footer), Ok(Some(_))),
            _ => false,
        }
    }

    /// All bytes so far.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// All bytes so far.
    pub fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }

    fn next_zero(&self) -> Option<usize> {
        let at = self.bytes.get(self.scanned..)?.iter().position(|&byte| byte == 0)?;
        Some(self.scanned + at)
    }

    /// The candidate whose text ends before `limit` and is a description. Candidates that fail are
    /// dropped.
    fn complete_candidate(&mut self, limit: usize) -> Option<TailEnd> {
        let mut found = None;
        self.candidates.retain(|&start| {
            let text = start + LEAD..start + LEAD + text_len(self.bytes.get(start..).unwrap_or_default());
            if found.is_some() || text.end > limit {
                return true;
            }
            if is_description(self.bytes.get(text.clone()).unwrap_or_default()) {
                found = Some(TailEnd { devices_len: start, total: text.end, vmdesc: text });
            }
            false
        });
        found
    }
}

/// Do these bytes begin like the end of a stream? `None` if there are too few of them to say.
fn looks_like_end(bytes: &[u8]) -> Option<bool> {
    match bytes {
        [_, VM_DESCRIPTION, a, b, c, d, first, ..] => {
            let len = u32::from_be_bytes([*a, *b, *c, *d]);
            Some(*first == b'{' && (2..=MAX_VMDESC).contains(&len))
        }
        [_] => None,
        [_, VM_DESCRIPTION, ..] => None,
        _ => Some(false),
    }
}

fn text_len(candidate: &[u8]) -> usize {
    match candidate {
        [_, _, a, b, c, d, ..] => u32::from_be_bytes([*a, *b, *c, *d]) as usize,
        _ => 0,
    }
}

fn is_description(text: &[u8]) -> bool {
    VmDescription::parse(text).is_ok_and(|description| description.page_size.is_some())
}

#[cfg(test)]
mod tests {
    use super::*;

    const JSON: &[u8] = br#"{"page_size": 4096, "devices": []}"#;

    fn end(json: &[u8]) -> Vec<u8> {
        let len = u32::try_from(json.len()).unwrap().to_be_bytes();
        [&[0, VM_DESCRIPTION][..], &len, json].concat()
    }

    /// Pushes `tail` in pieces of `step` bytes; the end must show up with the last byte.
    fn scan(tail: &[u8], step: usize) -> Option<TailEnd> {
        let mut scanner = TailScanner::new();
        let mut found = None;
        for piece in tail.chunks(step) {
            assert_eq!(found, None, "found too early");
            found = scanner.push(piece).unwrap();
        }
        assert_eq!(scanner.bytes(), tail);
        found
    }

    fn check(devices: &[u8]) {
        let tail = [devices, &end(JSON)].concat();
        let devices_len = devices.len();
        let vmdesc = devices_len + LEAD..tail.len();
        let expected = TailEnd { devices_len, vmdesc, total: tail.len() };
        for step in [1, 2, 3, 5, 7, 64, tail.len()] {
            assert_eq!(scan(&tail, step), Some(expected.clone()), "{devices:?} by {step}");
        }
    }

    #[test]
    fn finds_the_end_in_any_pieces() {
        check(b"");
        check(b"device");
        check(&[0; 100]);
    }

    #[test]
    fn is_not_fooled_by_what_looks_like_an_end() {
        check(&end(b"{no json}"));
        check(&end(br#"{"other": "json"}"#));
        check(&end(br#"{"devices": []}"#));
        check(&[0, 6, 0, 0, 1, 0, b'{']);
        check(&[0, 6, 0, 6, 0, 6]);
        check(&[0, 6, 3, 255, 255, 255, b'{', b'"']);
    }

    #[test]
    fn length_of_a_false_end_may_overlap_the_true_one() {
        // The section number 6 before the end reads as an end whose length is 0x00060000, and whose
        // first byte is a `{` from the length of the true end.
        let json = [JSON, &vec![b' '; 0x7b00 - JSON.len()]].concat();
        let tail = [&[0x7e, 0, 0, 0, 6][..], &end(&json)].concat();
        assert_eq!(tail[3..10], [0, 6, 0, 6, 0, 0, 0x7b]);
        for step in [1, 1000, tail.len()] {
            assert_eq!(scan(&tail, step).unwrap().devices_len, 5);
        }
    }

    #[test]
    fn many_false_ends_cost_no_more_than_few() {
        // Each claims all of the rest as its text. Quadratic work would take minutes here.
        let liar = [0, 6, 3, 255, 255, 255, b'{'];
        let tail = [&liar.repeat(1 << 20)[..], &end(JSON)].concat();
        assert_eq!(scan(&tail, 4096).unwrap().total, tail.len());
        assert_eq!(scan(&tail, tail.len()).unwrap().total, tail.len());
    }

    #[test]
    fn end_without_description_is_a_footer_and_a_zero() {
        for (tail, without) in [
            (&[0x7e, 0, 0, 0, 9, 0][..], true),
            (&[1, 0x7e, 0, 0, 0, 9, 0], true),
            (&[0x7e, 0, 0, 0, 9], false),
            (&[0x7e, 0, 0, 0, 9, 1], false),
            (&[0x7d, 0, 0, 0, 9, 0], false),
            (&[], false),
        ] {
            let mut scanner = TailScanner::new();
            assert_eq!(scanner.push(tail).unwrap(), None);
            assert_eq!(scanner.ends_without_description(), without, "{tail:?}");
        }
    }

    #[test]
    fn refuses_more_than_the_limit_before_it_keeps_it() {
        let zeros = [0; 1001];
        let mut scanner = TailScanner::with_limit(1000);
        let error = scanner.push(&zeros).unwrap_err();
        assert_eq!(error.to_string(), "device state without an end: 1001 bytes, expected at most 1000");
        assert_eq!(scanner.push(&[1]).unwrap(), None);
        assert!(scanner.push(&zeros[..1000]).is_err());
        assert_eq!(scanner.bytes(), [1]);
        assert_eq!(scanner.push(&zeros[..999]).unwrap(), None);
    }
}
