//! How pages leave a source: on the main channel, on parallel channels, or into a file.

pub(super) mod channels;
pub(super) mod file;
pub(super) mod main;
