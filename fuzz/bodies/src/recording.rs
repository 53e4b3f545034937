//! A stream in a file: as a recording, and received.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use multifd_engine::{Destination, Recording};
use multifd_transports::Endpoint;
use rustix::fs::{MemfdFlags, memfd_create};

use crate::Input;
use crate::destination::{AnyMemory, refused};
use crate::wire::visit;

/// Bytes of a file at most.
const MAX_FILE: u32 = 4 << 20;

/// A file in memory: each page and device of it as a [`Recording`], and a destination that reads
/// it.
///
/// Input: pieces of a be32 (where in the file, modulo 4 MiB) and counted bytes. Between them are
/// holes. True: the recording could be read to its end, and a whole guest has arrived.
pub fn recording(input: &[u8], timeout: Duration) -> bool {
    let file = memfd_create("stream", MemfdFlags::CLOEXEC).expect("a file in memory");
    let file = File::from(file);
    write(&file, Input(input)).expect("memory for a file");
    let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
    let recorded = read(&path).inspect_err(refused);
    let endpoint = Endpoint::File { path, offset: 0 };
    let destination = Destination::builder(AnyMemory).timeout(timeout).listen(&endpoint);
    let received = destination.and_then(|there| there.receive()?.accept()).inspect_err(refused);
    recorded.is_ok() && received.is_ok()
}

fn write(file: &File, mut input: Input<'_>) -> io::Result<()> {
    while !input.is_empty() {
        let at = input.u32() % MAX_FILE;
        file.write_all_at(input.counted(), at.into())?;
    }
    Ok(())
}

fn read(path: &Path) -> multifd_engine::Result<()> {
    let recording = Recording::open(path)?;
    let mut pages = recording.pages();
    while let Some(record) = pages.next_page()? {
        assert!(record.block < recording.blocks().len(), "a page of no block");
    }
    let devices = pages.devices()?;
    for section in &devices.sections {
        devices.structure(section).map(visit);
    }
    Ok(())
}
