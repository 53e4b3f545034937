//! Settings as plain data, the table of QEMU's parameters, and the rules of what goes with what.

mod destination;
pub(crate) mod own;
pub mod parameter;
pub mod rule;
mod source;

pub use destination::DestinationConfig;
pub use source::SourceConfig;

pub(crate) use source::{Opened, Surroundings};
