//! Which sockets this process has open: told by the socket, not by a count, since other tests have
//! theirs.
#![allow(clippy::unwrap_used, reason = "test code may panic")]

use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

/// What stands for a socket in the list of open files, for as long as it is there.
pub(crate) fn socket(stream: &UnixStream) -> PathBuf {
    std::fs::read_link(format!("/proc/self/fd/{}", stream.as_raw_fd())).unwrap()
}

pub(crate) fn is_open(socket: &PathBuf) -> bool {
    let files = std::fs::read_dir("/proc/self/fd").unwrap();
    files.flatten().filter_map(|file| std::fs::read_link(file.path()).ok()).any(|open| open == *socket)
}
