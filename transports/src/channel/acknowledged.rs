//! Confirmation that the peer has read the last bytes sent.

use std::io::{self, ErrorKind};
use std::os::fd::AsFd as _;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use socket2::Socket;

use crate::Channel;
use crate::channel::stream::Stream;
use crate::os::sys;

/// Interval at which a connection that is about to end is polled: the kernel reports no event for
/// TCP's acknowledgements.
const POLL_INTERVAL: Duration = Duration::from_millis(5);

impl Channel {
    /// Checks that the peer has not ended the connection, without waiting. Always `Ok` for pipes
    /// and files.
    ///
    /// # Errors
    /// `ConnectionAborted` if the peer has ended what it sends, otherwise the system's error for a
    /// connection that broke.
    pub fn check_peer_is_there(&self) -> io::Result<()> {
        let Some(socket) = self.socket() else { return Ok(()) };
        let mut byte = [std::mem::MaybeUninit::uninit()];
        loop {
            match socket.recv_with_flags(&mut byte, libc::MSG_PEEK | libc::MSG_DONTWAIT) {
                Ok(0) => {
                    self.check_end()?;
                    return Err(io::Error::new(ErrorKind::ConnectionAborted, "the peer has closed it"));
                }
                Ok(_) => return Ok(()),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(self.explain(error)),
            }
        }
    }

    /// Waits until the peer ends the connection, and checks that it had read all that was sent.
    /// Also `Ok` if it does not end it within `limit`, and always for pipes and files. Bytes that
    /// it still sends are dropped.
    ///
    /// # Errors
    /// The system's error for a connection that was ended with unread bytes, `ConnectionReset` if
    /// the bytes were not taken.
    pub fn confirm_received(&self, limit: Duration) -> io::Result<()> {
        let Some(socket) = self.socket() else { return Ok(()) };
        let deadline = Instant::now() + limit;
        let before = self.timeout()?;
        let ended = self.drop_until_end(deadline);
        self.set_timeout(before)?;
        if !ended? {
            return Ok(());
        }
        // The peer may have ended the connection before our last bytes arrived: then a reset
        // answers them.
        loop {
            if let Some(error) = socket.take_error()? {
                return Err(self.explain(error));
            }
            // A kind of socket that does not know has nothing more to say.
            let Ok(left @ 1..) = sys::unread(socket.as_fd()) else { return Ok(()) };
            let remaining = deadline.saturating_duration_since(Instant::now()).min(POLL_INTERVAL);
            if remaining.is_zero() || socket.local_addr()?.is_unix() {
                let text = format!("{left} bytes were not read");
                return Err(io::Error::new(ErrorKind::ConnectionReset, text));
            }
            let wait = Timespec::try_from(remaining).map_err(|_| io::Error::from(ErrorKind::InvalidInput))?;
            poll(&mut [PollFd::new(socket, PollFlags::empty())], Some(&wait))?;
        }
    }

    /// False if the peer goes on beyond the deadline.
    fn drop_until_end(&self, deadline: Instant) -> io::Result<bool> {
        let mut dropped = [0; 256];
        loop {
            let remaining = deadline.saturating_duration_since(Instant::now());
            if remaining.is_zero() {
                return Ok(false);
            }
            self.set_timeout(Some(remaining))?;
            match self.recv(&mut dropped) {
                Ok(0) => return Ok(true),
                Ok(_) => {}
                // TLS that was ended by the end of the connection, as QEMU does on main.
                Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(true),
                Err(error) if error.kind() == ErrorKind::TimedOut => return Ok(false),
                // Closed on this side, by another thread: nothing is known.
                Err(_) if self.is_closed() => return Ok(false),
                Err(error) => return Err(error),
            }
        }
    }

    pub(super) fn socket(&self) -> Option<&Socket> {
        match self.stream() {
            Stream::Socket(socket) => Some(socket),
            Stream::Tls(tls) => Some(tls.socket()),
            Stream::File(_) | Stream::Pipe(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;
    use std::net::{Shutdown, TcpListener, TcpStream};
    use std::os::unix::net::UnixStream;

    use super::*;

    const SOON: Duration = Duration::from_secs(20);

    fn tcp() -> (Channel, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let theirs = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (listener.accept().unwrap().0.try_into().unwrap(), theirs)
    }

    fn unix() -> (Channel, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (ours.try_into().unwrap(), theirs)
    }

    #[test]
    fn a_peer_that_has_read_everything_has_heard() {
        let (ours, mut theirs) = unix();
        ours.send_all(b"word").unwrap();
        ours.check_peer_is_there().unwrap();
        theirs.read_exact(&mut [0; 4]).unwrap();
        drop(theirs);
        ours.confirm_received(SOON).unwrap();
        let (ours, mut theirs) = tcp();
        ours.send_all(b"word").unwrap();
        ours.check_peer_is_there().unwrap();
        theirs.read_exact(&mut [0; 4]).unwrap();
        drop(theirs);
        ours.confirm_received(SOON).unwrap();
    }

    #[test]
    fn a_peer_that_closes_with_the_word_unread_has_not_heard() {
        let (ours, theirs) = unix();
        ours.send_all(b"word").unwrap();
        drop(theirs);
        ours.confirm_received(SOON).unwrap_err();
        let (ours, theirs) = unix();
        ours.send_all(b"word").unwrap();
        theirs.shutdown(Shutdown::Both).unwrap();
        ours.confirm_received(SOON).unwrap_err();
        let (ours, theirs) = tcp();
        ours.send_all(b"word").unwrap();
        // In its queue, and left there.
        theirs.peek(&mut [0; 1]).unwrap();
        drop(theirs);
        ours.confirm_received(SOON).unwrap_err();
    }

    #[test]
    fn a_peer_that_was_gone_before_the_word_is_noticed() {
        let (ours, theirs) = tcp();
        drop(theirs);
        // Its end is in our queue once this returns.
        assert_eq!(ours.recv(&mut [0; 1]).unwrap(), 0);
        assert_eq!(ours.check_peer_is_there().unwrap_err().kind(), ErrorKind::ConnectionAborted);
        ours.send_all(b"word").unwrap();
        ours.confirm_received(SOON).unwrap_err();
    }

    #[test]
    fn a_peer_that_stays_is_waited_for_no_longer_than_the_limit() {
        let (ours, _theirs) = unix();
        ours.send_all(b"word").unwrap();
        ours.confirm_received(Duration::from_millis(10)).unwrap();
    }
}
