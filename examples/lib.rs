//! Small programs that a VMM author would copy from. Each proves itself and says so in its last
//! line:
//!
//! * `cargo run --release --example embed`: the 15 lines, for a VMM on vm-memory
//! * `cargo run --release --example embed_postcopy`: the same in post-copy: the guest goes on, its
//!   RAM follows, the link breaks
//! * `cargo run --release --example kvm_guest [--postcopy]`: a real KVM guest moves between two
//!   processes and counts on; in post-copy before its RAM is there
//! * `cargo run --release --example custom_codec`: a compression method of your own
//! * `cargo run --release --example custom_dirty_log`: a dirty log of your own
//! * `cargo run --release --package multifd-unix-pair`: socket pairs of your own, and an engine
//!   without codecs
//! * `cargo run --release --example seccomp`: each thread of a migration has a filter of system
//!   calls
//! * `cargo run --release --example versioned_device`: a device whose state goes between releases
//!   of a VMM, both ways
//! * `cargo run --release --example vhost_user_blk`: a disk in another process, before, during and
//!   after the move
//! * `cargo run --release --example vhost_user_postcopy`: a device in another process, which goes
//!   on before the guest's memory is there

/// What the book for embedders shows compiles as it stands.
#[cfg(doctest)]
#[doc = include_str!("../docs/embedding.md")]
pub struct Embedding;
