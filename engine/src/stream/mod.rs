//! The main channel's stream, as source, destination and recordings share it.

pub(crate) mod block_list;
pub(crate) mod compressed;
pub(crate) mod dialect;
pub(crate) mod foreign;
mod main_source;
pub(crate) mod mapped_layout;
mod reader;
pub(crate) mod sections;
pub(crate) mod vm_state;

pub(crate) use main_source::MainReader;
pub(crate) use reader::{ByteSource, ItemReader, SeekError};
