//! Why nothing could be found.

use std::io;
use std::path::PathBuf;

use multifd_codecs::CodecChoice;
use multifd_codecs::xbzrle::XbzrleError;

use crate::memory::PAGE;
pub use crate::memory::ProcessError;
use crate::page_states::TooManyPages;

/// The result of anything that reads or measures.
pub type Result<T> = std::result::Result<T, Error>;

/// Why nothing could be found. The cause, where there is one, is the `source`.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A bug of this crate.
    #[error("bug: {0}")]
    Bug(&'static str),
    /// A codec failed on pages of the guest.
    #[error("measuring {codec}")]
    Codec {
        /// The codec.
        codec: CodecChoice,
        /// What it said.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The checkpoint or stream cannot be read.
    #[error(transparent)]
    Engine(#[from] multifd_engine::Error),
    /// The file system does not say which parts of a block's file hold data.
    #[error("looking for the holes of block {block}")]
    Holes {
        /// Name of the block.
        block: String,
        /// What the file system said.
        source: io::Error,
    },
    /// A part of this machine could not be measured.
    #[error("measuring {part}")]
    Machine {
        /// What was measured.
        part: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// A checkpoint's file is shorter than its block.
    #[error("page {page} of block {block} is missing: its file is too short")]
    MissingPage {
        /// Name of the block.
        block: String,
        /// Number of the page within it.
        page: usize,
    },
    /// A directory without a checkpoint.
    #[error("{} is not a checkpoint: it has no manifest.json", path.display())]
    NotACheckpoint {
        /// The directory.
        path: PathBuf,
    },
    /// All pages are zero.
    #[error("{name} has no page that is not zero: there is nothing to measure")]
    NothingToMeasure {
        /// The guest, as in [`Findings::source`](crate::Findings::source).
        name: String,
    },
    /// A stream of a guest with other pages.
    #[error("{} has pages of {found} bytes, expected {PAGE}", path.display())]
    PageSize {
        /// The file.
        path: PathBuf,
        /// Bytes of its pages.
        found: usize,
    },
    /// A live process cannot be read.
    #[error(transparent)]
    Process(#[from] ProcessError),
    /// A stream whose pages are spread too wide to keep count of.
    #[error(transparent)]
    TooManyPages(#[from] TooManyPages),
    /// A delta in a stream is broken.
    #[error("xbzrle record of page {page}")]
    Xbzrle {
        /// Number of the page within its block.
        page: u64,
        /// What is wrong with it.
        source: XbzrleError,
    },
}

impl Error {
    /// The error and its causes, in one line.
    pub fn chain(&self) -> String {
        let mut text = self.to_string();
        let mut cause = std::error::Error::source(self);
        while let Some(error) = cause {
            text.push_str(": ");
            text.push_str(&error.to_string());
            cause = error.source();
        }
        text
    }
}
