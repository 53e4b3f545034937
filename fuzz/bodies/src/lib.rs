//! What the fuzz targets do with their bytes: a library, so that stable Rust replays the corpora
//! (`tests/replay.rs`).
//!
//! ```text
//!  fuzz/targets (libFuzzer, nightly) ──┐
//!  fuzz/corpus, mutated by replay.rs ──┴─> one function a target ──> wire, device state, codecs, TLS records, recordings, destinations
//! ```
//!
//! A function returns whatever the bytes are, soon, and panics where the code under test breaks a
//! promise: what was parsed is not what is encoded, a byte beyond a buffer is written, a cut stream
//! is taken for a whole one, the engine contradicts itself. How each reads its input is told at its
//! head; `src/bin/seeds.rs` writes the seeds in that form.

mod destination;
mod input;
mod packets;
mod postcopy;
mod recording;
mod streams;
mod tls;
mod vmstate;
mod wire;
mod xbzrle;

pub use destination::{TIMEOUT, channels, destination};
use input::Input;
pub use packets::{lz4, zlib, zstd};
pub use postcopy::{postcopy, switched};
pub use recording::recording;
pub use streams::streams;
pub use tls::tls;
pub use vmstate::vmstate;
pub use wire::wire;
pub use xbzrle::xbzrle;

/// What a fuzz target does with an input.
pub type Body = fn(&[u8]);

/// Every target, by the name of its corpus.
pub const TARGETS: [(&str, Body); 12] = [
    ("channels", |bytes| {
        channels(bytes, TIMEOUT);
    }),
    ("destination", |bytes| {
        destination(bytes, TIMEOUT);
    }),
    ("lz4", lz4),
    ("postcopy", postcopy),
    ("recording", |bytes| {
        recording(bytes, TIMEOUT);
    }),
    ("streams", streams),
    ("tls", tls),
    ("vmstate", vmstate),
    ("wire", wire),
    ("xbzrle", xbzrle),
    ("zlib", zlib),
    ("zstd", zstd),
];
