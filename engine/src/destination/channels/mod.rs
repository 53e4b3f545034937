//! The connections of one migration: accepting them, the workers of parallel channels, and where
//! these meet the main stream.

pub(super) mod accept;
mod packet;
pub(super) mod sync;
pub(super) mod sync_state;
pub(super) mod worker;
