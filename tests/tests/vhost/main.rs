//! Devices whose back-ends write guest memory on their own: their logs, their life around a
//! migration.
#![allow(
    clippy::cast_possible_truncation,
    clippy::indexing_slicing,
    clippy::missing_errors_doc,
    clippy::unwrap_used,
    missing_docs,
    unreachable_pub,
    reason = "test code may panic, and is read as a whole"
)]

mod backend;
mod blk;
mod faults;
mod fs;
mod guest;
mod kernel;
#[path = "../../../engine/tests/kvm_guest/mod.rs"]
mod kvm_guest;
mod merged;
mod net;
mod order;
mod partly;
mod peers;
mod postcopy;
mod queues;
mod rings;
mod script;
mod state;
