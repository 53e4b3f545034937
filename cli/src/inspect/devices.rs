//! The devices of a guest at rest, without a look at its pages.

use std::path::Path;

use multifd_engine::{Checkpoint, Devices, PageContent, Recording};
use multifd_tune::AtRest;

use super::Result;
use super::ram::Ram;

/// The devices of a guest, and its RAM as far as it can be looked into.
pub(super) struct DevicesAtRest {
    pub(super) devices: Devices,
    pub(super) ram: Ram,
}

impl DevicesAtRest {
    pub(super) fn open(path: &Path) -> Result<Self> {
        match AtRest::at(path).map_err(|error| error.chain())? {
            AtRest::Checkpoint(directory) => Self::checkpoint(&directory),
            AtRest::Stream(path, offset) => Self::recording(&path, offset),
        }
    }

    fn checkpoint(directory: &Path) -> Result<Self> {
        let checkpoint = Checkpoint::open(directory).map_err(|error| error.chain())?;
        Ok(Self { devices: checkpoint.devices().map_err(|error| error.chain())?, ram: ram_of(&checkpoint)? })
    }

    /// The devices are behind the pages, which are passed over.
    fn recording(path: &Path, offset: u64) -> Result<Self> {
        let recording = Recording::open_at(path, offset).map_err(|error| error.chain())?;
        let mut pages = recording.pages();
        while let Some(record) = pages.next_page().map_err(|error| error.chain())? {
            let (PageContent::Data(_) | PageContent::Zero { .. } | PageContent::Xbzrle(_)) = record.content;
        }
        let devices = pages.devices().map_err(|error| error.chain())?;
        Ok(Self { devices, ram: ram_of_recording(&recording) })
    }
}

/// The RAM of a checkpoint, whose pages can be read.
pub(super) fn ram_of(checkpoint: &Checkpoint) -> Result<Ram> {
    let manifest = checkpoint.manifest();
    let blocks = manifest.blocks.iter().map(|block| (block.idstr.as_str(), block.length));
    let content = checkpoint.ram().map_err(|error| error.chain())?;
    Ok(Ram::new(&manifest.machine, blocks).with_content(content))
}

/// The RAM of a stream, of which only the size is known.
pub(super) fn ram_of_recording(recording: &Recording) -> Ram {
    let blocks = recording.blocks().iter().map(|block| (block.name.as_str(), block.used_len));
    Ram::new(&recording.configuration().machine, blocks)
}
