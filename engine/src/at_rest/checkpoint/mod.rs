//! A received guest on disk.
//!
//! ```text
//!  DIR/manifest.json      format, machine, blocks, where it came from
//!  DIR/ram/00.img ...     one sparse, raw file a RAM block
//!  DIR/device-state.bin   the configuration section, then everything from the first device section to the end
//!  DIR/early-state.bin    device sections that came before the end of RAM (virtio-mem), if there were any
//!  DIR/vmdesc.json        the source's description of its device sections, if it sent one
//! ```
//!
//! A checkpoint appears whole or not at all: it is written under a temporary name beside `DIR`,
//! made durable, and renamed.

mod manifest;
mod partial;
mod reader;
mod writer;

pub use manifest::{CheckpointBlock, EarlyState, Manifest};
pub use reader::Checkpoint;
pub use writer::CheckpointWriter;

use std::path::Path;

use crate::error::{Error, ErrorKind, Phase};

const MANIFEST: &str = "manifest.json";
const DEVICE_STATE: &str = "device-state.bin";
const EARLY_STATE: &str = "early-state.bin";
const DESCRIPTION: &str = "vmdesc.json";

fn storage(doing: &str, path: &Path, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
    Error::new(ErrorKind::Storage, Phase::Setup, format!("{doing} {}", path.display())).because(source)
}
