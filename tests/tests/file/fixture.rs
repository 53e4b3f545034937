//! Files on a disk, the commands that write and read them, and what they say.

use std::fs::{self, File, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use multifd_tests::{CheckpointFiles, CommandReport, Multifd, Outcome, Process};
use tempfile::TempDir;

/// Longest wait for anything that must happen: generous, for a busy machine.
pub(crate) const SOON: Duration = Duration::from_secs(60);

/// A folder on a disk: tmpfs, where other tests have theirs, is no place for direct I/O.
pub(crate) struct Disk(TempDir);

impl Disk {
    pub(crate) fn new() -> Outcome<Self> {
        Ok(Self(TempDir::with_prefix_in("file-", env!("CARGO_TARGET_TMPDIR"))?))
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Why direct I/O cannot be tested here, if so.
    pub(crate) fn no_direct_io(&self) -> Outcome<Option<String>> {
        let path = self.path("direct");
        File::create(&path)?;
        let direct = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(&path);
        Ok(direct.err().map(|error| format!("no direct I/O in {}: {error}", path.display())))
    }
}

/// How a guest goes to a file.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Way {
    pub(crate) mapped: bool,
    /// Threads; 0: none but the main one.
    pub(crate) workers: u8,
    pub(crate) offset: u64,
    pub(crate) direct: bool,
}

/// What is before a stream that does not begin at the file's begin.
const BEFORE: &[u8] = b"another program's header";

impl Way {
    pub(crate) fn uri(self, path: &Path) -> String {
        match self.offset {
            0 => format!("file:{}", path.display()),
            offset => format!("file:{},offset={offset:#x}", path.display()),
        }
    }

    /// Makes the file when another program has a header before the stream, and more than the stream
    /// will have.
    pub(crate) fn prepare(self, path: &Path) -> Outcome {
        if self.offset > 0 {
            let mut file = File::create(path)?;
            file.write_all(BEFORE)?;
            file.write_all_at(b"too much", self.offset + (1 << 30))?;
        }
        Ok(())
    }

    /// What was before the stream is still there, and nothing of what was behind it.
    pub(crate) fn check(self, path: &Path) -> Outcome {
        if self.offset > 0 {
            let file = File::open(path)?;
            let mut before = vec![0; BEFORE.len()];
            file.read_exact_at(&mut before, 0)?;
            assert_eq!(before, BEFORE, "{self:?}");
            assert!(file.metadata()?.len() < self.offset + (1 << 30), "{self:?}");
        }
        Ok(())
    }

    /// `multifd send CHECKPOINT file:PATH`
    pub(crate) fn send(self, checkpoint: &Path, path: &Path) -> Outcome<Process> {
        let mut arguments =
            vec!["send".into(), checkpoint.display().to_string(), self.uri(path), "--json".into()];
        arguments.extend(self.mapped.then(|| "--mapped-ram".into()));
        self.flags(&mut arguments);
        Multifd::spawn("send", arguments)
    }

    /// `multifd receive file:PATH --out CHECKPOINT`
    pub(crate) fn receive(self, path: &Path, checkpoint: &Path) -> Outcome<Process> {
        let out = checkpoint.display().to_string();
        let mut arguments = vec!["receive".into(), self.uri(path), "--out".into(), out, "--json".into()];
        // A disk that is too small for all of RAM is no reason to refuse it here.
        arguments.extend(["--max-ram".into(), "0".into()]);
        self.flags(&mut arguments);
        Multifd::spawn("receive", arguments)
    }

    fn flags(self, arguments: &mut Vec<String>) {
        if self.workers > 0 {
            arguments.extend(["--channels".into(), self.workers.to_string()]);
        }
        arguments.extend(self.direct.then(|| "--direct-io".into()));
    }

    pub(crate) fn sent(self, checkpoint: &Path, path: &Path) -> Outcome<CommandReport> {
        let mut send = self.send(checkpoint, path)?;
        send.wait_success(SOON)?;
        CommandReport::by(&send)
    }

    pub(crate) fn received(self, path: &Path, checkpoint: &Path) -> Outcome<CheckpointFiles> {
        let mut receive = self.receive(path, checkpoint)?;
        receive.wait_success(SOON)?;
        assert_eq!(CommandReport::by(&receive)?.text("status")?, "completed");
        CheckpointFiles::open(checkpoint)
    }
}

/// The command ends with code 1, says all of `words`, and leaves none of `files`.
pub(crate) fn fails(process: Process, words: &[&str], files: &[&Path]) -> Outcome<String> {
    ends(process, 1, words, files)
}

/// The same for settings that cannot work, code 2.
pub(crate) fn misused(process: Process, words: &[&str], files: &[&Path]) -> Outcome<String> {
    ends(process, 2, words, files)
}

fn ends(mut process: Process, code: i32, words: &[&str], files: &[&Path]) -> Outcome<String> {
    let status = process.wait(SOON)?;
    let report = CommandReport::by(&process)?;
    let said = report.text("error")?.to_owned();
    assert_eq!(status.code(), Some(code), "{said}");
    assert_eq!(report.text("status")?, "failed");
    for word in words {
        assert!(said.contains(word), "{said:?} does not say {word:?}");
    }
    for file in files {
        assert!(fs::symlink_metadata(file).is_err(), "{} is left after {said:?}", file.display());
    }
    Ok(said)
}
