//! Connecting a socket that was set up before.

use std::io;

use socket2::{SockAddr, Socket};
use tokio::io::Interest;

use crate::sys::watch;

/// Connects `socket`, which is non-blocking afterwards. Must be called in a runtime.
pub(crate) async fn connect(socket: Socket, address: &SockAddr) -> io::Result<Socket> {
    socket.set_nonblocking(true)?;
    match socket.connect(address) {
        Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => {}
        outcome => return outcome.map(|()| socket),
    }
    let socket = watch(socket, Interest::WRITABLE)?;
    let _ = socket.writable().await?;
    match socket.get_ref().take_error()? {
        Some(error) => Err(error),
        None => Ok(socket.into_inner()),
    }
}
