//! A qemu-storage-daemon with one disk, and the vhost-user connection to it.

use std::io::ErrorKind;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use multifd_engine::vhost::VhostUser;
use multifd_engine::vhost::vhost::VhostBackend;
use multifd_engine::vhost::vhost::vhost_user::message::VhostUserProtocolFeatures;
use multifd_engine::vhost::vhost::vhost_user::{Frontend, VhostUserFrontend};

use super::virtio::Result;

/// Ends with this value.
pub(super) struct Daemon(Child);

impl Daemon {
    /// A daemon that serves `image`, and what speaks to it. None: there is no such program.
    pub(super) fn start(image: &Path, socket: &Path) -> Result<Option<(Self, VhostUser)>> {
        // The daemon inherits the socket that it listens on: the connection waits there for it.
        let listener = UnixListener::bind(socket)?;
        let stream = UnixStream::connect(socket)?;
        let daemon = Command::new("qemu-storage-daemon")
            .arg("--blockdev")
            // Two daemons have the disk open, as on shared storage; one at a time uses it.
            .arg(format!("driver=file,node-name=disk,locking=off,filename={}", image.display()))
            .args([
                "--export",
                "type=vhost-user-blk,id=export,node-name=disk,writable=on,addr.type=fd,addr.str=0",
            ])
            .stdin(Stdio::from(OwnedFd::from(listener)))
            .spawn();
        match daemon {
            Ok(child) => Ok(Some((Self(child), negotiate(stream)?))),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

/// The embedder's part: protocol features. Everything after that is the engine's.
fn negotiate(stream: UnixStream) -> Result<VhostUser> {
    let mut front_end = Frontend::from_stream(stream, 1);
    front_end.set_owner()?;
    front_end.get_features()?;
    let wanted = VhostUserProtocolFeatures::LOG_SHMFD | VhostUserProtocolFeatures::REPLY_ACK;
    let features = front_end.get_protocol_features()? & wanted;
    front_end.set_protocol_features(features)?;
    Ok(VhostUser::new(&front_end, features)?)
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // Both fail only for a process that has ended.
        _ = self.0.kill();
        _ = self.0.wait();
    }
}
