//! Is a page all zeros? Asked of every page that a guest has, so it has to run at the speed of
//! memory.

/// Whether every byte of `page` is zero. Any length; an empty page is zero.
///
/// Most pages that are not zero show it in their first bytes, so these are looked at first. The
/// rest goes in blocks of 256 bytes, each OR-ed together without a branch, in AVX2 registers where
/// the processor has them.
#[inline]
pub fn is_zero(page: &[u8]) -> bool {
    page.first_chunk::<64>().is_none_or(|first| or(first) == 0) && scan(page)
}

#[cfg(target_arch = "x86_64")]
#[expect(unsafe_code, reason = "a function for AVX2 is unsafe to call where that is not known to be there")]
fn scan(page: &[u8]) -> bool {
    if std::arch::is_x86_feature_detected!("avx2") {
        // SAFETY:
        // * the processor has AVX2, as was detected just above.
        unsafe { scan_avx2(page) }
    } else {
        scan_portable(page)
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn scan(page: &[u8]) -> bool {
    scan_portable(page)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn scan_avx2(page: &[u8]) -> bool {
    scan_blocks(page)
}

/// The compiler's choice of registers: SSE2 on x86-64, NEON on 64-bit ARM.
fn scan_portable(page: &[u8]) -> bool {
    scan_blocks(page)
}

/// Compiled anew into each caller, for its set of instructions.
#[inline(always)]
fn scan_blocks(page: &[u8]) -> bool {
    let (blocks, tail) = page.as_chunks::<256>();
    for block in blocks {
        if or(block) != 0 {
            return false;
        }
    }
    tail.iter().fold(0, |bits, byte| bits | byte) == 0
}

/// All bytes OR-ed into one word. A loop without branches over a fixed length, which compiles to
/// vector instructions.
#[inline(always)]
fn or<const LEN: usize>(block: &[u8; LEN]) -> u64 {
    let (words, tail) = block.as_chunks::<8>();
    let bits = words.iter().fold(0, |bits, word| bits | u64::from_ne_bytes(*word));
    tail.iter().fold(bits, |bits, byte| bits | u64::from(*byte))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn plain(page: &[u8]) -> bool {
        page.iter().all(|&byte| byte == 0)
    }

    /// Every implementation that this machine can run.
    fn answers(page: &[u8]) -> [bool; 3] {
        [is_zero(page), scan(page), scan_portable(page)]
    }

    #[test]
    fn zero_pages_of_every_length_are_zero() {
        let page = [0; 1100];
        for len in 0..page.len() {
            assert_eq!(answers(&page[..len]), [true; 3], "length {len}");
        }
    }

    #[test]
    fn one_set_byte_is_seen_at_every_offset() {
        let mut page = vec![0; 4096];
        for offset in 0..page.len() {
            for byte in [0x01, 0x80, 0xff] {
                page[offset] = byte;
                assert_eq!(answers(&page), [false; 3], "byte {byte:#x} at {offset}");
            }
            page[offset] = 0;
        }
        assert_eq!(answers(&page), [true; 3]);
    }

    #[test]
    fn bytes_outside_do_not_count() {
        let mut memory = vec![0xff; 4096 + 64];
        for start in 0..64 {
            memory[start..start + 4096].fill(0);
            assert!(is_zero(&memory[start..start + 4096]), "unaligned by {start}");
            memory.fill(0xff);
        }
    }

    proptest! {
        #[test]
        fn same_answer_as_the_plain_loop(
            len in 0usize..9000,
            set in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..3),
        ) {
            let mut page = vec![0; len];
            for (index, byte) in set {
                if len > 0 {
                    page[index.index(len)] = byte;
                }
            }
            prop_assert_eq!(answers(&page), [plain(&page); 3]);
        }
    }
}
