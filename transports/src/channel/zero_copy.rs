//! What the kernel sends from our memory, and when it is done with it.

use std::io::{self, ErrorKind};
use std::os::fd::{AsRawFd, BorrowedFd};

use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::sockopt::socket_error;

use crate::Channel;
use crate::os::sys;

/// The account of one channel's sends with `MSG_ZEROCOPY`: the kernel says on the socket's error
/// queue when it has let go of the memory of each, and whether it has copied it after all.
///
/// Used by the one thread that sends on the channel.
#[derive(Debug)]
pub struct ZeroCopy {
    sends: u64,
    done: u64,
    copied: u64,
}

impl Channel {
    /// Has the channel's socket take `MSG_ZEROCOPY` on [`direct`](Self::direct).
    ///
    /// # Errors
    /// `Unsupported` unless the channel is plain TCP: other sockets cannot, and TLS would send what
    /// is not encrypted.
    pub fn zero_copy(&self) -> io::Result<ZeroCopy> {
        let refused = |why: &str| io::Error::new(ErrorKind::Unsupported, format!("no zero-copy send: {why}"));
        let socket = self.direct().ok_or_else(|| refused("the channel is not a plain socket"))?;
        sys::allow_zero_copy(socket).map_err(|error| refused(&error.to_string()))?;
        Ok(ZeroCopy { sends: 0, done: 0, copied: 0 })
    }
}

impl ZeroCopy {
    /// A call with `MSG_ZEROCOPY` has taken at least one byte.
    pub fn note_send(&mut self) {
        self.sends += 1;
    }

    /// Sends that the kernel still has memory of.
    pub fn outstanding(&self) -> u64 {
        self.sends.saturating_sub(self.done)
    }

    /// Sends so far.
    pub fn sends(&self) -> u64 {
        self.sends
    }

    /// Sends that the kernel has copied after all: they cost more than plain ones.
    pub fn copied(&self) -> u64 {
        self.copied
    }

    /// Takes note of what is done. Never waits.
    ///
    /// # Errors
    /// What the system says of the error queue.
    pub fn reap(&mut self, channel: &Channel) -> io::Result<()> {
        let Some(socket) = channel.direct() else { return Ok(()) };
        while self.outstanding() > 0 && self.take_notice(socket)? {}
        Ok(())
    }

    /// Waits until the kernel has let go of all memory.
    ///
    /// # Errors
    /// `TimedOut` if nothing is let go of for the channel's timeout, `ConnectionAborted` after a
    /// [`Closer`](crate::Closer), else what ended the connection.
    pub fn wait(&mut self, channel: &Channel) -> io::Result<()> {
        let Some(socket) = channel.direct() else { return Ok(()) };
        loop {
            let before = self.outstanding();
            self.reap(channel)?;
            if self.outstanding() == 0 {
                return Ok(());
            }
            let limit = channel.timeout()?.and_then(|limit| Timespec::try_from(limit).ok());
            let mut fds = [PollFd::from_borrowed_fd(socket, PollFlags::empty())];
            match poll(&mut fds, limit.as_ref()) {
                Ok(0) => return Err(self.explain(channel, ErrorKind::WouldBlock.into())),
                Ok(_) if self.outstanding() == before && !self.take_notice(socket)? => {
                    // Woken, and not by a notice: that was the connection's end.
                    let end = socket_error(socket)?.err().map(io::Error::from);
                    return Err(self.explain(channel, end.unwrap_or_else(|| ErrorKind::NotConnected.into())));
                }
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn explain(&self, channel: &Channel, error: io::Error) -> io::Error {
        let error = channel.explain(error);
        io::Error::new(error.kind(), format!("{} zero-copy sends are not done: {error}", self.outstanding()))
    }

    /// Takes one notice from the queue, of one send or several. False: there is none.
    fn take_notice(&mut self, socket: BorrowedFd<'_>) -> io::Result<bool> {
        let mut space = nix::cmsg_space!(libc::sock_extended_err, libc::sockaddr_in6);
        let flags = MsgFlags::MSG_ERRQUEUE | MsgFlags::MSG_DONTWAIT;
        let message = loop {
            match recvmsg::<()>(socket.as_raw_fd(), &mut [], Some(&mut space), flags) {
                Ok(message) => break message,
                Err(nix::errno::Errno::EINTR) => {}
                Err(nix::errno::Errno::EAGAIN) => return Ok(false),
                Err(error) => return Err(error.into()),
            }
        };
        for notice in message.cmsgs()? {
            if let ControlMessageOwned::Ipv4RecvErr(notice, _) | ControlMessageOwned::Ipv6RecvErr(notice, _) =
                notice
            {
                self.on_notice(&notice);
            }
        }
        Ok(true)
    }

    fn on_notice(&mut self, notice: &libc::sock_extended_err) {
        if notice.ee_errno != 0 || notice.ee_origin != ORIGIN_ZERO_COPY {
            return;
        }
        // Sends are numbered in 32 bits; a notice is for a range of them, both ends included.
        let count = u64::from(notice.ee_data.wrapping_sub(notice.ee_info)) + 1;
        self.done += count;
        if notice.ee_code & COPIED != 0 {
            self.copied += count;
        }
    }
}

/// `SO_EE_ORIGIN_ZEROCOPY`.
const ORIGIN_ZERO_COPY: u8 = 5;

/// `SO_EE_CODE_ZEROCOPY_COPIED`.
const COPIED: u8 = 1;

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsFd;
    use std::time::Duration;

    use rustix::net::{SendFlags, send};

    use super::*;
    use crate::testing::{LONG, spawn};

    /// `MSG_ZEROCOPY`, which rustix does not name.
    const ZERO_COPY: SendFlags = SendFlags::from_bits_retain(libc::MSG_ZEROCOPY as u32);

    fn pair() -> (Channel, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let one = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (one.try_into().unwrap(), listener.accept().unwrap().0)
    }

    fn send_some(channel: &Channel, account: &mut ZeroCopy) {
        assert!(send(channel.direct().unwrap().as_fd(), &[7; 65536], ZERO_COPY).unwrap() > 0);
        account.note_send();
    }

    #[test]
    fn every_send_is_done_in_the_end_and_loopback_copies() {
        let (channel, peer) = pair();
        channel.set_timeout(Some(LONG)).unwrap();
        let reading = spawn("zero-copy-peer", move || io::copy(&mut &peer, &mut io::sink()).unwrap());
        let mut account = channel.zero_copy().unwrap();
        for _ in 0..200 {
            send_some(&channel, &mut account);
            account.reap(&channel).unwrap();
        }
        account.wait(&channel).unwrap();
        assert_eq!((account.outstanding(), account.sends()), (0, 200));
        assert_eq!(account.copied(), 200);
        drop(channel);
        reading.join();
    }

    #[test]
    fn the_wait_ends_by_the_timeout_by_a_closer_and_by_the_peer() {
        let (channel, _peer) = pair();
        let mut account = channel.zero_copy().unwrap();
        channel.set_timeout(Some(Duration::from_millis(20))).unwrap();
        // Nothing was sent, so nothing will ever be done.
        account.note_send();
        let error = account.wait(&channel).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TimedOut);
        assert!(error.to_string().contains("1 zero-copy sends are not done"), "{error}");

        channel.set_timeout(None).unwrap();
        let closer = channel.closer();
        let waiting = spawn("zero-copy-wait", move || account.wait(&channel).unwrap_err().kind());
        waiting.until_asleep();
        closer.close();
        assert_eq!(waiting.join(), ErrorKind::ConnectionAborted);
    }

    #[test]
    fn only_tcp_can() {
        let (one, _other) = Channel::pair().unwrap();
        assert_eq!(one.zero_copy().unwrap_err().kind(), ErrorKind::Unsupported);
    }
}
