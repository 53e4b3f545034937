//! A guest that is not running, by its path.

use std::path::{Path, PathBuf};

use multifd_engine::{LibvirtFormat, LibvirtImage};
use multifd_transports::Endpoint;

use crate::{Error, Result};

/// What a path leads to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AtRest {
    /// A checkpoint's directory.
    Checkpoint(PathBuf),
    /// A file, and the byte in it at which the stream begins.
    Stream(PathBuf, u64),
}

impl AtRest {
    /// A checkpoint's directory, or a file with a stream, also as `file:PATH,offset=N`, or an image
    /// of `virsh save`. The stream of one that is packed is left to the reader of the file, who
    /// says how to unpack it.
    ///
    /// # Errors
    /// The directory is not a checkpoint, or the image is not whole.
    pub fn at(path: &Path) -> Result<Self> {
        if path.is_dir() {
            return match path.join("manifest.json").exists() {
                true => Ok(Self::Checkpoint(path.to_owned())),
                false => Err(Error::NotACheckpoint { path: path.to_owned() }),
            };
        }
        let (path, offset) = match path.to_string_lossy().parse() {
            Ok(Endpoint::File { path, offset }) => (path, offset),
            _ => (path.to_owned(), 0),
        };
        if offset > 0 || !path.exists() {
            return Ok(Self::Stream(path, offset));
        }
        let image = LibvirtImage::read(&path)?;
        let image = image.filter(|image| !matches!(image.format(), LibvirtFormat::Packed(_)));
        Ok(Self::Stream(path, image.map_or(0, |image| image.stream_offset())))
    }
}
