//! Connecting a socket that was set up before.

use std::io;
use std::sync::Arc;

use rustix::event::PollFlags;
use socket2::{SockAddr, Socket};

use crate::accept::client::into_socket;
use crate::os::event_loop::ready;

/// Connects `socket`, which is non-blocking afterwards.
pub(crate) async fn connect(socket: Socket, address: &SockAddr) -> io::Result<Socket> {
    socket.set_nonblocking(true)?;
    match socket.connect(address) {
        Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => {}
        outcome => return outcome.map(|()| socket),
    }
    let socket = Arc::new(socket);
    ready(&socket, PollFlags::OUT).await?;
    match socket.take_error()? {
        Some(error) => Err(error),
        None => into_socket(socket),
    }
}
