//! The state that a vhost-user back-end has of its own, through a socket that is made for it
//! (SET_DEVICE_STATE_FD). What it means only the back-end knows.

use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use vhost::vhost_user::message::FrontendReq;

use super::message::Connection;
use super::state::MAX_BACK_END;

/// Direction of a transfer.
const SAVE: u32 = 0;
const LOAD: u32 = 1;

/// The one phase that the protocol has: all rings are stopped.
const STOPPED: u32 = 0;

/// In the reply: the descriptor that was sent is the one that is used.
const OUR_DESCRIPTOR: u64 = 1 << 8;

/// All of it.
pub(super) fn save(connection: &Connection) -> io::Result<Vec<u8>> {
    let (mut ours, theirs) = begin(connection, SAVE)?;
    // The back-end has a copy of its own: with ours it would never end.
    drop(theirs);
    ours.set_read_timeout(Some(connection.timeout()))?;
    let mut state = Vec::new();
    let limit = MAX_BACK_END as u64;
    (&mut ours).take(limit + 1).read_to_end(&mut state)?;
    if state.len() > MAX_BACK_END {
        return Err(io::Error::other(format!("it has more than {MAX_BACK_END} bytes")));
    }
    check(connection)?;
    Ok(state)
}

/// Returns when the back-end has taken it.
pub(super) fn load(connection: &Connection, state: &[u8]) -> io::Result<()> {
    let (mut ours, theirs) = begin(connection, LOAD)?;
    drop(theirs);
    ours.set_write_timeout(Some(connection.timeout()))?;
    let sent = ours.write_all(state);
    // Its end is the end of the state.
    drop(ours);
    // A back-end that does not take it says why.
    check(connection).and(sent)
}

fn begin(connection: &Connection, direction: u32) -> io::Result<(UnixStream, UnixStream)> {
    let (ours, theirs) = UnixStream::pair()?;
    let body = [direction, STOPPED].map(u32::to_ne_bytes).concat();
    let request = FrontendReq::SET_DEVICE_STATE_FD;
    match connection.ask_u64_with(request, &body, &[theirs.as_raw_fd()])? {
        OUR_DESCRIPTOR => Ok((ours, theirs)),
        0 => Err(io::Error::other("the back-end wants another descriptor than the one it was given")),
        status => Err(io::Error::other(format!("the back-end refuses: status {status:#x}"))),
    }
}

fn check(connection: &Connection) -> io::Result<()> {
    match connection.ask_u64(FrontendReq::CHECK_DEVICE_STATE)? {
        0 => Ok(()),
        status => Err(io::Error::other(format!("the back-end has failed: status {status:#x}"))),
    }
}
