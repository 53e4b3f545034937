use proptest::prelude::*;
use proptest::sample::Index;

use super::*;

const PAGE_LEN: usize = 4096;

/// The rules of docs/wire.md §6 as they are written there: byte by byte, counting `d`.
fn plain_encode(old: &[u8], new: &[u8]) -> (Outcome, Vec<u8>) {
    let (page_len, mut at, mut delta) = (new.len(), 0, Vec::new());
    let byte = |n: usize| u8::try_from(n).unwrap();
    let small = |n: usize| if n < 128 { vec![byte(n)] } else { vec![0x80 | byte(n & 0x7f), byte(n >> 7)] };
    if old == new {
        return (Outcome::Unchanged, delta);
    }
    while at < page_len {
        if delta.len() + 2 > page_len {
            return (Outcome::Overflow, delta);
        }
        let equal = (at..page_len).take_while(|&i| old[i] == new[i]).count();
        at += equal;
        if at == page_len {
            break;
        }
        delta.extend(small(equal));
        if delta.len() + 2 > page_len {
            return (Outcome::Overflow, delta);
        }
        let changed = (at..page_len).take_while(|&i| old[i] != new[i]).count();
        delta.extend(small(changed));
        if delta.len() + changed > page_len {
            return (Outcome::Overflow, delta);
        }
        delta.extend_from_slice(&new[at..at + changed]);
        at += changed;
    }
    (Outcome::Delta(delta.len()), delta)
}

fn encoded(old: &[u8], new: &[u8]) -> (Outcome, Vec<u8>) {
    let mut out = vec![0xee; new.len() + 16];
    let outcome = encode(old, new, &mut out);
    assert!(out[new.len()..].iter().all(|&byte| byte == 0xee), "wrote past the limit");
    out.truncate(if let Outcome::Delta(len) = outcome { len } else { 0 });
    (outcome, out)
}

/// Same answer and same bytes as the plain encoder, and the way back gives `new`.
fn check(old: &[u8], new: &[u8]) -> Outcome {
    let (outcome, delta) = encoded(old, new);
    let (expected, expected_delta) = plain_encode(old, new);
    assert_eq!(outcome, expected);
    if let Outcome::Delta(_) = outcome {
        assert_eq!(delta, expected_delta);
        let mut page = old.to_vec();
        decode(&delta, &mut page).unwrap();
        assert!(page == new, "decoded to something else");
    }
    outcome
}

/// `old` with the bytes of `changed` altered.
fn altered(old: &[u8], changed: impl IntoIterator<Item = usize>) -> Vec<u8> {
    let mut new = old.to_vec();
    changed.into_iter().for_each(|at| new[at] ^= 0x55);
    new
}

#[test]
fn equal_pages_give_nothing() {
    assert_eq!(check(&[7; PAGE_LEN], &[7; PAGE_LEN]), Outcome::Unchanged);
}

#[test]
fn bytes_are_those_of_the_specification() {
    let old = [0; PAGE_LEN];
    let mut new = old;
    new[0] = 1;
    assert_eq!(encoded(&old, &new).1, [0, 1, 1]);
    new[0] = 0;
    new[127] = 9;
    new[128] = 8;
    assert_eq!(encoded(&old, &new).1, [127, 2, 9, 8]);
    new[127] = 0;
    assert_eq!(encoded(&old, &new).1, [0x80, 0x01, 1, 8]);
    new[4095] = 3;
    // 128 unchanged, 1 changed, 3966 = 0x1e * 128 + 0x7e unchanged, 1 changed.
    assert_eq!(encoded(&old, &new).1, [0x80, 0x01, 1, 8, 0xfe, 0x1e, 1, 3]);
}

#[test]
fn one_changed_byte_at_every_offset() {
    let old: Vec<u8> = (0..PAGE_LEN).map(|at| (at * 7).to_le_bytes()[0]).collect();
    for at in 0..PAGE_LEN {
        let len = if at < 128 { 3 } else { 4 };
        assert_eq!(check(&old, &altered(&old, [at])), Outcome::Delta(len));
    }
}

#[test]
fn one_equal_byte_at_every_offset() {
    let old = vec![3; PAGE_LEN];
    for at in 0..PAGE_LEN {
        let _ = check(&old, &altered(&old, (0..PAGE_LEN).filter(|&i| i != at)));
    }
}

#[test]
fn runs_of_every_length() {
    let old = vec![0xff; PAGE_LEN];
    for len in 1..300 {
        for start in [0, 1, 63, 64, 65, 1000] {
            let _ = check(&old, &altered(&old, start..start + len));
            let _ = check(&old, &altered(&old, (start..PAGE_LEN).step_by(len + 1)));
        }
    }
}

#[test]
fn delta_may_be_as_long_as_the_page_but_no_longer() {
    let old = vec![0; PAGE_LEN];
    // One run to the end of the page: its lengths take 1 + 2 bytes.
    assert_eq!(check(&old, &altered(&old, 3..PAGE_LEN)), Outcome::Delta(PAGE_LEN));
    assert_eq!(check(&old, &altered(&old, 2..PAGE_LEN)), Outcome::Overflow);
    assert_eq!(check(&old, &altered(&old, 0..PAGE_LEN)), Outcome::Overflow);
    // With unchanged bytes after it, these ask for room for 2 more, though they will not be
    // written.
    assert_eq!(check(&old, &altered(&old, 0..PAGE_LEN - 5)), Outcome::Delta(PAGE_LEN - 2));
    assert_eq!(check(&old, &altered(&old, 0..PAGE_LEN - 4)), Outcome::Overflow);
}

#[test]
fn every_length_near_the_limit_is_as_specified() {
    let old = vec![0; PAGE_LEN];
    for unchanged in 0..40 {
        for gap in [1, 2, 200] {
            let new = altered(&old, (0..PAGE_LEN - unchanged).filter(|&at| !(100..100 + gap).contains(&at)));
            let _ = check(&old, &new);
        }
    }
}

#[test]
fn short_output_is_an_overflow() {
    let (old, new) = ([0; PAGE_LEN], altered(&[0; PAGE_LEN], [0, 9]));
    let (_, delta) = encoded(&old, &new);
    assert_eq!(delta.len(), 6);
    for room in 0..8 {
        assert_eq!(encode(&old, &new, &mut vec![0; room]), Outcome::Overflow, "room for {room}");
    }
    assert_eq!(encode(&old, &new, &mut [0; 8]), Outcome::Delta(6));
}

#[test]
fn page_sizes_end_at_what_run_lengths_can_say() {
    for len in [0, 1, 2, 3, 7, 8, 9, 63, 64, 65, 8192, MAX_PAGE_LEN] {
        let old = vec![0; len];
        assert_eq!(encoded(&old, &old).0 == Outcome::Unchanged, len != 1, "{len}");
        if len > 4 {
            let _ = check(&old, &altered(&old, [len - 1]));
        }
    }
    let large = vec![0; MAX_PAGE_LEN + 1];
    assert_eq!(encoded(&large, &large).0, Outcome::Overflow);
    assert_eq!(encoded(&large[..5], &large[..4]).0, Outcome::Overflow);
}

#[test]
fn decoder_refuses_what_the_grammar_does_not_have() {
    use XbzrleError::{EmptyRun, LongLength, PastPage, Truncated};
    for (delta, error) in [
        (&[0][..], Truncated { at: 0 }),
        (&[5, 1], Truncated { at: 1 }),
        (&[0, 2, 7], Truncated { at: 2 }),
        (&[0, 1, 7, 3], Truncated { at: 3 }),
        (&[0, 1, 7, 3, 1], Truncated { at: 4 }),
        (&[0x81, 0x00], Truncated { at: 2 }),
        (&[0x81, 0x00, 1], Truncated { at: 2 }),
        (&[0, 0, 7], EmptyRun { at: 2 }),
        (&[0, 1, 7, 0, 1, 7], EmptyRun { at: 4 }),
        (&[0, 1, 7, 0x80, 0, 1, 7], EmptyRun { at: 5 }),
        (&[0x80, 0x80, 1, 7], LongLength { at: 0 }),
        (&[0, 0xff, 0xff, 7], LongLength { at: 1 }),
        (&[17, 1, 7], PastPage { at: 1 }),
        (&[16, 1, 7], PastPage { at: 2 }),
        (&[15, 2, 7, 7], PastPage { at: 2 }),
        (&[15, 1, 7, 1, 1, 7], PastPage { at: 4 }),
        (&[0xff, 0x7f, 1, 7], PastPage { at: 2 }),
        (&[0, 0xff, 0x7f, 7], PastPage { at: 3 }),
    ] {
        let mut page = [0; 16];
        assert_eq!(decode(delta, &mut page), Err(error), "{delta:02x?}");
    }
}

#[test]
fn decoder_takes_what_other_encoders_may_write() {
    let mut page = [0; 16];
    decode(&[], &mut page).unwrap();
    assert_eq!(page, [0; 16]);
    // Literals that change nothing, adjacent runs split by one byte, a long form of a short length,
    // the last byte.
    decode(&[0x80, 0, 0x82, 0, 0, 5, 1, 1, 6, 11, 1, 7], &mut page).unwrap();
    assert_eq!(page, [0, 5, 0, 6, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7]);
}

#[test]
fn every_cut_of_a_delta_is_refused_or_a_prefix_of_its_runs() {
    let old = vec![0; PAGE_LEN];
    let (_, delta) = encoded(&old, &altered(&old, [1, 2, 500, 501, 502, 4000]));
    let ends: Vec<usize> = vec![0, 4, 10, 14];
    assert_eq!(delta.len(), 14);
    for cut in 0..=delta.len() {
        let decoded = decode(&delta[..cut], &mut old.clone());
        assert_eq!(decoded.is_ok(), ends.contains(&cut), "cut at {cut}: {decoded:?}");
    }
}

proptest! {
    #[test]
    fn random_changes_encode_as_specified_and_come_back(
        old in prop::collection::vec(any::<u8>(), PAGE_LEN),
        runs in prop::collection::vec((any::<Index>(), 1usize..700), 0..60),
    ) {
        let mut new = old.clone();
        for (start, len) in runs {
            let start = start.index(PAGE_LEN);
            new[start..].iter_mut().take(len).for_each(|byte| *byte = byte.wrapping_add(1));
        }
        let _ = check(&old, &new);
    }

    #[test]
    fn sparse_pages_encode_as_specified_and_come_back(
        len in 2usize..600,
        old in prop::collection::vec(0u8..2, 600),
        new in prop::collection::vec(0u8..2, 600),
    ) {
        let _ = check(&old[..len], &new[..len]);
    }

    #[test]
    fn arbitrary_bytes_neither_panic_nor_reach_beyond(
        delta in prop::collection::vec(prop_oneof![0u8..4, any::<u8>()], 0..200),
        len in 0usize..600,
    ) {
        let mut memory = vec![0xee; len + 32];
        let _ = decode(&delta, &mut memory[16..16 + len]);
        prop_assert!(memory[..16].iter().chain(&memory[16 + len..]).all(|&byte| byte == 0xee));
    }
}
