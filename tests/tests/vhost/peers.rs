//! Back-ends that others wrote, as processes.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Stdio};

use multifd_tests::Process;
use multifd_tests::virtio::Disk;

const DAEMON: &str = "qemu-storage-daemon";

/// Why there is no qemu-storage-daemon, if so.
pub fn missing_storage_daemon() -> Option<String> {
    let version = Command::new(DAEMON).arg("--version").output();
    version.err().map(|error| format!("{DAEMON}: {error} (tests/peers/install gets it)"))
}

pub use multifd_tests::skip::peers_dir as dir;

/// An empty disk of the driver's length.
pub fn disk_image(path: &Path) {
    File::create(path).unwrap().set_len(Disk::LEN as u64).unwrap();
}

/// A qemu-storage-daemon that serves `image`, and a connection to it. It inherits the socket that
/// it listens on: nothing is waited for.
pub fn storage_daemon(name: &str, image: &Path, socket: &Path) -> (Process, UnixStream) {
    let listener = UnixListener::bind(socket).unwrap();
    let stream = UnixStream::connect(socket).unwrap();
    let mut command = Command::new(DAEMON);
    command
        .arg("--blockdev")
        .arg(format!("driver=file,node-name=f0,locking=off,filename={}", image.display()))
        .args(["--export", "type=vhost-user-blk,id=e0,node-name=f0,writable=on,addr.type=fd,addr.str=0"])
        .stdin(Stdio::from(OwnedFd::from(listener)))
        .stdout(Stdio::null());
    (Process::spawn(name, &mut command).unwrap(), stream)
}
