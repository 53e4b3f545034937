//! Page batches to try a codec on, always the same ones.

/// Bytes of a page, the smallest there is.
pub(super) const PAGE_LEN: usize = 4096;

/// What pages are filled with.
#[derive(Clone, Copy, Debug)]
pub(super) enum Fill {
    /// Words of a counter, as in page tables and pointer arrays.
    Counters,
    /// Bytes that no codec can make fewer.
    Random,
    /// Words from a small vocabulary.
    Text,
    /// Zeros.
    Zero,
}

impl Fill {
    pub(super) const ALL: [Self; 4] = [Self::Counters, Self::Random, Self::Text, Self::Zero];

    /// `pages` pages. The same `seed` gives the same bytes.
    pub(super) fn batch(self, pages: usize, seed: u64) -> Vec<u8> {
        let len = pages * PAGE_LEN;
        let mut batch = Vec::with_capacity(len + 16);
        let mut noise = Noise(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        while batch.len() < len {
            match self {
                Self::Counters => batch.extend_from_slice(&(seed + (batch.len() as u64 >> 3)).to_le_bytes()),
                Self::Random => batch.extend_from_slice(&noise.next().to_le_bytes()),
                Self::Text => batch.extend_from_slice(noise.word()),
                Self::Zero => batch.resize(len, 0),
            }
        }
        batch.truncate(len);
        batch
    }
}

/// A xorshift generator. Never 0.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn word(&mut self) -> &'static [u8] {
        match (self.next() >> 40) % 8 {
            0 => b"the ",
            1 => b"guest ",
            2 => b"writes ",
            3 => b"its ",
            4 => b"page ",
            5 => b"while ",
            6 => b"another ",
            _ => b"reads.\n",
        }
    }
}
