//! Sockets between a virtual machine and its host.

use std::io::{self, ErrorKind};

use socket2::{Domain, SockAddr, Socket, Type};

use crate::dial::connect::connect;
use crate::endpoint::VSOCK_ANY;

/// Binds, for listening. Port 0 is any free one.
pub(crate) fn bind(cid: u32, port: u32) -> io::Result<Socket> {
    let socket = new_socket()?;
    // Port 0 is a port like others to the kernel.
    let port = if port == 0 { VSOCK_ANY } else { port };
    socket.bind(&SockAddr::vsock(cid, port))?;
    Ok(socket)
}

pub(crate) async fn dial(cid: u32, port: u32) -> io::Result<Socket> {
    if cid == VSOCK_ANY || port == 0 {
        let text = "any machine and port 0 are for listening, a source needs one of each";
        return Err(io::Error::new(ErrorKind::InvalidInput, text));
    }
    connect(new_socket()?, &SockAddr::vsock(cid, port)).await
}

fn new_socket() -> io::Result<Socket> {
    Socket::new(Domain::VSOCK, Type::STREAM, None).map_err(|error| match error.raw_os_error() {
        Some(libc::EAFNOSUPPORT) => {
            io::Error::new(ErrorKind::Unsupported, "the kernel has no vsock (module vsock)")
        }
        _ => error,
    })
}
