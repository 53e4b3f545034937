//! What cannot be written or read, as a user meets it: an error that says why, exit code 1, and
//! nothing left behind.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use multifd_tests::peer::{Memory, Recorder, Style, Trial};
use multifd_tests::process::Signal;
use multifd_tests::{Multifd, Outcome, Scratch, skip};
use rustix::fs::{CWD, FileType, mknodat};

use super::fixture::{Disk, SOON, Way, fails, misused};

const PLAIN: Way = Way { mapped: false, workers: 0, offset: 0, direct: false };
const MAPPED: Way = Way { mapped: true, ..PLAIN };

/// A checkpoint of a guest of 8 MiB without a zero page in it.
fn checkpoint() -> Outcome<Trial> {
    let trial = Trial::unix()?.patient(std::time::Duration::from_secs(10));
    let mut memory = Memory::zero(&[("pc.ram", 2048)]);
    for at in memory.all() {
        memory.set(at, &[u8::try_from(at.page % 255)? + 1; 4096]);
    }
    let recording = Recorder::migration(Style::default(), &mut memory);
    trial.write_checkpoint(&recording)?.result?;
    Ok(trial)
}

/// A small file system of its own. Unmounted on drop.
struct Mount(PathBuf);

impl Mount {
    /// `None`: this needs root.
    fn new(at: PathBuf, kind: &str, options: &str) -> Outcome<Option<Self>> {
        fs::create_dir(&at)?;
        let status = Command::new("mount").args(["-t", kind, "-o", options, kind]).arg(&at).output()?.status;
        Ok(status.success().then_some(Self(at)))
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        // A test that fails has said more than this could.
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}

#[test]
fn a_disk_that_is_full() -> Outcome {
    let (scratch, trial) = (Scratch::new()?, checkpoint()?);
    let Some(full) = Mount::new(scratch.path("full"), "tmpfs", "size=4m")? else {
        skip!("a file system of a test's own needs root");
    };
    let file = full.0.join("snapshot");
    for way in [PLAIN, MAPPED, Way { workers: 2, ..MAPPED }] {
        fails(way.send(&trial.checkpoint(), &file)?, &["No space left", "snapshot"], &[&file])?;
        // What was there before the stream stays; the stream does not.
        let way = Way { offset: 4096, ..way };
        fs::write(&file, [7; 5000])?;
        fails(way.send(&trial.checkpoint(), &file)?, &["No space left"], &[])?;
        assert_eq!(fs::read(&file)?, [7; 4096]);
        fs::remove_file(&file)?;
    }
    // No room for the checkpoint.
    let snapshot = scratch.path("snapshot");
    for way in [PLAIN, MAPPED] {
        way.sent(&trial.checkpoint(), &snapshot)?;
        let out = full.0.join("checkpoint");
        let said = fails(way.receive(&snapshot, &out)?, &["pc.ram"], &[&out])?;
        assert!(said.contains("No space left") || said.contains("no room behind them"), "{said}");
        assert!(fs::read_dir(&full.0)?.next().is_none(), "something is left after {said}");
    }
    Ok(())
}

#[test]
fn a_file_system_without_direct_io() -> Outcome {
    let (scratch, trial) = (Scratch::new()?, checkpoint()?);
    let Some(memory) = Mount::new(scratch.path("memory"), "ramfs", "mode=700")? else {
        skip!("a file system of a test's own needs root");
    };
    let (file, out) = (memory.0.join("snapshot"), scratch.path("out"));
    let direct = Way { direct: true, ..MAPPED };
    let words = ["its file system refuses direct I/O (O_DIRECT)", "snapshot"];
    fails(direct.send(&trial.checkpoint(), &file)?, &words, &[&file])?;
    MAPPED.sent(&trial.checkpoint(), &file)?;
    fails(direct.receive(&file, &out)?, &words, &[&out])?;
    MAPPED.received(&file, &out)?;
    Ok(())
}

#[test]
fn a_save_that_is_interrupted_leaves_nothing() -> Outcome {
    let (scratch, trial) = (Scratch::new()?, checkpoint()?);
    let file = scratch.path("snapshot");
    for mapped in ["--mapped-ram", "--no-return-path"] {
        let (from, to) = (trial.checkpoint().display().to_string(), PLAIN.uri(&file));
        let slow = ["send", &from, &to, mapped, "--max-bandwidth", "1MiB/s", "--json"];
        let mut send = Multifd::spawn("send", slow)?;
        let begun = Instant::now();
        while !file.exists() {
            assert!(begun.elapsed() < SOON, "no file");
            std::thread::yield_now();
        }
        send.signal(Signal::INT)?;
        assert_eq!(send.wait(SOON)?.code(), Some(130));
        assert!(!file.exists());
    }
    Ok(())
}

#[test]
fn what_is_no_regular_file() -> Outcome {
    let (scratch, trial) = (Scratch::new()?, checkpoint()?);
    let (fifo, out) = (scratch.path("fifo"), scratch.path("out"));
    mknodat(CWD, &fifo, FileType::Fifo, 0o600.into(), 0)?;
    for (path, name) in
        [(scratch.dir(), "a directory"), (&fifo, "a named pipe"), (Path::new("/dev/null"), "a device")]
    {
        let says = format!("{name}, expected a regular file");
        for way in [PLAIN, MAPPED] {
            fails(way.send(&trial.checkpoint(), path)?, &[&says], &[])?;
            fails(way.receive(path, &out)?, &[&says], &[&out])?;
        }
        assert!(path.exists());
    }
    Ok(())
}

#[test]
fn files_that_hold_no_stream() -> Outcome {
    let (scratch, trial) = (Scratch::new()?, checkpoint()?);
    let (file, out) = (scratch.path("file"), scratch.path("out"));
    let refused =
        |way: Way, says: &str| fails(way.receive(&file, &out)?, &[says, "file:"], &[&out]).map(drop);
    refused(PLAIN, "No such file")?;
    File::create(&file)?;
    refused(PLAIN, "the file ends at byte 0")?;
    refused(Way { offset: 1, ..PLAIN }, "offset 1, the file has 0 bytes")?;
    fs::write(&file, "QEV")?;
    refused(PLAIN, "the file ends at byte 3")?;
    fs::write(&file, [0x1f, 0x8b, 8, 0, 0])?;
    refused(PLAIN, "packed by gzip, unpack it first")?;
    let header = [b"LibvirtQemudSave", &[2, 0, 0, 0, 4, 16, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0][..]].concat();
    fs::write(&file, &header)?;
    refused(
        PLAIN,
        "a libvirt save image (virsh save): its stream begins at byte 4192, file:FILE,offset=4192",
    )?;
    for command in ["inspect", "tune", "send"] {
        let path = file.display().to_string();
        let mut multifd = Multifd::spawn(
            command,
            [command, &path, "tcp:127.0.0.1:1"].iter().take(if command == "send" { 3 } else { 2 }),
        )?;
        assert_eq!(multifd.wait(SOON)?.code(), Some(1), "{command}");
        let said = multifd.stderr();
        said.wait_for("file:FILE,offset=4192", 0, SOON)?;
    }
    fs::write(&file, b"QFI\xfb\0\0\0\x03")?;
    refused(PLAIN, "a qcow2 image")?;
    fs::write(&file, b"some text")?;
    refused(PLAIN, "magic 0x736f6d65, expected 0x5145564d")?;
    fs::write(&file, [0x11, 0x22, 0x33, 0x44, 0])?;
    refused(PLAIN, "what went over a parallel channel")?;

    PLAIN.sent(&trial.checkpoint(), &file)?;
    refused(Way { offset: 4, ..PLAIN }, "magic 0x00000003")?;
    refused(Way { workers: 2, ..PLAIN }, "a plain stream in one direction, 2 channels were asked for")?;
    refused(Way { direct: true, ..PLAIN }, "a plain stream, direct I/O was asked for")
}

#[test]
fn ways_that_a_file_does_not_know() -> Outcome {
    let (disk, trial) = (Disk::new()?, checkpoint()?);
    let file = disk.path("snapshot");
    let words = ["parallel channels to a file need mapped-ram"];
    misused(Way { workers: 2, ..PLAIN }.send(&trial.checkpoint(), &file)?, &words, &[&file])?;
    // An older snapshot must not be lost to a typo.
    fs::write(&file, "precious")?;
    misused(Way { workers: 2, ..PLAIN }.send(&trial.checkpoint(), &file)?, &words, &[])?;
    assert_eq!(fs::read(&file)?, b"precious");
    Ok(())
}
