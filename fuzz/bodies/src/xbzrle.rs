//! Differences between pages.

use multifd_codecs::xbzrle::{Outcome, decode, encode};

use crate::Input;

const PAGE: usize = 4096;
const GUARD: [u8; 64] = [0xa5; 64];

/// A delta on a page, and the delta of two pages.
///
/// Input: how; then, in an even way, the delta. In an odd one a counted half and the rest: the two
/// pages, filled up with what the other has.
pub fn xbzrle(input: &[u8]) {
    let mut input = Input(input);
    if input.u8().is_multiple_of(2) {
        let old: Vec<u8> = (0..=255).cycle().take(PAGE).collect();
        let _ = apply(input.0, &old);
        return;
    }
    let (first, second) = (input.counted(), input.0);
    let page = |bytes: &[u8]| [bytes, &[7; PAGE]].concat().into_iter().take(PAGE).collect::<Vec<u8>>();
    let (old, new) = (page(first), page(second));
    let mut delta = vec![0; PAGE];
    match encode(&old, &new, &mut delta) {
        Outcome::Delta(len) => {
            let delta = delta.get(..len).expect("a delta is no longer than its buffer");
            assert!(apply(delta, &old).is_some_and(|page| page == new), "another page than was encoded");
        }
        Outcome::Unchanged => assert!(old == new),
        Outcome::Overflow => assert!(old != new),
    }
}

/// The page that comes of a delta.
fn apply(delta: &[u8], old: &[u8]) -> Option<Vec<u8>> {
    let mut buffer = [old, &GUARD].concat();
    let (page, guard) = buffer.split_at_mut(old.len());
    let applied = decode(delta, page);
    assert_eq!(guard, GUARD, "written beyond the page");
    applied.ok()?;
    buffer.truncate(old.len());
    Some(buffer)
}
