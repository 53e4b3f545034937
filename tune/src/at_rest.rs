//! A guest that is not running, as it is named on the command line.

use std::path::{Path, PathBuf};

use multifd_transports::Endpoint;

/// What is looked at.
pub(crate) enum AtRest {
    /// A directory.
    Checkpoint(PathBuf),
    /// A file, and where in it the stream begins.
    Stream(PathBuf, u64),
}

impl AtRest {
    /// A checkpoint's directory, or a file with a stream, also as `file:PATH,offset=N`.
    pub(crate) fn at(path: &Path) -> Result<Self, String> {
        if path.is_dir() {
            return match path.join("manifest.json").exists() {
                true => Ok(Self::Checkpoint(path.to_owned())),
                false => Err(format!("{} is no checkpoint: it has no manifest.json", path.display())),
            };
        }
        Ok(match path.to_string_lossy().parse() {
            Ok(Endpoint::File { path, offset }) => Self::Stream(path, offset),
            _ => Self::Stream(path.to_owned(), 0),
        })
    }
}
