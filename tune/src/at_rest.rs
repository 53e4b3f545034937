//! A guest that is not running, by its path.

use std::path::{Path, PathBuf};

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
    /// A checkpoint's directory, or a file with a stream, also as `file:PATH,offset=N`.
    ///
    /// # Errors
    /// The directory is not a checkpoint. Files are not opened.
    pub fn at(path: &Path) -> Result<Self> {
        if path.is_dir() {
            return match path.join("manifest.json").exists() {
                true => Ok(Self::Checkpoint(path.to_owned())),
                false => Err(Error::NotACheckpoint { path: path.to_owned() }),
            };
        }
        Ok(match path.to_string_lossy().parse() {
            Ok(Endpoint::File { path, offset }) => Self::Stream(path, offset),
            _ => Self::Stream(path.to_owned(), 0),
        })
    }
}
