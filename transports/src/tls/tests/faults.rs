//! Whatever a network or a peer does: a clear error, in time, at both ends.

use std::io::{ErrorKind, IoSlice, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::time::Instant;

use super::relay::{Fault, Relay};
use super::*;

const BRIEF: Duration = Duration::from_millis(300);

/// Bytes of a handshake to the server and back, as a relay sees them.
fn handshake_lengths(credentials: &Credentials) -> (usize, usize) {
    let serving = Serving::tcp(credentials.server());
    let relay = Relay::to(&serving.endpoint(), None, None);
    let (_one, _other) = say_hello(dial(&relay.endpoint, credentials.client()).unwrap(), &serving);
    let (there, back) = relay.seen();
    serving.stop();
    // Less the record with the hello: then the client is through, but the server is not.
    (there.len() - (4 + 22), back.len())
}

#[test]
fn a_handshake_that_is_cut_anywhere_ends_at_both_ends() {
    let credentials = Credentials::new();
    let (there, back) = handshake_lengths(&credentials);
    assert!(there > 500 && back > 500, "{there} {back}");
    let spread = |len: usize| [1, 3, 5, 6, 40, len / 3, len / 2, len - 30, len - 8];
    let cuts = spread(there).map(|at| (Some(Fault::Cut(at)), None));
    for (to, from) in cuts.into_iter().chain(spread(back).map(|at| (None, Some(Fault::Cut(at))))) {
        let serving = Serving::tcp(credentials.server());
        let relay = Relay::to(&serving.endpoint(), to, from);
        match dial(&relay.endpoint, credentials.client()) {
            Err(TransportError::Io { source, .. }) => {
                let text = source.to_string();
                assert!(text.contains("in the TLS handshake"), "{text}");
            }
            // It is through, and hears nothing of the rest that did not arrive.
            Ok(one) => assert!(to.is_some() && one.recv(&mut [0; 1]).is_err(), "{to:?} {from:?}"),
            other => panic!("{other:?}"),
        }
        let text = serving.failed().to_string();
        assert!(text.contains("TLS handshake"), "{text}");
        serving.stop();
    }
}

#[test]
fn a_handshake_that_stalls_anywhere_ends_at_both_ends() {
    let credentials = Credentials::new();
    let (there, back) = handshake_lengths(&credentials);
    for (to, from) in [
        (Some(Fault::Stall(3)), None),
        (Some(Fault::Stall(there / 2)), None),
        (None, Some(Fault::Stall(4))),
        (None, Some(Fault::Stall(back - 8))),
    ] {
        let serving = Serving::new("tcp:localhost:0", Some(credentials.server()), BRIEF);
        let relay = Relay::to(&serving.endpoint(), to, from);
        let begun = Instant::now();
        match dial_within(&relay.endpoint, credentials.client(), 2 * BRIEF) {
            Err(TransportError::DeadlinePassed { source, .. }) => {
                assert!(source.to_string().contains("did not finish the TLS handshake"), "{source}");
            }
            // The server loses timeout first, and hangs up.
            Err(TransportError::Io { source, .. }) => {
                assert!(source.to_string().contains("hung up in the TLS handshake"), "{source}");
            }
            Ok(one) => assert!(one.recv(&mut [0; 1]).is_err()),
            other => panic!("{other:?}"),
        }
        let error = serving.failed();
        assert_eq!(error.kind(), ErrorKind::TimedOut);
        assert!(error.to_string().contains("the TLS handshake stalled after"), "{error}");
        assert!(begun.elapsed() < LONG);
        serving.stop();
    }
}

#[test]
fn a_silent_client_holds_up_no_other() {
    let credentials = Credentials::new();
    let serving = Serving::new("tcp:localhost:0", Some(credentials.server()), BRIEF);
    let Endpoint::Tcp { port, .. } = serving.endpoint() else { panic!() };
    let _silent = TcpStream::connect(("localhost", port)).unwrap();
    let _sealed_and_silent = dial(&serving.endpoint(), credentials.client()).unwrap();
    let (_one, _other) = say_hello(dial(&serving.endpoint(), credentials.client()).unwrap(), &serving);
    for _ in 0..2 {
        assert!(matches!(serving.next(), Arrival::TimedOut { .. }));
    }
    serving.stop();
}

#[test]
fn who_does_not_speak_tls_is_told_apart() {
    let credentials = Credentials::new();
    let serving = Serving::tcp(credentials.server());
    let Endpoint::Tcp { port, .. } = serving.endpoint() else { panic!() };
    let mut plain = TcpStream::connect(("localhost", port)).unwrap();
    plain.write_all(b"QEVM and so on").unwrap();
    let text = serving.failed().to_string();
    assert!(text.contains("does not speak TLS: its first bytes are 51 45 56 4d"), "{text}");
    let mut alert = Vec::new();
    plain.read_to_end(&mut alert).unwrap();
    assert_eq!(alert, [21, 3, 3, 0, 2, 2, 10]);
    // A health check.
    drop(TcpStream::connect(("localhost", port)).unwrap());
    assert!(matches!(serving.next(), Arrival::Closed { received: 0, .. }));
    // Handshake records full of nonsense, and one that never ends.
    for garbage in [vec![22; 3000], [&[22, 3, 1, 0, 200][..], &[0xff; 200]].concat()] {
        let mut client = TcpStream::connect(("localhost", port)).unwrap();
        client.write_all(&garbage).unwrap();
        let text = serving.failed().to_string();
        assert!(text.contains("TLS"), "{text}");
    }
    serving.stop();

    let (listener, endpoint) = bind();
    let ours = credentials.client();
    let dialled = spawn("tls-not", move || reason(dial(&endpoint, ours)));
    let mut server = listener.accept().unwrap().0;
    server.write_all(b"SSH-2.0-x\r\n").unwrap();
    let text = dialled.join();
    assert!(text.contains("does not speak TLS: its first bytes are 53 53 48"), "{text}");
    let mut hello = [0; 2];
    server.read_exact(&mut hello).unwrap();
    assert_eq!(hello, [22, 3], "what a plain listener has seen of us");
}

#[test]
fn a_client_that_leaves_after_the_handshake_is_reported() {
    let credentials = Credentials::new();
    let serving = Serving::tcp(credentials.server());
    let one = dial(&serving.endpoint(), credentials.client()).unwrap();
    one.send_all(b"QE").unwrap();
    drop(one);
    let text = serving.failed().to_string();
    assert!(text.contains("2 bytes after the TLS handshake: it may have refused our certificate"), "{text}");
    serving.stop();
}

#[test]
fn a_server_that_leaves_after_the_handshake_is_reported() {
    let credentials = Credentials::new();
    let serving = Serving::tcp(credentials.server());
    let one = dial(&serving.endpoint(), credentials.client()).unwrap();
    one.send_all(b"QEVM").unwrap();
    drop(serving.identified());
    let error = one.recv(&mut [0; 8]).unwrap_err();
    assert!(error.to_string().contains("right after the TLS handshake: it may have refused"), "{error}");
    serving.stop();
}

/// A relay that does `fault` to what the client sends, so many bytes into the first record after
/// its hello.
fn faulty(credentials: &Credentials, at: usize, fault: fn(usize) -> Fault) -> (Channel, Channel) {
    let (there, _) = handshake_lengths(credentials);
    let serving = Serving::tcp(credentials.server());
    let relay = Relay::to(&serving.endpoint(), Some(fault(there + 26 + at)), None);
    let pair = say_hello(dial(&relay.endpoint, credentials.client()).unwrap(), &serving);
    serving.stop();
    pair
}

#[test]
fn a_record_that_is_cut_is_an_error() {
    let credentials = Credentials::new();
    for at in [1, 4, 5, 8, 500, 1000] {
        let (one, other) = faulty(&credentials, at, Fault::Cut);
        // More than one call: what was sent before the cut may hide it from the first.
        let _ = one.send_all(&[1; 1000]);
        let error = other.recv_exact(&mut [0; 1000]).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("bytes of a TLS record") || text.starts_with("end of stream"), "{text}");
        assert_eq!(error.kind(), ErrorKind::UnexpectedEof);
        assert!(one.recv(&mut [0; 1]).is_err());
    }
}

#[test]
fn a_record_that_stalls_times_out() {
    let credentials = Credentials::new();
    let (one, other) = faulty(&credentials, 500, Fault::Stall);
    other.set_timeout(Some(BRIEF)).unwrap();
    one.send_all(&[1; 1000]).unwrap();
    let error = other.recv_exact(&mut [0; 1000]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut);
    assert!(error.to_string().contains("the timeout"), "{error}");
    // The peer takes nothing of what we send: it ends, too.
    let (one, _other) = pair(credentials.client(), credentials.server());
    one.set_timeout(Some(BRIEF)).unwrap();
    let error = one.send_all(&vec![0; 64 << 20 /* bytes */]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut);
    assert!(one.send_all(b"x").is_err(), "half a record went, nothing can follow it");
}

#[test]
fn a_changed_byte_is_noticed_and_the_sender_is_told() {
    let credentials = Credentials::new();
    let (one, other) = faulty(&credentials, 500, Fault::Change);
    one.send_all(&[1; 1000]).unwrap();
    let error = other.recv_exact(&mut [0; 1000]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidData);
    assert!(error.to_string().contains("does not decrypt"), "{error}");
    assert_eq!(other.recv(&mut [0; 1]).unwrap_err().to_string(), error.to_string());
    let told = one.recv(&mut [0; 1]).unwrap_err();
    assert!(told.to_string().contains("alert 20 (bad record MAC)"), "{told}");
}

#[test]
fn what_no_peer_sends_is_refused() {
    let credentials = Credentials::new();
    let records: [(&[u8], &str); 4] = [
        (&[99, 3, 3, 0, 1, 0], "no header of a TLS record"),
        (&[23, 3, 3, 0xff, 0xff], "a TLS record of 65535 bytes is too long"),
        (&[21, 3, 3, 0, 2, 2, 40], "does not decrypt"),
        (&[23, 3, 3, 0, 3, 1, 2, 3], "does not decrypt"),
    ];
    for (record, expected) in records {
        let serving = Serving::tcp(credentials.server());
        let Endpoint::Tcp { port, .. } = serving.endpoint() else { panic!() };
        // The client's own socket, to say what its TLS does not.
        let mut socket = TcpStream::connect(("localhost", port)).unwrap();
        let stream = encrypted(&credentials.client(), &socket, &serving.endpoint());
        stream.send_vectored(&[IoSlice::new(b"QEVM")]).unwrap();
        let other = serving.identified();
        other.recv_exact(&mut [0; 4]).unwrap();
        socket.write_all(record).unwrap();
        let error = other.recv(&mut [0; 8]).unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
        serving.stop();
    }
}

/// The sender looks what the peer has sent, and it is he who finds the fault.
#[test]
fn a_fault_that_a_sender_finds_is_told_to_the_peer() {
    let credentials = Credentials::new();
    let serving = Serving::tcp(credentials.server());
    let Endpoint::Tcp { port, .. } = serving.endpoint() else { panic!() };
    let mut socket = TcpStream::connect(("localhost", port)).unwrap();
    let stream = encrypted(&credentials.client(), &socket, &serving.endpoint());
    stream.send_vectored(&[IoSlice::new(b"QEVM")]).unwrap();
    let other = serving.identified();
    other.recv_exact(&mut [0; 4]).unwrap();
    socket.write_all(&[23, 3, 3, 0, 3, 1, 2, 3]).unwrap();
    let begun = Instant::now();
    let error = loop {
        if let Err(error) = other.send_all(b"x") {
            break error;
        }
        assert!(begun.elapsed() < LONG);
    };
    assert!(error.to_string().contains("does not decrypt"), "{error}");
    assert_eq!(other.send_all(b"x").unwrap_err().to_string(), error.to_string());
    let told = loop {
        match stream.recv(&mut [0; 4096]) {
            Ok(count) => assert!(count > 0),
            Err(error) => break error,
        }
    };
    assert!(told.to_string().contains("alert 20 (bad record MAC)"), "{told}");
    serving.stop();
}

#[test]
fn a_closer_wakes_sender_and_receiver() {
    let credentials = Credentials::new();
    let (one, _other) = pair(credentials.client(), credentials.server());
    let one = Arc::new(one);
    let (sender, receiver) = (Arc::clone(&one), Arc::clone(&one));
    let sending = spawn("tls-woken-send", move || {
        sender.send_all(&vec![0; 64 << 20 /* bytes */]).unwrap_err().kind()
    });
    let receiving = spawn("tls-woken-recv", move || receiver.recv(&mut [0; 8]).unwrap_err().kind());
    sending.until_asleep();
    receiving.until_asleep();
    one.closer().close();
    assert_eq!(sending.join(), ErrorKind::ConnectionAborted);
    assert_eq!(receiving.join(), ErrorKind::ConnectionAborted);
}

#[test]
fn a_peer_that_is_gone_is_an_error_for_a_sender() {
    let credentials = Credentials::new();
    let (one, other) = pair(credentials.client(), credentials.server());
    drop(other);
    let begun = Instant::now();
    while one.send_all(&[0; 100_000]).is_ok() {
        assert!(begun.elapsed() < LONG);
    }
    assert!(one.finish_sending().is_err());
    let (one, other) = pair(credentials.client(), credentials.server());
    // An end that has all it wants and leaves does not hinder a close_notify.
    drop(other);
    let _ = one.finish_sending();
}

/// Tickets and key updates that are not read must not be in the socket when it is closed: the reset
/// would destroy what is under way.
#[test]
fn a_sender_that_never_receives_does_not_reset_the_connection() {
    let credentials = Credentials::new();
    let (one, other) = pair(credentials.client(), credentials.server().refresh_keys_after(bytes(1)));
    // Key updates only: the server's data would be data that must be read.
    let receiver = spawn("tls-no-reset", move || {
        let mut received = 0;
        other.recv_each(32 << 20, &mut |data| received += data.len()).unwrap();
        assert_eq!(other.recv(&mut [0; 1]).unwrap(), 0);
        received
    });
    one.send_all(&vec![7; 32 << 20]).unwrap();
    one.finish_sending().unwrap();
    drop(one);
    assert_eq!(receiver.join(), 32 << 20);
}

#[test]
fn a_shutdown_of_the_socket_alone_is_an_end() {
    let credentials = Credentials::new();
    let serving = Serving::tcp(credentials.server());
    let Endpoint::Tcp { port, .. } = serving.endpoint() else { panic!() };
    let socket = TcpStream::connect(("localhost", port)).unwrap();
    let stream = encrypted(&credentials.client(), &socket, &serving.endpoint());
    stream.send_vectored(&[IoSlice::new(b"QEVM")]).unwrap();
    let other = serving.identified();
    other.recv_exact(&mut [0; 4]).unwrap();
    socket.shutdown(Shutdown::Write).unwrap();
    assert_eq!(other.recv(&mut [0; 8]).unwrap(), 0);
    serving.stop();
}
