//! What is sent arrives, with every cipher, beside foreign record layers, across new keys.

use std::io::{IoSlice, Read, Write};
use std::net::TcpStream;
use std::sync::Arc;

use rustls::crypto::aws_lc_rs::default_provider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{
    ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection, StreamOwned,
    SupportedCipherSuite,
};

use super::*;

#[test]
fn any_slices_arrive_both_ways_with_every_provider() {
    let credentials = Credentials::new();
    for provider in TlsProvider::ALL {
        let client = TlsClient::with_provider(credentials.path(), *provider).unwrap();
        let server = TlsServer::with_provider(credentials.path(), *provider).unwrap();
        let (one, other) = pair(client, server);
        for (from, to) in [(&one, &other), (&other, &one)] {
            // Empty ones, small ones, and many that are longer than a record or a batch.
            let sizes = [0, 1, 5, 0, 16383, 16384, 16385, 300_000, 7, 600_001, 0];
            let sent: Vec<Vec<u8>> = sizes.iter().map(|len| noise(*len)).collect();
            let expected = sent.concat();
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    from.send_vectored(&mut sent.iter().map(|bytes| IoSlice::new(bytes)).collect::<Vec<_>>())
                        .unwrap();
                });
                let mut received = vec![0; expected.len()];
                to.recv_exact(&mut received).unwrap();
                assert!(received == expected);
            });
            assert_eq!(to.bytes_received() % 1000, (from.bytes_sent()) % 1000);
        }
        assert!(one.direct().is_none());
    }
}

#[test]
fn filled_and_shown_bytes_arrive_after_what_was_pushed_back() {
    let credentials = Credentials::new();
    let serving = Serving::tcp(credentials.server());
    let one = dial(&serving.endpoint(), credentials.client()).unwrap();
    let sent = noise(1_000_003);
    let (mut left, expected) = (&sent[..], sent.clone());
    let sender = spawn("tls-filled", {
        let sent = sent.clone();
        move || {
            let mut left = &sent[..];
            one.send_filled(sent.len(), &mut |into| {
                let (now, later) = left.split_at(into.len());
                into.copy_from_slice(now);
                left = later;
            })
            .unwrap();
            one
        }
    });
    let other = serving.identified();
    let mut received = Vec::new();
    other.recv_each(expected.len(), &mut |data| received.extend_from_slice(data)).unwrap();
    assert!(received == expected);
    let one = sender.join();
    assert_eq!((one.bytes_sent(), other.bytes_received()), (1_000_003, 1_000_003));
    // The same on a channel without TLS.
    let (plain, there) = Channel::pair().unwrap();
    let receiver = spawn("plain-shown", move || {
        let mut received = Vec::new();
        there.recv_each(1_000_003, &mut |data| received.extend_from_slice(data)).unwrap();
        received
    });
    plain
        .send_filled(sent.len(), &mut |into| {
            let (now, later) = left.split_at(into.len());
            into.copy_from_slice(now);
            left = later;
        })
        .unwrap();
    assert!(receiver.join() == expected);
    serving.stop();
}

/// Both ends send and receive at once, on two threads each, and change keys all the time.
#[test]
fn keys_change_under_full_duplex_load() {
    let credentials = Credentials::new();
    let (one, other) = pair(
        credentials.client().refresh_keys_after(bytes(1)),
        credentials.server().refresh_keys_after(bytes(300_000)),
    );
    let ends = [Arc::new(one), Arc::new(other)];
    let expected = Arc::new(noise(20 << 20));
    let work: Vec<Spawned<()>> = ends
        .iter()
        .flat_map(|end| {
            let (sender, receiver) = (Arc::clone(end), Arc::clone(end));
            let (sent, wanted) = (Arc::clone(&expected), Arc::clone(&expected));
            [
                spawn("tls-duplex-send", move || {
                    // Also in small pieces: a batch each, and a key each at one end.
                    let (small, large) = sent.split_at(1 << 20);
                    small.chunks(4099).for_each(|piece| sender.send_all(piece).unwrap());
                    sender.send_all(large).unwrap();
                }),
                spawn("tls-duplex-recv", move || {
                    let mut received = vec![0; wanted.len()];
                    receiver.recv_exact(&mut received).unwrap();
                    assert!(received == *wanted);
                }),
            ]
        })
        .collect();
    work.into_iter().for_each(Spawned::join);
    let refreshed = ends.map(|end| end.keys_refreshed());
    assert!(refreshed[0] > 300 && refreshed[1] > 30, "{refreshed:?}");
}

fn configs(credentials: &Credentials, suite: SupportedCipherSuite) -> (ClientConfig, ServerConfig) {
    let mut provider = default_provider();
    provider.cipher_suites = vec![suite];
    let provider = Arc::new(provider);
    let version: &'static _ = match suite {
        SupportedCipherSuite::Tls12(_) => &rustls::version::TLS12,
        SupportedCipherSuite::Tls13(_) => &rustls::version::TLS13,
    };
    let file = |name: &str| credentials.path().join(name);
    let certificates = |name| vec![CertificateDer::from_pem_file(file(name)).unwrap()];
    let key = |name| PrivateKeyDer::from_pem_file(file(name)).unwrap();
    let mut roots = RootCertStore::empty();
    roots.add(certificates("ca-cert.pem").remove(0)).unwrap();
    let client = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(&[version])
        .unwrap()
        .with_root_certificates(roots)
        .with_client_auth_cert(certificates("client-cert.pem"), key("client-key.pem"))
        .unwrap();
    let server = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[version])
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(certificates("server-cert.pem"), key("server-key.pem"))
        .unwrap();
    (client, server)
}

/// Every suite, with the record layer of rustls at the other end, which is not ours.
#[test]
fn every_suite_of_both_versions_is_understood_by_another_record_layer() {
    let credentials = Credentials::new();
    let suites = default_provider().cipher_suites;
    let of_our_key = suites.iter().filter(|suite| !format!("{suite:?}").contains("RSA"));
    let mut tried = 0;
    for suite in of_our_key {
        let (client, server) = configs(&credentials, *suite);
        let serving = Serving::tcp(credentials.server());
        let Endpoint::Tcp { port, .. } = serving.endpoint() else { panic!() };
        let socket = TcpStream::connect(("localhost", port)).unwrap();
        let connection = ClientConnection::new(Arc::new(client), "localhost".try_into().unwrap()).unwrap();
        let mut foreign = StreamOwned::new(connection, socket);
        foreign.write_all(b"QEVM").unwrap();
        echo(serving.identified(), &mut foreign);
        serving.stop();

        let (listener, endpoint) = bind();
        let ours = credentials.client();
        let ours = spawn("tls-foreign", move || dial(&endpoint, ours).unwrap());
        let connection = ServerConnection::new(Arc::new(server)).unwrap();
        let mut foreign = StreamOwned::new(connection, listener.accept().unwrap().0);
        foreign.conn.complete_io(&mut foreign.sock).unwrap();
        let ours = ours.join();
        ours.send_all(b"QEVM").unwrap();
        echo_back(&ours, &mut foreign);
        tried += 1;
    }
    assert_eq!(tried, 6, "three of each version");
}

/// The foreign end is a client; `ours` has four bytes to give.
fn echo<C, D>(ours: Channel, foreign: &mut StreamOwned<C, TcpStream>)
where
    C: std::ops::DerefMut<Target = rustls::ConnectionCommon<D>>,
    D: rustls::SideData,
{
    let sent = noise(700_001);
    let end = spawn("tls-echo", move || {
        let mut received = vec![0; 700_005];
        ours.recv_exact(&mut received).unwrap();
        ours.send_all(&received).unwrap();
        ours.finish_sending().unwrap();
        // The foreign end's close_notify.
        assert_eq!(ours.recv(&mut [0; 8]).unwrap(), 0);
    });
    foreign.write_all(&sent).unwrap();
    foreign.flush().unwrap();
    let mut back = Vec::new();
    // To the close_notify: rustls takes an end without it for an error.
    foreign.read_to_end(&mut back).unwrap();
    assert!(back[..4] == *b"QEVM" && back[4..] == sent);
    foreign.conn.send_close_notify();
    foreign.flush().unwrap();
    end.join();
}

fn echo_back<D: rustls::SideData, C>(ours: &Channel, foreign: &mut StreamOwned<C, TcpStream>)
where
    C: std::ops::DerefMut<Target = rustls::ConnectionCommon<D>>,
{
    let sent = noise(100_003);
    let mut hello = [0; 4];
    foreign.read_exact(&mut hello).unwrap();
    foreign.write_all(&sent).unwrap();
    foreign.flush().unwrap();
    let mut received = vec![0; sent.len()];
    ours.recv_exact(&mut received).unwrap();
    assert!(received == sent);
    ours.finish_sending().unwrap();
    assert_eq!(foreign.read(&mut hello).unwrap(), 0);
}

/// A peer that demands our next key gets it with the next data, not before: a receiver never
/// writes.
#[test]
fn a_demanded_key_comes_with_the_next_data() {
    let credentials = Credentials::new();
    let (client, _) = configs(&credentials, rustls_suite());
    let serving = Serving::tcp(credentials.server());
    let Endpoint::Tcp { port, .. } = serving.endpoint() else { panic!() };
    let relay = relay::Relay::to(&Endpoint::Tcp { host: "localhost".to_owned(), port }, None, None);
    let Endpoint::Tcp { port, .. } = relay.endpoint else { panic!() };
    let connection = ClientConnection::new(Arc::new(client), "localhost".try_into().unwrap()).unwrap();
    let mut foreign = StreamOwned::new(connection, TcpStream::connect(("localhost", port)).unwrap());
    foreign.write_all(b"QEVM").unwrap();
    let ours = serving.identified();
    let mut got = [0; 5];
    for round in 0..5 {
        foreign.conn.refresh_traffic_keys().unwrap();
        foreign.write_all(b"again").unwrap();
        ours.recv_exact(&mut got[..if round == 0 { 4 } else { 0 }]).unwrap();
        ours.recv_exact(&mut got).unwrap();
        assert_eq!(&got, b"again");
        let before = relay.seen().1.len();
        ours.send_all(b"reply").unwrap();
        foreign.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"reply");
        // A key_update and a data record: 5 + 5 + 1 + 16 bytes each.
        assert_eq!(relay.seen().1.len() - before, 54);
    }
    serving.stop();
}

/// All in one segment: the end of the client's handshake, a demand for our next key, data under the
/// client's own next one.
#[test]
fn what_comes_right_behind_the_handshake_is_followed() {
    let credentials = Credentials::new();
    let (client, _) = configs(&credentials, rustls_suite());
    let client = Arc::new(client);
    for updates in 0..3 {
        let serving = Serving::tcp(credentials.server());
        let Endpoint::Tcp { port, .. } = serving.endpoint() else { panic!() };
        let mut socket = TcpStream::connect(("localhost", port)).unwrap();
        let name = "localhost".try_into().unwrap();
        let mut connection = ClientConnection::new(Arc::clone(&client), name).unwrap();
        while connection.is_handshaking() {
            while connection.wants_write() {
                connection.write_tls(&mut socket).unwrap();
            }
            connection.read_tls(&mut socket).unwrap();
            connection.process_new_packets().unwrap();
        }
        connection.writer().write_all(b"QE").unwrap();
        (0..updates).for_each(|_| connection.refresh_traffic_keys().unwrap());
        connection.writer().write_all(b"VM").unwrap();
        let mut segment = Vec::new();
        while connection.wants_write() {
            connection.write_tls(&mut segment).unwrap();
        }
        socket.write_all(&segment).unwrap();
        echo(serving.identified(), &mut StreamOwned::new(connection, socket));
        serving.stop();
    }
}

fn rustls_suite() -> SupportedCipherSuite {
    default_provider().cipher_suites[0]
}

#[test]
fn an_end_between_records_is_an_end_with_and_without_a_goodbye() {
    let credentials = Credentials::new();
    for notified in [true, false] {
        let (one, other) = pair(credentials.client(), credentials.server());
        one.send_all(b"last").unwrap();
        if notified {
            one.finish_sending().unwrap();
            one.finish_sending().unwrap();
            assert!(one.send_all(b"x").is_err());
            other.send_all(b"pong").unwrap();
            let mut pong = [0; 4];
            one.recv_exact(&mut pong).unwrap();
        } else {
            drop(one);
        }
        let mut last = [0; 8];
        assert_eq!(other.recv(&mut last).unwrap(), 4);
        assert_eq!(other.recv(&mut last).unwrap(), 0);
        assert_eq!(other.recv(&mut last).unwrap(), 0);
        let error = other.recv_exact(&mut last).unwrap_err();
        assert_eq!(error.to_string(), "end of stream after 0 of 8 bytes");
    }
}

#[test]
fn nothing_of_what_is_sent_is_seen_on_the_way() {
    let credentials = Credentials::new();
    let serving = Serving::tcp(credentials.server());
    let relay = relay::Relay::to(&serving.endpoint(), None, None);
    let (one, other) = say_hello(dial(&relay.endpoint, credentials.client()).unwrap(), &serving);
    let secret = b"a page of the guest, which no other may read";
    one.send_all(&secret.repeat(1000)).unwrap();
    other.recv_each(secret.len() * 1000, &mut |_| {}).unwrap();
    other.send_all(secret).unwrap();
    one.recv_each(secret.len(), &mut |_| {}).unwrap();
    let (there, back) = relay.seen();
    for (bytes, least) in [(there, secret.len() * 1000), (back, secret.len())] {
        assert!(bytes.len() > least);
        for needle in [&secret[..12], b"QEVM"] {
            assert!(!bytes.windows(needle.len()).any(|window| window == needle));
        }
        // Records from the first byte on.
        assert_eq!(bytes[..2], [22, 3]);
    }
    serving.stop();
}
