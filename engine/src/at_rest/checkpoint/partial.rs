//! The directory of a checkpoint in the making, `.NAME.partial-PID`, and what became of those that
//! were never finished.

use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

/// Locked for as long as its process makes a checkpoint in the directory. The kernel lets go of the
/// lock when the process is gone, however it ended; its number says less, since it means another
/// process in another container, and later.
#[derive(Debug)]
pub(super) struct Partial {
    #[expect(dead_code, reason = "held for its lock")]
    directory: File,
    /// For the removal, which opens the directory and one in it: a process that may open no more
    /// files must not leave a guest's RAM behind.
    spare: Vec<File>,
}

/// Directories that are open at once while one is removed.
const OPEN_IN_REMOVAL: usize = 2;

impl Partial {
    pub(super) fn make(path: &Path) -> io::Result<Self> {
        private_dir(path)?;
        Self::of(path).inspect_err(|_| {
            // It is empty, and its removal needs no descriptor.
            let _ = fs::remove_dir(path);
        })
    }

    fn of(path: &Path) -> io::Result<Self> {
        let directory = open(path)?;
        // A file system without locks: no other process can lock the directory in order to sweep
        // it, either.
        if let Err(error) = directory.try_lock() {
            tracing::debug!(%error, path = %path.display(), "no lock on the checkpoint in the making");
        }
        let spare = (0..OPEN_IN_REMOVAL).map(|_| directory.try_clone()).collect::<io::Result<_>>()?;
        Ok(Self { directory, spare })
    }

    /// Removes the directory at `path`, and all in it.
    pub(super) fn remove(&mut self, path: &Path) -> io::Result<()> {
        self.spare.clear();
        fs::remove_dir_all(path)
    }
}

/// The name beside the checkpoint `name`, of the process `pid`.
pub(super) fn name(name: &str, pid: &str) -> String {
    format!(".{name}.partial-{pid}")
}

/// A directory for its owner only: what is in it is a guest's RAM.
pub(super) fn private_dir(path: &Path) -> io::Result<()> {
    DirBuilder::new().mode(0o700).create(path)
}

/// Removes what processes that were killed have left of a checkpoint at `target`. A guest's RAM is
/// in it.
pub(super) fn sweep(target: &Path, file_name: &str) {
    let parent = target.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let Ok(entries) = fs::read_dir(parent) else { return };
    let prefix = name(file_name, "");
    for entry in entries.flatten() {
        let entry_name = entry.file_name();
        let pid = entry_name.to_str().and_then(|name| name.strip_prefix(&prefix)).unwrap_or_default();
        if pid.is_empty() || !pid.bytes().all(|byte| byte.is_ascii_digit()) {
            continue;
        }
        let path = entry.path();
        match remove_abandoned(&path) {
            Ok(true) => tracing::warn!(path = %path.display(), "removed what a killed process left behind"),
            Ok(false) => {}
            Err(error) => {
                tracing::warn!(%error, path = %path.display(), "a killed process has left this, remove it");
            }
        }
    }
}

/// False if a process still works in it.
fn remove_abandoned(path: &Path) -> io::Result<bool> {
    let directory = open(path)?;
    match directory.try_lock() {
        Ok(()) => fs::remove_dir_all(path).map(|()| true),
        Err(TryLockError::WouldBlock) => Ok(false),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

/// Never follows a symbolic link.
fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).custom_flags(libc::O_DIRECTORY | libc::O_NOFOLLOW).open(path)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::CheckpointWriter;

    #[test]
    fn what_a_killed_process_left_is_removed_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        // One has the number of a process that lives: this one's parent.
        let alive = format!(".ck.partial-{}", std::os::unix::process::parent_id());
        let abandoned = [".ck.partial-1", ".ck.partial-4194305", &alive];
        let others = [".ck.partial-x", ".other.partial-1", "ck.partial-1"];
        for name in abandoned.iter().chain(&others) {
            fs::create_dir(path(name)).unwrap();
            fs::write(path(name).join("ram"), b"secret").unwrap();
        }
        let in_use = Partial::make(&path(".ck.partial-2")).unwrap();
        std::os::unix::fs::symlink(path("ck.partial-1"), path(".ck.partial-3")).unwrap();

        let writer = CheckpointWriter::create(&path("ck")).unwrap();
        abandoned.iter().for_each(|name| assert!(!path(name).exists(), "{name}"));
        for name in others.iter().chain(&[".ck.partial-2", ".ck.partial-3"]) {
            assert!(path(name).exists(), "{name}");
        }
        drop((writer, in_use));
    }

    #[test]
    fn a_writer_of_the_same_process_is_not_swept_away() {
        let folder = tempfile::tempdir().unwrap();
        let first = CheckpointWriter::create(&folder.path().join("ck")).unwrap();
        CheckpointWriter::create(&folder.path().join("ck")).unwrap_err();
        let own = folder.path().join(name("ck", &std::process::id().to_string()));
        assert_eq!(own.metadata().unwrap().permissions().mode() & 0o777, 0o700);
        assert_eq!(own.join("ram").metadata().unwrap().permissions().mode() & 0o777, 0o700);
        drop(first);
        assert!(!own.exists());
    }
}
