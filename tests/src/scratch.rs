//! Where a test keeps its RAM files and sockets.

use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::{During, Outcome};

/// A folder in memory (`/dev/shm`, or the temporary folder of a machine without it); gone on drop.
#[derive(Debug)]
pub struct Scratch(TempDir);

impl Scratch {
    /// Makes a folder of its own for this test.
    ///
    /// # Errors
    /// When the folder cannot be made.
    pub fn new() -> Outcome<Self> {
        let shm = Path::new("/dev/shm");
        let parent = if shm.is_dir() { shm.to_path_buf() } else { std::env::temp_dir() };
        let dir = tempfile::Builder::new().prefix("multifd-test-").tempdir_in(&parent);
        Ok(Self(dir.during(format_args!("scratch folder in {}", parent.display()))?))
    }

    /// The folder itself.
    pub fn dir(&self) -> &Path {
        self.0.path()
    }

    /// The path of `name` in the folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// `unix:` and the path of `name`: what QEMU and `multifd` connect to or listen on.
    pub fn unix_uri(&self, name: &str) -> String {
        format!("unix:{}", self.path(name).display())
    }
}
