//! Guests that are stored: checkpoints of ours, and streams that were written to a file.

pub(crate) mod checkpoint;
pub(crate) mod libvirt;
pub(crate) mod recording;
