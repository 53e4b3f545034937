//! How sockets are named, tuned and turned into channels.

use std::io;
use std::net::SocketAddr;
use std::path::Path;

use socket2::{SockAddr, Socket};

use crate::{Channel, SocketOptions};

/// Longest path of a unix socket, in bytes: `sun_path` less the final NUL.
const MAX_UNIX_PATH: usize = if cfg!(target_os = "linux") { 107 } else { 103 };

/// Makes a connected socket a channel. `first` is what was received on it already.
pub(crate) fn into_channel(
    socket: Socket,
    peer: String,
    first: &[u8],
    options: &SocketOptions,
) -> io::Result<Channel> {
    socket.set_nonblocking(false)?;
    tune(&socket, options)?;
    Ok(Channel::new(socket, peer, first))
}

/// Sets the options of a socket that is to carry a channel.
pub(crate) fn tune(socket: &Socket, options: &SocketOptions) -> io::Result<()> {
    if socket.local_addr()?.as_socket().is_some() { options.tune_tcp(socket) } else { Ok(()) }
}

/// The name of the other end of a connected socket, in the form of a URI.
pub(crate) fn peer_name(socket: &Socket) -> io::Result<String> {
    let address = socket.peer_addr()?;
    Ok(match address.as_socket() {
        Some(address) => tcp_name(address),
        None => match address.as_vsock_address() {
            Some(address) => vsock_name(address),
            None => unix_name(address.as_pathname()),
        },
    })
}

/// A v4 client of a v6 listener is written as what it is.
pub(crate) fn tcp_name(address: SocketAddr) -> String {
    format!("tcp:{}", SocketAddr::new(address.ip().to_canonical(), address.port()))
}

pub(crate) fn vsock_name((cid, port): (u32, u32)) -> String {
    format!("vsock:{cid}:{port}")
}

/// Only one end of a unix connection has a path; the other goes by the same name.
pub(crate) fn unix_name(path: Option<&Path>) -> String {
    match path {
        Some(path) => format!("unix:{}", path.display()),
        None => "unix:(unnamed)".to_owned(),
    }
}

/// The address of a unix socket, with an error that names the limit.
pub(crate) fn unix_address(path: &Path) -> io::Result<SockAddr> {
    let len = path.as_os_str().len();
    if len > MAX_UNIX_PATH {
        let text = format!("socket path of {len} bytes, limit is {MAX_UNIX_PATH}");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    SockAddr::unix(path)
}

/// Whether a TCP socket is connected to itself: dialling a free local port of the ephemeral range
/// can choose that very port as its own.
pub(crate) fn is_connected_to_itself(socket: &Socket) -> io::Result<bool> {
    let (own, peer) = (socket.local_addr()?, socket.peer_addr()?);
    Ok(own.as_socket().is_some() && own.as_socket() == peer.as_socket())
}
