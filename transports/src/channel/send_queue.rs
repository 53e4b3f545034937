//! What the system keeps of sent bytes before they leave.
//!
//! ```text
//!  send ─> not sent yet ─> sent, not acknowledged ─> the peer
//!          TCP_NOTSENT_LOWAT
//!          └──────────── SO_SNDBUF ────────────┘
//! ```

use std::io;
use std::os::fd::AsFd as _;
use std::time::Duration;

use crate::Channel;
use crate::os::sys::{self, TcpPace};

/// Limits of what waits in the system, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SendQueue {
    /// Of what has not been sent (TCP_NOTSENT_LOWAT).
    pub not_sent: usize,
    /// Of all that is not acknowledged (SO_SNDBUF), where that is no limit of the bandwidth.
    pub buffer: Option<usize>,
}

/// The least that waits: below it, a sender that is not woken at once leaves the link idle.
const LEAST: u64 = 64 << 10;

/// The longest way for which the buffer is limited: on a longer one, what is on the way is more
/// than what waits, and a rate that was measured too low would stay so.
const NEAR: Duration = Duration::from_millis(5);

/// The largest buffer that is asked for: more than `net.core.wmem_max` is not given by default,
/// and the system's own tuning gives more than that.
const MOST_BUFFER: u64 = 256 << 10;

impl SendQueue {
    /// What takes `delay` at the pace that was measured. `None`: nothing was.
    fn of(pace: TcpPace, delay: Duration) -> Option<Self> {
        let rate = pace.bytes_per_second;
        let bytes = |time: Duration| u64::try_from(u128::from(rate) * time.as_micros() / 1_000_000);
        let not_sent = bytes(delay).ok().filter(|_| rate > 0)?.clamp(LEAST, 4 << 20);
        let all = bytes(pace.round_trip + delay).ok()?.max(LEAST);
        let buffer = (pace.round_trip <= NEAR && all <= MOST_BUFFER).then_some(all);
        let whole = |bytes: u64| usize::try_from(bytes).ok();
        Some(Self { not_sent: whole(not_sent)?, buffer: buffer.and_then(whole) })
    }
}

impl Channel {
    /// Has the system take no more of what is sent than leaves within `delay`, at the pace that it
    /// has measured on the connection so far; a sender waits for the rest. So what another
    /// connection sends over the same link is not behind megabytes of this one. To be called again
    /// and again, since the pace changes. `None`: there is no pace yet, or no TCP.
    ///
    /// # Errors
    /// The system's.
    pub fn shorten_send_queue(&self, delay: Duration) -> io::Result<Option<SendQueue>> {
        let Some(socket) = self.socket() else { return Ok(None) };
        // Not TCP.
        let Ok(pace) = sys::tcp_pace(socket.as_fd()) else { return Ok(None) };
        let Some(queue) = SendQueue::of(pace, delay) else { return Ok(None) };
        socket.set_tcp_notsent_lowat(u32::try_from(queue.not_sent).unwrap_or(u32::MAX))?;
        if let Some(bytes) = queue.buffer {
            // The system doubles it, for what it needs itself.
            socket.set_send_buffer_size(bytes / 2)?;
        }
        Ok(Some(queue))
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;
    use std::net::{TcpListener, TcpStream};
    use std::os::unix::net::UnixStream;

    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn queue(round_trip_us: u64, bytes_per_second: u64) -> Option<SendQueue> {
        let round_trip = Duration::from_micros(round_trip_us);
        SendQueue::of(TcpPace { round_trip, bytes_per_second }, MS)
    }

    #[test]
    fn what_waits_is_a_millisecond_of_the_pace() {
        assert_eq!(queue(100, 0), None);
        let gigabit = queue(100, 125_000_000).unwrap();
        assert_eq!(gigabit, SendQueue { not_sent: 125_000, buffer: Some(137_500) });
        let slow = queue(100, 1_000_000).unwrap();
        assert_eq!(slow, SendQueue { not_sent: 64 << 10, buffer: Some(64 << 10) });
    }

    #[test]
    fn a_long_way_and_a_fast_one_keep_the_systems_buffer() {
        assert_eq!(queue(40_000, 125_000_000).unwrap().buffer, None);
        assert_eq!(queue(40_000, 100_000).unwrap().buffer, None);
        assert_eq!(queue(30, 3_000_000_000).unwrap(), SendQueue { not_sent: 3_000_000, buffer: None });
    }

    #[test]
    fn the_limits_reach_the_socket_once_there_is_a_pace() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let ours = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut theirs, _) = listener.accept().unwrap();
        let seen = socket2::Socket::from(ours.try_clone().unwrap());
        let channel = Channel::try_from(ours).unwrap();
        let mut taken = vec![0; 1 << 20];
        let shortened = loop {
            // In pieces that the smallest buffer takes.
            channel.send_all(&[1; 4096]).unwrap();
            theirs.read_exact(&mut taken[..4096]).unwrap();
            if let Some(queue) = channel.shorten_send_queue(MS).unwrap() {
                break queue;
            }
        };
        assert_eq!(seen.tcp_notsent_lowat().unwrap() as usize, shortened.not_sent);
        if let Some(buffer) = shortened.buffer {
            // What the system allows at most may be less.
            assert!(seen.send_buffer_size().unwrap() <= buffer + 1);
        }
        channel.send_all(&[1; 4096]).unwrap();
        theirs.read_exact(&mut taken[..4096]).unwrap();
    }

    #[test]
    fn a_connection_that_is_not_tcp_stays_as_it_is() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        assert_eq!(Channel::try_from(ours).unwrap().shorten_send_queue(MS).unwrap(), None);
    }
}
