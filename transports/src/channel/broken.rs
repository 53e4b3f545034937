//! The reason for which a connection broke, the same for every thread that uses it.
//!
//! When TCP gives a connection up, the kernel hands its error to one call, whichever is first;
//! every other call on the same socket gets a broken pipe, or the end of what is received.

use std::fmt;
use std::io::{self, ErrorKind};
use std::os::fd::AsFd as _;

use crate::Channel;
use crate::os::sys;

/// An error that ends a connection, and that the system gives to one call only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Broken {
    /// The peer acknowledges nothing any more; the system's number.
    Vanished(i32),
    /// Anything else: the peer's reset.
    Otherwise(i32),
}

/// The error within an [`io::Error`] of a connection whose peer acknowledges nothing any more: its
/// machine or the network is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerVanished(i32);

impl PeerVanished {
    /// Whether this is the reason for `error`.
    pub fn is_in(error: &io::Error) -> bool {
        error.get_ref().is_some_and(|reason| reason.is::<Self>())
    }
}

impl fmt::Display for PeerVanished {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let error = io::Error::from_raw_os_error(self.0);
        write!(f, "the peer has vanished, it acknowledges nothing any more: {error}")
    }
}

impl std::error::Error for PeerVanished {}

impl Broken {
    fn of(error: &io::Error) -> Option<Self> {
        match error.raw_os_error()? {
            code @ (libc::ETIMEDOUT | libc::EHOSTUNREACH | libc::ENETUNREACH) => Some(Self::Vanished(code)),
            code @ (libc::ECONNRESET | libc::ECONNABORTED) => Some(Self::Otherwise(code)),
            _ => None,
        }
    }

    fn error(self) -> io::Error {
        match self {
            // Must not look like a timeout, after which the call may be repeated.
            Self::Vanished(code) => io::Error::new(ErrorKind::ConnectionReset, PeerVanished(code)),
            Self::Otherwise(code) => io::Error::from_raw_os_error(code),
        }
    }
}

impl Channel {
    /// What an error of a call on [`direct`](Self::direct) means, as [`recv`](Self::recv) would say
    /// it.
    pub fn explain(&self, error: io::Error) -> io::Error {
        if self.is_closed() {
            return super::closed();
        }
        if let ErrorKind::BrokenPipe | ErrorKind::ConnectionReset | ErrorKind::UnexpectedEof = error.kind()
            && let Some(failure) = self.failure_below()
        {
            return failure;
        }
        if let Some(broken) = Broken::of(&error) {
            return self.link.broken.get_or_init(|| broken).error();
        }
        match (error.kind(), self.timeout()) {
            (ErrorKind::WouldBlock, Ok(Some(limit))) => {
                io::Error::new(ErrorKind::TimedOut, format!("no byte moved for {limit:?}, the timeout"))
            }
            (ErrorKind::WouldBlock, _) => ErrorKind::TimedOut.into(),
            _ => self.broken().map_or(error, Broken::error),
        }
    }

    /// Checks that 0 bytes received on [`direct`](Self::direct) are the peer's end.
    ///
    /// # Errors
    /// `ConnectionAborted` after [`Closer::close`](crate::Closer::close), whose shutdown looks the
    /// same, else the error by which the connection broke.
    pub fn check_end(&self) -> io::Result<()> {
        if self.is_closed() {
            return Err(super::closed());
        }
        let failure = self.failure_below().or_else(|| self.broken().map(Broken::error));
        failure.map_or(Ok(()), Err)
    }

    /// The error that another call was given, or one that the state of the socket tells.
    fn broken(&self) -> Option<Broken> {
        let known = self.link.broken.get().copied();
        known.or_else(|| self.has_vanished().then_some(Broken::Vanished(libc::ETIMEDOUT)))
    }

    /// Whether TCP has given the connection up while it sent again, or probed, without an answer:
    /// any acknowledgement sets both counts to 0, and nothing does so afterwards.
    fn has_vanished(&self) -> bool {
        let tcp = self.socket().map(|socket| sys::tcp_state(socket.as_fd()));
        // Not TCP: nothing is known.
        let Some(Ok(tcp)) = tcp else { return false };
        tcp.state == TCP_CLOSE && (tcp.retransmits > 0 || tcp.probes > 0)
    }
}

/// The state of a connection that is no more; one that the peer has ended is in another until this
/// side ends it, too.
const TCP_CLOSE: u8 = 7;

#[cfg(test)]
mod tests {
    use std::mem::MaybeUninit;
    use std::time::Duration;

    use rustix::event::{PollFd, PollFlags, poll};
    use socket2::{SockFilter, Socket};

    use super::*;
    use crate::channel::tests::tcp_pair;
    use crate::testing::LONG;

    /// Waits until the system has an error for the channel.
    fn until_broken(channel: &Channel) {
        let mut fds = [PollFd::new(channel.socket().unwrap(), PollFlags::ERR)];
        assert_eq!(poll(&mut fds, Some(&LONG.try_into().unwrap())).unwrap(), 1);
    }

    /// A connection that TCP has given up. No call was given the error yet.
    fn given_up(what_happens: fn(&Socket)) -> (Channel, Channel) {
        let (one, other) = tcp_pair();
        what_happens(other.socket().unwrap());
        let socket = one.socket().unwrap();
        socket.set_tcp_user_timeout(Some(Duration::from_millis(50))).unwrap();
        socket.set_nonblocking(true).unwrap();
        while socket.send(&[1; 65536]).is_ok() {}
        until_broken(&one);
        socket.set_nonblocking(false).unwrap();
        (one, other)
    }

    /// Nothing arrives any more: a filter that takes 0 bytes of every segment.
    fn cut(peer: &Socket) {
        peer.attach_filter(&[SockFilter::new(BPF_RETURN, 0, 0, 0)]).unwrap();
    }

    /// It takes nothing, so that it has no room in the end.
    fn stall(_: &Socket) {}

    /// `BPF_RET | BPF_K`.
    const BPF_RETURN: u16 = 6;

    fn receive(channel: &Channel) -> io::Error {
        channel.recv(&mut [0; 8]).unwrap_err()
    }

    fn receive_exactly(channel: &Channel) -> io::Error {
        channel.recv_exact(&mut [0; 8]).unwrap_err()
    }

    fn send(channel: &Channel) -> io::Error {
        channel.send_all(b"x").unwrap_err()
    }

    fn look(channel: &Channel) -> io::Error {
        channel.check_peer_is_there().unwrap_err()
    }

    const CALLS: [fn(&Channel) -> io::Error; 4] = [receive, receive_exactly, send, look];

    #[test]
    fn every_call_on_a_vanished_peer_gives_the_same_reason_whichever_is_first() {
        for (first, what_happens) in
            CALLS.into_iter().flat_map(|first| [(first, cut as fn(&_)), (first, stall)])
        {
            let (channel, _peer) = given_up(what_happens);
            for call in [first].into_iter().chain(CALLS) {
                let error = call(&channel);
                assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{error}");
                assert!(error.to_string().starts_with("the peer has vanished"), "{error}");
                assert!(PeerVanished::is_in(&error));
            }
        }
    }

    #[test]
    fn a_peer_that_vanished_is_known_from_the_socket_when_no_call_was_given_the_error() {
        for call in CALLS {
            let (channel, _peer) = given_up(cut);
            // As another thread's call that has not come back yet.
            let taken = channel.socket().unwrap().take_error().unwrap().unwrap();
            assert_eq!(taken.raw_os_error(), Some(libc::ETIMEDOUT));
            let error = call(&channel);
            assert!(error.to_string().starts_with("the peer has vanished"), "{error}");
        }
    }

    #[test]
    fn every_call_after_a_reset_says_so() {
        for first in CALLS {
            let (channel, peer) = tcp_pair();
            channel.send_all(b"unread").unwrap();
            // Until it is in the peer's queue.
            peer.socket().unwrap().peek(&mut [MaybeUninit::uninit()]).unwrap();
            drop(peer);
            until_broken(&channel);
            for call in [first].into_iter().chain(CALLS) {
                assert_eq!(call(&channel).raw_os_error(), Some(libc::ECONNRESET));
            }
        }
    }

    #[test]
    fn an_end_in_both_directions_is_no_break() {
        let (channel, peer) = tcp_pair();
        channel.finish_sending().unwrap();
        peer.finish_sending().unwrap();
        assert_eq!(channel.recv(&mut [0; 8]).unwrap(), 0);
        assert_eq!(peer.recv(&mut [0; 8]).unwrap(), 0);
        channel.check_end().unwrap();
        peer.check_end().unwrap();
        assert_eq!(send(&channel).kind(), ErrorKind::BrokenPipe);
    }
}
