//! What the system keeps of the background stream before it leaves: little, since a page that is
//! asked for waits behind it, also one with a connection of its own.

use std::sync::Arc;
use std::time::Duration;

use multifd_transports::Channel;

/// How long what was handed to the system may take to leave.
const DELAY: Duration = Duration::from_millis(1);

/// Bytes between two looks at the pace of a connection.
const EVERY: u64 = 256 << 10;

/// Keeps the queue of one connection short.
pub(in crate::source) struct ShortQueue {
    channel: Arc<Channel>,
    /// Bytes sent at the next look; `None`: it stays as it is.
    next: Option<u64>,
}

impl ShortQueue {
    /// `may`: its socket is this engine's to tune.
    pub(in crate::source) fn of(channel: &Arc<Channel>, may: bool) -> Self {
        Self { channel: Arc::clone(channel), next: may.then(|| channel.bytes_sent() + EVERY / 4) }
    }

    /// More of the background stream has been sent.
    pub(in crate::source) fn sent(&mut self) {
        let sent = self.channel.bytes_sent();
        if self.next.is_none_or(|next| sent < next) {
            return;
        }
        self.next = match self.channel.shorten_send_queue(DELAY) {
            Ok(_) => Some(sent + EVERY),
            Err(error) => {
                tracing::debug!(%error, peer = self.channel.peer(), "the send queue stays as it is");
                None
            }
        };
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;
    use std::net::{TcpListener, TcpStream};

    use super::*;

    /// Bytes to the limits of a queue; `None`: it has none after a mebibyte.
    fn limited_after(may: bool) -> Option<u64> {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let ours = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut theirs, _) = listener.accept().unwrap();
        let seen = socket2::Socket::from(ours.try_clone().unwrap());
        let channel = Arc::new(Channel::try_from(ours).unwrap());
        let (fresh, mut queue) = (seen.tcp_notsent_lowat().unwrap(), ShortQueue::of(&channel, may));
        let piece = vec![1; 16 << 10];
        let mut taken = vec![0; piece.len()];
        (0..64).find_map(|_| {
            channel.send_all(&piece).unwrap();
            theirs.read_exact(&mut taken).unwrap();
            queue.sent();
            (seen.tcp_notsent_lowat().unwrap() != fresh).then(|| channel.bytes_sent())
        })
    }

    #[test]
    fn the_queue_of_the_background_stream_is_limited_while_it_goes() {
        assert!(limited_after(true).is_some_and(|bytes| bytes >= EVERY / 4));
        assert_eq!(limited_after(false), None, "a socket of the caller's");
    }
}
