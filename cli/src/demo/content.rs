//! Memory as real guests have it: nothing, text, machine code, heap, noise.

use std::io::Read;

use multifd_engine::PAGE;

/// Pages of one kind in a row: guests allocate in runs, too.
pub(super) const RUN_PAGES: usize = 64;

/// Makes the content of a guest, the same at every run but for the machine code, which is this
/// program's own.
pub(super) struct Content {
    random: Random,
    code: Vec<u8>,
}

/// xorshift64*: good enough to look like data.
pub(super) struct Random(u64);

impl Content {
    pub(super) fn new() -> Self {
        let mut code = Vec::new();
        // A few MiB of it; without, text takes its place.
        if let Ok(file) = std::env::current_exe().and_then(std::fs::File::open) {
            let _ = file.take(8 << 20).read_to_end(&mut code);
        }
        Self { random: Random::new(1), code }
    }

    /// A run of pages of one kind: zero (40 %, empty here), text (20 %), code (10 %), heap-like (20
    /// %), random (10 %).
    pub(super) fn run(&mut self) -> Vec<u8> {
        let len = RUN_PAGES * PAGE;
        let random = &mut self.random;
        match random.below(10) {
            0..4 => Vec::new(),
            4..6 => text(random, len),
            6 if self.code.len() > len => {
                let start = random.below(self.code.len() - len);
                self.code.get(start..start + len).unwrap_or_default().to_vec()
            }
            7..9 => heap(random, len),
            9 => (0..len / 8).flat_map(|_| random.next().to_le_bytes()).collect(),
            _ => text(random, len),
        }
    }
}

fn text(random: &mut Random, len: usize) -> Vec<u8> {
    const WORDS: [&str; 12] = [
        "page ",
        "guest ",
        "the ",
        "of ",
        "memory\n",
        "channel ",
        "0x7f ",
        "error: ",
        "a ",
        "migration ",
        "is ",
        "dirty ",
    ];
    let mut out = Vec::with_capacity(len + 16);
    while out.len() < len {
        out.extend_from_slice(WORDS.get(random.below(WORDS.len())).unwrap_or(&" ").as_bytes());
    }
    out.truncate(len);
    out
}

/// Pointers into a few arenas, small numbers, zeros.
fn heap(random: &mut Random, len: usize) -> Vec<u8> {
    let word = |random: &mut Random| match random.below(4) {
        0 => 0x0000_7f3a_0000_0000 | (random.next() & 0x00ff_fff0),
        1 => random.next() & 0xff,
        _ => 0,
    };
    (0..len / 8).flat_map(|_| word(random).to_le_bytes()).collect()
}

impl Random {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// Below `limit`, which is not 0.
    pub(super) fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next() % limit as u64).unwrap_or(0)
    }
}
