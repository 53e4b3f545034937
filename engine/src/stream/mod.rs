//! The main channel's stream, as source, destination and recordings share it.

pub(crate) mod dialect;
pub(crate) mod mapped_layout;
pub(crate) mod reader;
pub(crate) mod sections;

pub(crate) use reader::StreamReader;
