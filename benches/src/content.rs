use std::iter::repeat_with;

/// Bytes in a page.
pub const PAGE: usize = 4096;

/// Pages of one kind, back to back.
pub fn pages(kind: &str, count: usize) -> Vec<u8> {
    let mut seed = 1_u64;
    let mut random = move || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed.wrapping_mul(0x2545_f491_4f6c_dd1d)
    };
    let len = count * PAGE;
    match kind {
        "zero" => vec![0; len],
        "random" => repeat_with(|| random().to_le_bytes()).flatten().take(len).collect(),
        "text" => {
            let words = ["guest ", "page ", "of ", "the ", "memory\n", "is ", "dirty ", "0x7f3a "];
            let word = move || words[(random() % 8) as usize].bytes();
            repeat_with(word).flatten().take(len).collect()
        }
        // Pointers into one arena, small numbers, zeros.
        _ => {
            let word = move || match random() % 4 {
                0 => 0x7f3a_0000_0000 | (random() & 0x00ff_fff0),
                1 => random() & 0xff,
                _ => 0,
            };
            repeat_with(word).flat_map(u64::to_le_bytes).take(len).collect()
        }
    }
}
