//! Three bits a page: what a stream has said of it so far.

use std::collections::HashMap;

/// Pages of one chunk: 16 MiB of RAM at 4 KiB a page.
const CHUNK_PAGES: u64 = 4096;
const CHUNK_WORDS: usize = 64;

/// Most chunks: 256 MiB of memory, for 2.7 TiB of RAM. Chunks are made where pages come, so what a block claims to be
/// long costs nothing.
const MAX_CHUNKS: usize = (256 << 20) / size_of::<Chunk>();

/// What to say when there are no more.
pub(crate) const TOO_WIDE: &str = "the pages of this stream are spread over more than 2.7 TiB of RAM, which is more than can be kept count of";

/// The pages of a stream, as far as it has been read.
#[derive(Default)]
pub(crate) struct PageStates {
    chunks: HashMap<(usize, u64), Box<Chunk>>,
}

#[derive(Clone)]
struct Chunk {
    seen: [u64; CHUNK_WORDS],
    zero: [u64; CHUNK_WORDS],
    repeated: [u64; CHUNK_WORDS],
}

/// What a page was before a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Before {
    pub(crate) seen: bool,
    pub(crate) zero: bool,
    pub(crate) repeated: bool,
}

impl PageStates {
    /// Notes a record of a page, which then is zero or not. `None`: the pages are spread too wide.
    pub(crate) fn note(&mut self, block: usize, page: u64, zero: bool) -> Option<Before> {
        let key = (block, page / CHUNK_PAGES);
        if self.chunks.len() >= MAX_CHUNKS && !self.chunks.contains_key(&key) {
            return None;
        }
        let none = || Chunk { seen: [0; CHUNK_WORDS], zero: [0; CHUNK_WORDS], repeated: [0; CHUNK_WORDS] };
        let chunk = self.chunks.entry(key).or_insert_with(|| Box::new(none()));
        let (word, bit) = ((page % CHUNK_PAGES / 64) as usize, 1 << (page % 64));
        let (seen, zeros, repeated) =
            (chunk.seen.get_mut(word)?, chunk.zero.get_mut(word)?, chunk.repeated.get_mut(word)?);
        let before =
            Before { seen: *seen & bit != 0, zero: *zeros & bit != 0, repeated: *repeated & bit != 0 };
        *repeated |= *seen & bit;
        *seen |= bit;
        *zeros = if zero { *zeros | bit } else { *zeros & !bit };
        Some(before)
    }
}
