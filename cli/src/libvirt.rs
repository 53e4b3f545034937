//! Images of `virsh save`: read as if they were plain streams, and written.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use multifd_engine::{Error, LibvirtFormat, LibvirtImage};
use multifd_transports::Endpoint;

use crate::outcome::Failure;

/// The stream in the image that `uri` names; `uri` itself if that is none.
pub(crate) fn stream_in(uri: &Endpoint) -> Result<Endpoint, Error> {
    let Endpoint::File { path, offset: 0 } = uri else { return Ok(uri.clone()) };
    if !path.exists() {
        // What opens it says so, in the words of the command.
        return Ok(uri.clone());
    }
    let Some(image) = LibvirtImage::read(path)? else { return Ok(uri.clone()) };
    let offset = image.stream_offset();
    Ok(match image.format() {
        LibvirtFormat::Packed(program) => {
            let path = quoted(&path.display().to_string());
            Endpoint::Exec(format!("tail -c +{} {path} | {program} -dc", offset + 1))
        }
        _ => Endpoint::File { path: path.clone(), offset },
    })
}

/// A word for `/bin/sh`.
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// An image that is written: a header that says that it is not whole, then a stream.
pub(crate) struct Image {
    file: File,
    path: PathBuf,
    offset: u64,
}

impl Image {
    /// Begins an image at `path`, for the domain of the one at `from`.
    pub(crate) fn begin(from: &Path, uri: &Endpoint, mapped: bool) -> Result<Self, Failure> {
        let Endpoint::File { path, offset: 0 } = uri else {
            return Err(Failure::Usage(format!("--libvirt-header writes to file:PATH, not to {uri}")));
        };
        let Some(header) = LibvirtImage::read(from)? else {
            let detail = format!("--libvirt-header {}: no image of virsh save", from.display());
            return Err(Failure::Usage(detail));
        };
        let format = if mapped { LibvirtFormat::Sparse } else { LibvirtFormat::Raw };
        let failed = |error| Failure::Usage(format!("{}: {error}", path.display()));
        let mut file =
            OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).map_err(failed)?;
        file.write_all(&header.unfinished(format)).map_err(failed)?;
        Ok(Self { file, path: path.clone(), offset: header.stream_offset() })
    }

    /// Where its stream goes.
    pub(crate) fn stream(&self) -> Endpoint {
        Endpoint::File { path: self.path.clone(), offset: self.offset }
    }

    /// Says in the header that the image is whole.
    pub(crate) fn finish(self) -> Result<(), Failure> {
        let marked = self.file.write_all_at(&LibvirtImage::MARK, 0).and_then(|()| self.file.sync_all());
        marked.map_err(|error| Failure::Usage(format!("{}: {error}", self.path.display())))
    }

    /// Removes it: its stream is not whole.
    pub(crate) fn abort(self) {
        if let Err(error) = std::fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), "an unfinished image is left: {error}");
        }
    }
}
