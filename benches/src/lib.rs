//! Micro benches of the parts: `cargo bench -p multifd-benches`. Each takes seconds; what they
//! found is in docs/performance.md.
//!
//! * `bitmap`: collecting and claiming dirty pages, up to a 1 TiB guest
//! * `pages`: zero scan, xbzrle, every codec
//! * `reading`: ways to read guest memory that may fault
//! * `proof`: the hash, and whole moves with and without checksums and digest
//! * `pacer`: what the rate limit costs a packet
//! * `tls`: the providers' ciphers, the records around them, one channel; with the argument `long`,
//!   16 GiB across new keys

/// Pages with the kinds of content that guests have; the same at every run.
pub mod content;
