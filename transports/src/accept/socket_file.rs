//! The file by which a unix listener is found.

use std::fs::{self, Metadata};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use socket2::{Domain, Socket, Type};

use crate::os::socket::unix_address;

/// A socket file of ours; dropping it removes the file, unless another has taken its place.
#[derive(Debug)]
pub(crate) struct SocketFile {
    path: PathBuf,
    identity: (u64, u64),
}

impl SocketFile {
    /// Binds a stream socket to `path`. A socket file that no socket is bound to is replaced; a
    /// live one and anything else stays untouched, and is an error.
    pub(crate) fn bind(path: &Path) -> io::Result<(Socket, Self)> {
        let address = unix_address(path)?;
        let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
        match socket.bind(&address) {
            Err(error) if error.kind() == ErrorKind::AddrInUse => {
                remove_stale(path)?;
                socket.bind(&address)?;
            }
            outcome => outcome?,
        }
        let identity = identity(&fs::symlink_metadata(path)?);
        Ok((socket, Self { path: path.to_owned(), identity }))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if fs::symlink_metadata(&self.path).is_ok_and(|found| identity(&found) == self.identity) {
            // Nothing is lost if it stays: the next listener finds it stale.
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn identity(metadata: &Metadata) -> (u64, u64) {
    (metadata.dev(), metadata.ino())
}

fn remove_stale(path: &Path) -> io::Result<()> {
    if !fs::symlink_metadata(path)?.file_type().is_socket() {
        return Err(io::Error::new(ErrorKind::AddrInUse, "the path is taken, and not by a socket"));
    }
    if is_alive(path)? {
        return Err(io::Error::new(ErrorKind::AddrInUse, "another process listens there"));
    }
    fs::remove_file(path)
}

/// Whether any socket is still bound to the file.
///
/// Asked with a datagram socket: a live stream socket refuses it for its type and accepts nothing,
/// where a stream connection that is opened and dropped would end the incoming migration of a QEMU.
fn is_alive(path: &Path) -> io::Result<bool> {
    let probe = Socket::new(Domain::UNIX, Type::DGRAM, None)?;
    match probe.connect(&unix_address(path)?) {
        Err(error) => Ok(error.kind() != ErrorKind::ConnectionRefused),
        Ok(()) => Ok(true),
    }
}
