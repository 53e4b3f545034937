use std::net::{Shutdown, TcpListener};

use super::*;
use crate::testing::spawn;

pub(super) fn tcp_pair() -> (Channel, Channel) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let one = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (one.try_into().unwrap(), listener.accept().unwrap().0.try_into().unwrap())
}

fn pairs() -> [(Channel, Channel); 2] {
    [tcp_pair(), Channel::pair().unwrap()]
}

#[test]
fn channels_are_shared_between_threads() {
    fn shared<T: Send + Sync + 'static>() {}
    shared::<Channel>();
    shared::<Closer>();
}

#[test]
fn any_number_of_slices_arrives_in_order() {
    for (one, other) in pairs() {
        // 5000 slices of 0..=1999 bytes are five batches, and far more than a socket holds.
        let bytes: Vec<u8> = (0..2000_u32).map(|i| i.to_le_bytes()[0]).collect();
        let sizes: Vec<usize> = (0..5000).map(|i| i * 7 % 2000 * usize::from(i % 3 != 0)).collect();
        let expected: Vec<u8> = sizes.iter().flat_map(|size| bytes[..*size].to_vec()).collect();
        let total = expected.len();
        let receiver = spawn("any-number", move || {
            let mut received = vec![0; total];
            other.recv_exact(&mut received).unwrap();
            assert_eq!(other.bytes_received(), total as u64);
            received
        });
        let mut slices: Vec<_> = sizes.iter().map(|size| IoSlice::new(&bytes[..*size])).collect();
        one.send_vectored(&mut slices).unwrap();
        assert_eq!(one.bytes_sent(), total as u64);
        assert!(receiver.join() == expected);
    }
}

#[test]
fn nothing_to_send_or_receive_is_no_error() {
    let (one, _other) = Channel::pair().unwrap();
    one.send_all(&[]).unwrap();
    one.send_vectored(&mut []).unwrap();
    one.send_vectored(&mut vec![IoSlice::new(&[]); 3000]).unwrap();
    assert_eq!(one.recv(&mut []).unwrap(), 0);
    one.recv_exact(&mut []).unwrap();
    assert_eq!((one.bytes_sent(), one.bytes_received()), (0, 0));
}

#[test]
fn pushed_back_bytes_come_first_and_hide_the_socket() {
    let (one, other) = UnixStream::pair().unwrap();
    let channel = Channel::new(one.into(), "unix:x".to_owned(), b"QEVM");
    Channel::try_from(other).unwrap().send_all(b"rest").unwrap();
    let mut buf = [0; 3];
    assert!(channel.direct().is_none());
    assert_eq!((channel.recv(&mut buf).unwrap(), &buf), (3, b"QEV"));
    assert!(channel.direct().is_none());
    assert_eq!((channel.recv(&mut buf).unwrap(), buf[0]), (1, b'M'));
    assert!(channel.direct().is_some());
    assert_eq!((channel.recv(&mut buf).unwrap(), &buf), (3, b"res"));
    assert_eq!((channel.recv(&mut buf).unwrap(), buf[0]), (1, b't'));
    assert_eq!(channel.recv(&mut buf).unwrap(), 0);
    assert_eq!(channel.bytes_received(), 8);
}

#[test]
fn recv_exact_crosses_from_pushed_back_bytes_to_the_socket() {
    let (one, other) = UnixStream::pair().unwrap();
    let channel = Channel::new(one.into(), "unix:x".to_owned(), b"QEVM");
    Channel::try_from(other).unwrap().send_all(b"rest").unwrap();
    let mut buf = [0; 6];
    channel.recv_exact(&mut buf).unwrap();
    assert_eq!(&buf, b"QEVMre");
    let error = channel.recv_exact(&mut buf).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::UnexpectedEof);
    assert_eq!(error.to_string(), "end of stream after 2 of 6 bytes");
}

#[test]
fn direct_is_the_socket_and_its_bytes_are_noted() {
    let (one, other) = Channel::pair().unwrap();
    let socket = Socket::from(one.direct().unwrap().try_clone_to_owned().unwrap());
    assert_eq!(socket.send(b"direct").unwrap(), 6);
    one.note_direct_sent(6);
    other.note_direct_received(2);
    let mut buf = [0; 6];
    other.recv_exact(&mut buf).unwrap();
    assert_eq!((&buf, one.bytes_sent(), other.bytes_received()), (b"direct", 6, 8));
}

#[test]
fn close_wakes_a_blocked_recv() {
    for (one, _other) in pairs() {
        let closer = one.closer();
        let blocked = spawn("blocked-recv", move || one.recv(&mut [0; 8]).unwrap_err().kind());
        blocked.until_asleep();
        closer.close();
        assert_eq!(blocked.join(), ErrorKind::ConnectionAborted);
        closer.close();
    }
}

#[test]
fn close_wakes_a_blocked_send() {
    for (one, other) in pairs() {
        let one = Arc::new(one);
        let closer = one.closer();
        let sender = Arc::clone(&one);
        let blocked = spawn("blocked-send", move || {
            let endless = vec![0; 64 << 20 /* bytes */];
            sender.send_all(&endless).unwrap_err().kind()
        });
        blocked.until_asleep();
        closer.close();
        assert_eq!(blocked.join(), ErrorKind::ConnectionAborted);
        assert_eq!(one.send_all(b"x").unwrap_err().kind(), ErrorKind::ConnectionAborted);
        assert!(one.is_closed() && !other.is_closed());
    }
}

#[test]
fn a_closer_does_not_keep_the_channel_open() {
    for (one, other) in pairs() {
        let closer = one.closer();
        drop(one);
        assert_eq!(other.recv(&mut [0; 8]).unwrap(), 0);
        closer.close();
    }
}

#[test]
fn a_send_to_a_closed_peer_is_an_error_and_no_signal() {
    let (one, other) = Channel::pair().unwrap();
    drop(other);
    assert_eq!(one.send_all(b"x").unwrap_err().kind(), ErrorKind::BrokenPipe);
}

#[test]
fn the_timeout_ends_recv_and_send() {
    for (one, other) in pairs() {
        one.set_timeout(Some(Duration::from_millis(20))).unwrap();
        let error = one.recv(&mut [0; 8]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TimedOut);
        assert!(error.to_string().contains("the timeout"), "{error}");
        let endless = vec![0; 64 << 20 /* bytes */];
        assert_eq!(one.send_all(&endless).unwrap_err().kind(), ErrorKind::TimedOut);
        // The channel still works, and without a limit it waits again.
        one.set_timeout(None).unwrap();
        let waiting = spawn("no-limit", move || one.recv(&mut [0; 8]).unwrap());
        waiting.until_asleep();
        other.send_all(b"x").unwrap();
        assert_eq!(waiting.join(), 1);
    }
}

#[test]
fn the_smallest_timeout_is_a_limit_and_zero_is_refused() {
    let (one, _other) = Channel::pair().unwrap();
    one.set_timeout(Some(Duration::from_nanos(1))).unwrap();
    assert_eq!(one.recv(&mut [0; 8]).unwrap_err().kind(), ErrorKind::TimedOut);
    assert_eq!(one.set_timeout(Some(Duration::ZERO)).unwrap_err().kind(), ErrorKind::InvalidInput);
}

#[test]
fn finish_sending_ends_one_direction() {
    for (one, other) in pairs() {
        one.send_all(b"last").unwrap();
        one.finish_sending().unwrap();
        let mut buf = [0; 8];
        assert_eq!(other.recv(&mut buf).unwrap(), 4);
        assert_eq!(other.recv(&mut buf).unwrap(), 0);
        other.send_all(b"pong").unwrap();
        assert_eq!(one.recv(&mut buf).unwrap(), 4);
        assert!(one.send_all(b"x").is_err());
    }
}

#[test]
fn a_foreign_socket_is_made_blocking_and_prompt() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    stream.set_nonblocking(true).unwrap();
    let channel = Channel::try_from(stream).unwrap();
    assert_eq!(channel.peer(), format!("tcp:{}", listener.local_addr().unwrap()));
    let socket = Socket::from(channel.direct().unwrap().try_clone_to_owned().unwrap());
    assert!(!socket.nonblocking().unwrap());
    assert!(socket.tcp_nodelay().unwrap() && socket.keepalive().unwrap());
    assert_eq!(socket.tcp_keepalive_time().unwrap(), Duration::from_secs(30));
    socket.shutdown(Shutdown::Both).unwrap();
}
