use std::io::Write;

use super::*;
use crate::testing::{LONG, spawn};

/// A stream over one end of a socket pair, which fails or panics where it is told to.
struct Fake {
    socket: UnixStream,
    fault: Fault,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Fault {
    None,
    /// Every write fails.
    Write,
    /// Every read panics.
    Panic,
}

impl ByteStream for Fake {
    fn read(&self, buf: &mut [u8]) -> io::Result<usize> {
        assert!(self.fault != Fault::Panic, "on purpose");
        (&self.socket).read(buf)
    }

    fn write(&self, buf: &[u8]) -> io::Result<usize> {
        match self.fault {
            Fault::Write => Err(io::Error::new(ErrorKind::ConnectionReset, "the proxy is gone")),
            // Not all of it: the rest must follow.
            _ => (&self.socket).write(buf.get(..buf.len().min(1000)).unwrap_or(buf)),
        }
    }

    fn finish(&self) -> io::Result<()> {
        self.socket.shutdown(Shutdown::Write)
    }

    fn close(&self) {
        let _ = self.socket.shutdown(Shutdown::Both);
    }
}

/// A channel over a stream, and what is at the stream's other end.
fn over(fault: Fault) -> (Channel, UnixStream) {
    let (socket, peer) = UnixStream::pair().unwrap();
    let stream = Fake { socket, fault };
    (Channel::over_stream(stream, "proxy:7".to_owned(), &ThreadHook::default()).unwrap(), peer)
}

#[test]
fn bytes_go_both_ways_and_ends_are_ends() {
    let (channel, mut peer) = over(Fault::None);
    let sent: Vec<u8> = (0..1 << 20).map(|index: u32| index.to_le_bytes()[1]).collect();
    let expected = sent.clone();
    let there = spawn("stream-peer", move || {
        let mut received = Vec::new();
        peer.read_to_end(&mut received).unwrap();
        assert!(received == expected);
        peer.write_all(b"thanks").unwrap();
    });
    channel.send_all(&sent).unwrap();
    channel.finish_sending().unwrap();
    channel.settle(LONG).unwrap();
    let mut answer = [0; 6];
    channel.recv_exact(&mut answer).unwrap();
    assert_eq!((&answer, channel.recv(&mut [0]).unwrap()), (b"thanks", 0));
    assert_eq!((channel.bytes_sent(), channel.peer()), (1 << 20, "proxy:7"));
    there.join();
}

#[test]
fn what_was_sent_arrives_after_the_channel_is_dropped() {
    let (channel, mut peer) = over(Fault::None);
    channel.send_all(&[7; 100_000]).unwrap();
    drop(channel);
    let mut received = Vec::new();
    peer.read_to_end(&mut received).unwrap();
    assert_eq!(received.len(), 100_000);
}

#[test]
fn a_closer_ends_the_stream_below_while_its_peer_says_nothing() {
    let (channel, mut peer) = over(Fault::None);
    let closer = channel.closer();
    let waiting = spawn("stream-closer", move || channel.recv(&mut [0]).unwrap_err());
    waiting.until_asleep();
    closer.close();
    assert_eq!(waiting.join().kind(), ErrorKind::ConnectionAborted);
    // The thread that reads the stream is blocked in it until the stream is closed.
    assert_eq!(peer.read(&mut [0]).unwrap(), 0);
}

#[test]
fn an_error_of_the_stream_is_the_channels() {
    let (channel, _peer) = over(Fault::Write);
    channel.send_all(b"x").unwrap();
    let error = channel.recv(&mut [0]).unwrap_err();
    assert_eq!(error.to_string(), "the stream below has failed: the proxy is gone");
    let error = channel.settle(LONG).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    let error = channel.send_all(b"x").unwrap_err();
    assert!(error.to_string().ends_with("the proxy is gone"), "{error}");
}

#[test]
fn a_stream_that_panics_ends_its_channel() {
    let (channel, _peer) = over(Fault::Panic);
    let error = channel.recv(&mut [0]).unwrap_err();
    assert!(error.to_string().contains("panicked"), "{error}");
}

#[test]
fn a_peer_that_takes_nothing_is_found_by_the_timeout() {
    let (channel, _peer) = over(Fault::None);
    channel.set_timeout(Some(Duration::from_millis(100))).unwrap();
    let error = channel.send_all(&vec![0; 8 << 20]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut);
}
