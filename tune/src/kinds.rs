//! Kinds of pages.

use std::collections::HashSet;
use std::hash::{BuildHasher, RandomState};

use multifd_codecs::looks_random;

use crate::findings::PageKinds;
use crate::sample::Sample;

/// Shares of all pages by kind; a share of `data_share` of them is not zero.
pub(super) fn kinds(sample: &Sample, data_share: f64) -> PageKinds {
    let hasher = RandomState::new();
    let mut seen = HashSet::new();
    let mut counts = PageKinds::default();
    for page in sample.data_pages() {
        let kind = if !seen.insert(hasher.hash_one(page)) {
            &mut counts.duplicate
        } else if looks_random(page) {
            &mut counts.incompressible
        } else if is_text(page) {
            &mut counts.text
        } else {
            &mut counts.other
        };
        *kind += 1.0;
    }
    let all = counts.duplicate + counts.incompressible + counts.text + counts.other;
    let share = |count: f64| count / all.max(1.0) * data_share;
    PageKinds {
        zero: 1.0 - data_share,
        duplicate: share(counts.duplicate),
        incompressible: share(counts.incompressible),
        text: share(counts.text),
        other: share(counts.other),
    }
}

/// Whether 19 in 20 of the bytes that are not zero are printable or white space, and these bytes
/// are at least a quarter of the page. UTF-8 of other scripts is missed; a few names in a table do
/// not make a page text.
fn is_text(page: &[u8]) -> bool {
    let set = page.iter().filter(|byte| **byte != 0).count();
    let printable = page.iter().filter(|byte| matches!(byte, b'\t' | b'\n' | b'\r' | b' '..=b'~')).count();
    set * 4 >= page.len() && printable * 20 >= set * 19
}

#[cfg(test)]
mod tests {
    use super::super::memory::PAGE;
    use super::super::sample::Run;
    use super::*;

    #[test]
    fn each_page_is_of_one_kind() {
        let hashed = |at: usize| at.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_be_bytes()[0];
        let random: Vec<u8> = (0..PAGE).map(hashed).collect();
        let text = b"the quick brown fox\n".repeat(205)[..PAGE].to_vec();
        let mut table = vec![0; PAGE];
        table[..8].copy_from_slice(b"function");
        let pages = [random.clone(), text, table, random];
        let run = Run { batches: vec![pages.concat()] };
        let sample = Sample { runs: vec![run], pages: 8, share: 1.0, data_share: 0.5 };
        let kinds = kinds(&sample, 0.5);
        let shares = [kinds.zero, kinds.duplicate, kinds.incompressible, kinds.text, kinds.other];
        assert_eq!(shares, [0.5, 0.125, 0.125, 0.125, 0.125]);
    }
}
